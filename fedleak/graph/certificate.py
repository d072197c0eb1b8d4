"""Whether a reconstruction explains the whole update, to its rounding; else what was left open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedleak.graph.knowledge import Knowledge

#: Relative distance of one parameter's gradient up to which it is explained: at the true image a
#: client's float32 gradient is within 1e-6 of it in float64.
EXPLAINED = 1e-5


@dataclass(frozen=True)
class Certificate:
    """What a reconstruction explains.

    Attributes
    ----------
    certified : bool
        Whether every parameter's gradient is reproduced up to rounding.
    missed : dict of str to float
        Relative distance, of the parameters where it is not.
    open : list of str
        Why layers did not tell their input, from the head down.
    rules : dict of str to list of str
        What each rule found: the layers whose output became known by it.
    """

    certified: bool
    missed: dict[str, float]
    open: list[str]
    rules: dict[str, list[str]] = field(default_factory=dict)

    def details(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "certified": self.certified,
            "missed": self.missed,
            "open": self.open,
            "rules": self.rules,
        }


def certify(
    knowledge: Knowledge, made: Mapping[str, Tensor], rounding: Mapping[str, float]
) -> Certificate:
    """Compare the gradient that a reconstruction makes with the observed one.

    Parameters
    ----------
    knowledge : Knowledge
    made : mapping of str to Tensor
        The whole gradient of the reconstruction.
    rounding : mapping of str to float
        Known errors of the entries of each parameter's gradient, beside float32's own.
    """
    missed = {}
    for name, target in knowledge.gradient.items():
        size = float(target.norm())
        if not size:
            continue
        off = float((made[name] - target).norm())
        if off > EXPLAINED * size + 5 * rounding.get(name, 0.0) * target.numel() ** 0.5:
            missed[name] = off / size
    rules: dict[str, list[str]] = {}
    for edge, known in knowledge.values.items():
        node = knowledge.graph.nodes[edge]
        if known.by != "the model":
            rules.setdefault(known.by, []).append(node.path or node.name)
    return Certificate(not missed, missed, list(dict.fromkeys(knowledge.short.values())), rules)
