"""Updates of a model whose head was tampered with by class fishing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedleak import deadline
from fedleak.attacks.base import ATTACKS, Attack, Reconstruction, make_attack
from fedleak.errors import FedleakError, UnsupportedModelError
from fedleak.modules import copied
from fedleak.observation import Observation

#: Rounding of a mean over a batch in float32.
_COUNTED = 1e-3


@ATTACKS.register("fished")
@dataclass(frozen=True)
class FishedAttack(Attack):
    """Attack the images of the one class that :class:`fedleak.tampers.Fishing` let through.

    The head's bias tells how many there are, its row of the class the sum of their features.
    The gradient of everything below is theirs alone: as an update of those images only it goes
    to an attack for honest models. Nothing else of the batch comes back.

    Parameters
    ----------
    attack : str
        The attack on what was fished out.
    options : mapping
        Its options.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    """

    attack: str = "hybrid"
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"

    def __post_init__(self) -> None:
        self._inner()

    def _inner(self) -> Attack:
        return make_attack(self.attack, device=self.device, **self.options)

    def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        inner, out = self._inner(), []
        for n, seen in enumerate(observations):
            label, count = fished(seen)
            if count == 0:
                nothing = torch.zeros(0, *seen.input_shape, dtype=torch.float64)
                about = {"by": "fishing", "class": label, "fished": 0, "layers": []}
                out.append(Reconstruction(nothing, torch.zeros(0, dtype=torch.int64), 1.0, about))
                continue
            with deadline.part(1 / (len(observations) - n)) as allowed:
                (found,) = inner.reconstruct([alone(seen, label, count)])
            cut = {"cut_short": True} if allowed.hit else {}
            about = {**found.details, **cut, "class": label, "fished": count}
            out.append(replace(found, details=about))
        return out


def head_name(model: nn.Module, input_shape: tuple[int, int, int]) -> str:
    """Return the name of the fully connected layer that makes the logits.

    Raises
    ------
    UnsupportedModelError
        If the model does not end in one with a bias.
    """
    made: list[tuple[str, Tensor]] = []
    model = copied(model).eval()
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [
        m.register_forward_hook(lambda m, i, o, name=n: made.append((name, o))) for n, m in linear
    ]
    like = next(model.parameters())
    with torch.no_grad():
        logits = model(torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device))
    for handle in handles:
        handle.remove()
    if not made or made[-1][1] is not logits or model.get_submodule(made[-1][0]).bias is None:
        raise UnsupportedModelError(
            "class fishing needs a model that ends in a fully connected layer (nn.Linear) with a "
            "bias"
        )
    return made[-1][0]


def fished(seen: Observation) -> tuple[int, int]:
    """Return the class that the model's head lets through, and how many images are of it.

    Raises
    ------
    FedleakError
        If the model that was sent does not fish, or the update is not that of such a model.
    """
    name = head_name(seen.model, seen.input_shape)
    weight = seen.model.get_parameter(f"{name}.weight").detach()
    bias = seen.model.get_parameter(f"{name}.bias").detach()
    used = weight.flatten(1).any(1).nonzero().flatten()
    if len(used) != 1 or bool((bias - bias[used]).abs().sum() < 50 * (len(bias) - 1)):
        raise UnsupportedModelError(
            f"the head {name!r} of the model that was sent does not fish for one class"
        )
    label = int(used)
    share = -float(seen.gradient[f"{name}.bias"][label]) * seen.images
    count = round(share)
    if abs(share - count) > _COUNTED * max(1, count) or not 0 <= count <= seen.images:
        raise FedleakError(
            f"the update says that {share:.3f} of {seen.images} images are of class {label}: it "
            "is not the mean gradient of such a batch"
        )
    return label, count


def alone(seen: Observation, label: int, count: int) -> Observation:
    """Return the update of the fished images alone: as a client with no others would send it.

    Of the head's gradient only the row of the class is theirs. For these images, the other rows
    follow: all other classes are equally likely, so that each row is the class's, times
    ``-1 / (classes - 1)``.
    """
    name = head_name(seen.model, seen.input_shape)
    gradient = {k: g * (seen.images / count) for k, g in seen.gradient.items()}
    for part in ("weight", "bias"):
        rows = gradient[f"{name}.{part}"].clone()
        others = torch.arange(len(rows)) != label
        rows[others] = -rows[label] / (len(rows) - 1)
        gradient[f"{name}.{part}"] = rows
    own = seen.with_terms(images=count, clients=1, labels=None)
    return replace(own, gradient=gradient)
