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
#: The feature that is 1 for every image that passes a gate (:mod:`fedleak.tampers.gate`).
FLAG = 10
#: Bias from which all images are taken for a class, whatever they show; and one that is enough
#: where the rows of the head are of size one.
_SINK, _EXPECTED = 1e34, 1e3


@ATTACKS.register("fished")
@dataclass(frozen=True)
class FishedAttack(Attack):
    """Attack the images that :class:`fedleak.tampers.Fishing` let through.

    By class: the head's bias tells how many there are, its row of the class the sum of their
    features. By feature: a flag among the features counts them, by class. The gradient of
    everything below is theirs alone: as an update of those images only it goes to an attack for
    honest models. Nothing else of the batch comes back.

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
            caught = catch(seen)
            about: dict[str, Any] = {"class": caught.label, "fished": caught.count}
            if caught.update is None:
                nothing = torch.zeros(0, *seen.input_shape, dtype=torch.float64)
                about |= {"by": "fishing", "layers": []}
                out.append(Reconstruction(nothing, torch.zeros(0, dtype=torch.int64), 1.0, about))
                continue
            with deadline.part(1 / (len(observations) - n)) as allowed:
                (found,) = inner.reconstruct([caught.update])
            cut = {"cut_short": True} if allowed.hit else {}
            out.append(replace(found, details={**found.details, **cut, **about}))
        return out


@dataclass(frozen=True)
class Catch:
    """What a tampered head let through.

    Attributes
    ----------
    label : int
        The class; of the foremost one where there are ranks, -1 if no image passed.
    count : int
        How many images of it passed.
    update : Observation or None
        Of these images alone; None where there are none, or too many to be told apart.
    """

    label: int
    count: int
    update: Observation | None = None


def catch(seen: Observation) -> Catch:
    """Return what came through.

    Raises
    ------
    FedleakError
        If the model that was sent does not fish, or the update is not that of such a model.
    """
    name = head_name(seen.model, seen.input_shape)
    order, sink = ranked(seen.model, name)
    if order:
        return _foremost(seen, name, order, sink)
    label, count = fished(seen)
    return Catch(label, count, alone(seen, label, count) if count else None)


def ranked(model: nn.Module, head: str) -> tuple[list[int], int]:
    """Return the classes by the size of their rows, largest first, and the one all are taken for.

    No class, if the head does not rank them.
    """
    weight = model.get_parameter(f"{head}.weight").detach().double()
    bias = model.get_parameter(f"{head}.bias").detach().double()
    sizes = weight.norm(dim=1)
    sink = int(bias.argmax())
    if float(bias[sink]) < _SINK or float(sizes[sink]) > 0:
        return [], -1
    order = sizes.argsort(descending=True, stable=True)
    return [int(k) for k in order if sizes[k] > 0], sink


def _foremost(seen: Observation, head: str, order: list[int], sink: int) -> Catch:
    """Return the update of the image that outshines all others, if it is one."""
    told = -seen.gradient[f"{head}.weight"].double() * seen.num_images
    counts = told[:, FLAG]
    off = (counts[order] - counts[order].round()).abs().max()
    if float(off) > _COUNTED * max(1, seen.num_images) or bool((counts[order] < -0.5).any()):
        raise FedleakError(
            f"the update says that {counts[order].tolist()} images of the classes {order} passed "
            "the gate: it is not the mean gradient of such a batch"
        )
    passed = [k for k in order if round(float(counts[k])) > 0]
    if not passed:
        return Catch(-1, 0)
    label, count = passed[0], round(float(counts[passed[0]]))
    if count > 1:  # of one class, at one size: nothing tells them apart
        return Catch(label, count)
    # As if this class alone were ranked, at size one.
    model = copied(seen.model)
    weight = model.get_parameter(f"{head}.weight").detach()
    size = float(weight[label].double().norm())
    row = weight[label] / size
    with torch.no_grad():
        model.get_parameter(f"{head}.weight").zero_()[label] = row
        model.get_parameter(f"{head}.bias").zero_()[sink] = _EXPECTED
    gradient = {k: g.double() * (seen.num_images / size) for k, g in seen.gradient.items()}
    features = told[label]
    rows = torch.zeros_like(told)
    rows[label], rows[sink] = -features, features
    errors = torch.zeros(len(rows), dtype=torch.float64)
    errors[label], errors[sink] = -1.0, 1.0
    gradient |= {f"{head}.weight": rows, f"{head}.bias": errors}
    like = {k: g.to(seen.gradient[k].dtype) for k, g in gradient.items()}
    own = seen.with_terms(num_images=1, clients=1, labels=None)
    return Catch(label, 1, replace(own, model=model, gradient=like))


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
    share = -float(seen.gradient[f"{name}.bias"][label]) * seen.num_images
    count = round(share)
    if abs(share - count) > _COUNTED * max(1, count) or not 0 <= count <= seen.num_images:
        raise FedleakError(
            f"the update says that {share:.3f} of {seen.num_images} images are of class {label}: "
            "it is not the mean gradient of such a batch"
        )
    return label, count


def alone(seen: Observation, label: int, count: int) -> Observation:
    """Return the update of the fished images alone: as a client with no others would send it.

    Of the head's gradient only the row of the class is theirs. For these images, the other rows
    follow: all other classes are equally likely, so that each row is the class's, times
    ``-1 / (classes - 1)``.
    """
    name = head_name(seen.model, seen.input_shape)
    gradient = {k: g * (seen.num_images / count) for k, g in seen.gradient.items()}
    for part in ("weight", "bias"):
        rows = gradient[f"{name}.{part}"].clone()
        others = torch.arange(len(rows)) != label
        rows[others] = -rows[label] / (len(rows) - 1)
        gradient[f"{name}.{part}"] = rows
    own = seen.with_terms(num_images=count, clients=1, labels=None)
    return replace(own, gradient=gradient)
