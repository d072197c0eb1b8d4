"""Whether a reconstruction explains the whole update, to its rounding; else what was left open."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedleak.graph.kernels.refusal import EXPLAINED
from fedleak.graph.kinks import turned
from fedleak.graph.knowledge import Knowledge
from fedleak.graph.targets import frontier


@dataclass(frozen=True)
class Certificate:
    """What a reconstruction explains.

    Attributes
    ----------
    certified : bool
        Whether every parameter's gradient is reproduced up to rounding, and there is as much
        known as images have pixels: else other images reproduce it as well.
    missed : dict of str to float
        Relative distance, of the parameters where it is not.
    open : list of str
        Why layers did not tell their input, from the head down; then what that leaves open of
        the image.
    rules : dict of str to list of str
        What each rule found: the layers whose output became known by it.
    undetermined : bool
        Whether other images are known to reproduce the update as well.
    """

    certified: bool
    missed: dict[str, float]
    open: list[str]
    rules: dict[str, list[str]] = field(default_factory=dict)
    undetermined: bool = False

    def details(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "certified": self.certified,
            "missed": self.missed,
            "open": self.open,
            "rules": self.rules,
            "undetermined": self.undetermined,
        }


def certify(
    knowledge: Knowledge,
    made: Mapping[str, Tensor],
    rounding: Mapping[str, float],
    images: Tensor | None = None,
) -> Certificate:
    """Compare the gradient that a reconstruction makes with the observed one.

    A unit within float32's rounding of zero may be active for the client and not here: where the
    update is missed, such units are turned over as long as that explains it.

    Parameters
    ----------
    knowledge : Knowledge
    made : mapping of str to Tensor
        The whole gradient of the reconstruction.
    rounding : mapping of str to float
        Known errors of the entries of each parameter's gradient, beside float32's own.
    images : Tensor, shape (B, C, H, W), optional
        The reconstruction, as the model sees it; without it no unit is turned over.
    """
    missed = _missed(knowledge, made, rounding)
    if missed and images is not None:
        missed = _missed(knowledge, turned(knowledge, images, made), rounding)
    rules: dict[str, list[str]] = {}
    for edge, known in knowledge.values.items():
        node = knowledge.graph.nodes[edge]
        if known.by != "the model":
            rules.setdefault(known.by, []).append(node.path or node.name)
    left = list(dict.fromkeys(knowledge.short.values()))
    if (
        missed and knowledge.value(knowledge.graph.image) is None
    ):  # where no rule led on, there may be no refusal either: say how far they came
        edges = [knowledge.graph.nodes[e] for e in frontier(knowledge)[0]]
        names = ", ".join(e.path or e.name for e in edges)
        left.append(f"no rule tells what is below {names}")
    unknowns = math.prod(knowledge.graph.nodes[knowledge.graph.image].shape)
    equations = _equations(knowledge, unknowns)
    undetermined = equations < unknowns
    if undetermined:
        left.append(
            f"the image: at most {equations} of its {unknowns} unknowns are determined by the "
            "update, and the prior filled in the others"
        )
    return Certificate(not missed and not undetermined, missed, left, rules, undetermined)


def _missed(
    knowledge: Knowledge, made: Mapping[str, Tensor], rounding: Mapping[str, float]
) -> dict[str, float]:
    """Return how far off a gradient is, relative, of each parameter where it is not explained."""
    missed = {}
    for name, target in knowledge.gradient.items():
        size = float(target.norm())
        if not size:
            continue
        off = float((made[name] - target).norm())
        if off > EXPLAINED * size + 5 * rounding.get(name, 0.0) * target.numel() ** 0.5:
            missed[name] = off / size
    return missed


def _equations(knowledge: Knowledge, unknowns: int) -> int:
    """Return how many values the image has to meet: known ones, and entries of gradients."""
    graph = knowledge.graph
    if knowledge.value(graph.image) is not None:
        return unknowns
    reached, count = {graph.image}, 0
    for node in graph.nodes.values():
        if not any(i in reached for i in node.inputs):
            continue
        sent = [knowledge.gradient[p] for p in node.parameters if p in knowledge.gradient]
        count += sum(int((g != 0).sum()) for g in sent)
        value = knowledge.value(node.name)
        if value is None:
            reached.add(node.name)
        else:
            count += value.numel()
    return count
