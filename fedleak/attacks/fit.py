"""``fit``: what of an update images leave unexplained; 0 at the truth, 1 where nothing is."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.client.replay import Replay
from fedleak.systems import Gradients

#: A tensor is silent where the model makes less than this of it, relative to the largest of its
#: layer: a bias before batch normalisation, whose effect is subtracted again.
_NOTHING = 1e-9
#: What rounding of a client, also in half precision, may leave of a silent tensor, relative to
#: the largest of its layer.
_ROUNDED = 1e-2
#: Random batches that show what a model makes of a tensor.
_PROBES = 3


def compare(
    made: Gradients,
    gradient: Gradients,
    counted: dict[str, Tensor],
    errors: Gradients,
    told: Gradients,
    scale: str,
) -> tuple[Tensor, Tensor]:
    """Return the fit, and the factor between what images make and what was observed, each (N,).

    The root mean square over tensors of ``||factor * made - observed|| / ||observed||``. What the
    attacker knows to be noise is no misfit, and a tensor counts as far as it is more than that.

    Parameters
    ----------
    made, gradient : dict of Tensor, shape (N, *parameter)
    counted : dict of Tensor of bool, shape (N,)
        Whether a tensor says anything.
    errors : dict
        Standard deviations, like ``gradient``; empty where none are known.
    told : dict
        Masks, like ``gradient``, of entries that say anything; empty for all.
    scale : {"", "update", "tensor"}
        Of what the factor is unknown; else it is 1.
    """
    rests, sizes, products, weights = [], [], [], []
    for name, g in gradient.items():
        target, own = g.flatten(1), made[name].flatten(1)
        noise = torch.zeros_like(target[:, 0])
        if name in told:
            mask = told[name].flatten(1)
            target, own = target * mask, torch.where(mask, own, 0.0)
            noise = torch.where(mask, errors[name].flatten(1), 0.0).square().sum(1)
        size = target.square().sum(1)
        says = counted[name] & (size > 0)
        unit = torch.where(says, size, 1.0)
        weight = torch.where(says, (1 - noise / unit).clamp_min(0.0), 0.0)
        sizes.append(own.square().sum(1) / unit)
        products.append((own * target).sum(1) / unit)
        # Kept apart from the two above: of nearly equal ones nothing would be left.
        rests.append((own, target, unit, noise / unit))
        weights.append(weight)
    w = torch.stack(weights)
    # Where noise hides everything, all tensors count alike.
    w = torch.where(w.sum(0) > 0, w, torch.stack([(r[2] != 1).to(w) for r in rests]))
    one, many = torch.ones_like(w[0]), torch.stack(sizes)
    factor, each = one, torch.ones_like(w)
    if scale == "update":
        total = (w * many).sum(0)
        factor = torch.where(total > 0, (w * torch.stack(products)).sum(0) / total, one)
        each = factor.expand_as(w)
    elif scale == "tensor":
        each = torch.stack(products) / many.clamp_min(1e-300)
    misses = torch.stack(
        [
            ((a.unsqueeze(1) * own - target).square().sum(1) / unit - noise).clamp_min(0.0)
            for a, (own, target, unit, noise) in zip(each, rests, strict=True)
        ]
    )
    total = w.sum(0)
    fit = ((w * misses).sum(0) / total.clamp_min(1e-300)).sqrt()
    fit = torch.where(total > 0, fit, one)
    return fit.nan_to_num(torch.inf), factor


def compare_signs(made: Gradients, gradient: Gradients, counted: dict[str, Tensor]) -> Tensor:
    """Return the fit where signs are all that is known, (N,).

    The mean over tensors of the part of ``made``, by magnitude, that has the wrong sign, doubled:
    0 where all are right, 1 where they are by chance.
    """
    parts, weights = [], []
    for name, g in gradient.items():
        own, sign = made[name].flatten(1), g.flatten(1).sign()
        size = (own.abs() * sign.abs()).sum(1)
        right = (own * sign).sum(1)
        parts.append(torch.where(size > 0, 1 - right / size.clamp_min(1e-300), 1.0))
        weights.append((counted[name] & sign.any(1)).to(own))
    w = torch.stack(weights)
    fit = (w * torch.stack(parts)).sum(0) / w.sum(0).clamp_min(1)
    return torch.where(w.sum(0) > 0, fit, 1.0).nan_to_num(torch.inf)


def silent_tensors(
    gradient: Gradients, replay: Replay, images: int, rounding: dict[str, float]
) -> dict[str, Tensor]:
    """Return which tensors hold nothing but rounding, whatever the images, masks of (N,).

    The model is asked with random images; only tensors that are small in the update are
    suspected, so that mostly there is nothing to ask.

    Parameters
    ----------
    gradient : dict of Tensor, shape (N, *parameter)
    replay : Replay
    images : int
        Images of each update.
    rounding : dict
        Standard deviation of the rounding of entries, where they are differences of weights.
    """
    sizes = {k: g.flatten(1).square().mean(1).sqrt() for k, g in gradient.items()}
    small = {}
    for name, size in sizes.items():
        others = torch.stack([sizes[k] for k in _layer(name, sizes)]).amax(0)
        small[name] = size <= (_ROUNDED * others).clamp_min(10 * rounding[name])
    if not any(bool(s.any()) for s in small.values()):
        return small
    made = _probe(replay, images)
    typical = {k: g.flatten(1).square().mean(1).sqrt().amax(0) for k, g in made.items()}
    for name, size in typical.items():
        others = torch.stack([typical[k] for k in _layer(name, typical)]).amax(0)
        small[name] = small[name] & bool(size <= _NOTHING * others)
    return small


def _layer(name: str, names: dict[str, Tensor]) -> list[str]:
    """Return the tensors of the same layer; all where it is the only one."""
    same = [k for k in names if k.rpartition(".")[0] == name.rpartition(".")[0]]
    return same if len(same) > 1 else list(names)


def _probe(replay: Replay, images: int) -> Gradients:
    """Return gradients of random images, shape (_PROBES, *parameter)."""
    generator = torch.Generator().manual_seed(0)
    shape = (_PROBES, images, *replay.input_shape)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    y = torch.randint(replay.classes, shape[:2], generator=generator)
    with torch.no_grad():
        return replay(x.to(replay.device, replay.dtype), y.to(replay.device)).gradients
