"""Attribution: what each layer's gradient adds to what an update tells of its images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedleak.client.replay import Gradients
from fedleak.defences import DefenceSpec, defend
from fedleak.metric.groups import Group, group_layers
from fedleak.metric.jacobian_rows import Block
from fedleak.metric.posterior import Information, decibels
from fedleak.metric.reference import Reference

#: Relative error of every gradient, at least: sums of squares in float64 resolve no less.
LEVEL = 1e-4
#: What a layer alone is pruned by, and noised with.
PRUNED, NOISED = 0.9, 0.1
#: Entries of the update times unknowns beyond which nothing is pruned: errors that differ from
#: entry to entry take the derivative of every entry, one by one.
PRUNABLE = 4e9
#: Layers told apart, at most; and unknowns from which there are fewer, as each holds a matrix.
GROUPS, MANY = 12, 3072


@dataclass(frozen=True)
class LayerLeak:
    """What one layer, or a group of neighbouring ones, tells. All in dB of predicted PSNR.

    Attributes
    ----------
    name : str
    modules : tuple of str
        Its modules, as ``withhold:NAME,NAME`` takes them.
    entries : int
        Entries of its gradient: weights and biases.
    withheld_db, pruned_db, noised_db : float
        What is lost if it alone is withheld, pruned by 0.9, or given noise of 0.1 of the
        size of its gradients. Pruning is not tried (None) on the largest networks.
    alone_db : float
        Predicted PSNR if nothing else were sent.
    sketched : bool
        Whether fewer random combinations stand for its entries, as in large networks: then
        it may tell more alone, and cost less withheld.
    """

    name: str
    modules: tuple[str, ...]
    entries: int
    withheld_db: float
    pruned_db: float | None
    noised_db: float
    alone_db: float
    sketched: bool


@dataclass(frozen=True)
class Attribution:
    """Who leaks.

    Attributes
    ----------
    psnr_db : float
        Predicted PSNR of the whole update in dB, with every gradient known to ``level``: what
        the losses are counted from.
    nothing_db : float
        The same if nothing were sent: what the prior alone gives.
    level : float
        Relative error of every gradient, at least.
    layers : tuple of LayerLeak
        In the order of the model.
    """

    psnr_db: float
    nothing_db: float
    level: float
    layers: tuple[LayerLeak, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON."""
        return asdict(self)


def relative_errors(gradient: Gradients, level: float = 1.0) -> Gradients:
    """Return errors of ``level`` times each gradient's root mean square; ``inf`` for zeros."""
    sizes = {k: g.square().mean().sqrt() for k, g in gradient.items()}
    return {k: torch.where(s > 0, level * s, torch.inf) for k, s in sizes.items()}


def combined(*errors: Gradients) -> Gradients:
    """Return the errors of independent causes together."""
    out = dict(errors[0])
    for more in errors[1:]:
        out = {k: torch.hypot(*torch.broadcast_tensors(e, more[k].to(e))) for k, e in out.items()}
    return out


def blocks_at(
    reference: Reference, errors: Gradients, blocks: Sequence[Block] | None = None
) -> list[Block]:
    """Return a reference's rows in units of other errors.

    Parameters
    ----------
    reference : Reference
    errors : dict
        Standard deviation of each entry's error.
    blocks : sequence of Block, optional
        The rows in units of ``reference.errors``: scaled, where each tensor's errors are all
        larger by one factor, instead of derived anew.
    """
    factors = {} if blocks is None else _factors(reference.errors, errors)
    missing = [k for k in errors if k not in factors]
    found = [replace(b, rows=b.rows / factors[b.name]) for b in blocks or () if b.name in factors]
    if missing:
        # Infinite errors leave the others out of the pass.
        unknown = {
            k: e if k in missing else torch.full_like(e, torch.inf) for k, e in errors.items()
        }
        found += reference.jacobian.blocks(unknown)
    return found


def _factors(before: Gradients, after: Gradients) -> dict[str, float]:
    """Return by how much larger each tensor's errors are, where all are by the same."""
    out = {}
    for name, old in before.items():
        old, new = torch.broadcast_tensors(old, after[name])
        if not bool((new.isinf() == old.isinf()).all()):
            continue
        told = old.isfinite()
        ratio = (new[told] / old[told]).flatten()
        if ratio.numel() == 0:
            out[name] = 1.0  # no rows
        elif bool(((ratio - ratio[0]).abs() <= 1e-9 * ratio[0]).all()):
            out[name] = float(ratio[0])
    return out


def prunable(reference: Reference) -> bool:
    """Say whether pruned updates of this model can be judged in reasonable time."""
    entries = sum(g.numel() for g in reference.jacobian.gradient.values())
    return entries * reference.jacobian.images.numel() <= PRUNABLE


def pruned_errors(reference: Reference, share: float) -> Gradients:
    """Return the errors of a reference's update that is pruned on top of its defence."""
    spec = DefenceSpec("prune", share)
    return combined(reference.errors, spec.errors(defend(reference.sent, spec, 0)))


def regrouped(blocks: Sequence[Block], groups: Sequence[Group]) -> list[Block]:
    """Return the blocks with the name of their group as layer."""
    names = {p: group.name for group in groups for p in group.parameters}
    return [replace(b, layer=names[b.name]) for b in blocks]


def information(reference: Reference, factor: Tensor, blocks: Sequence[Block]) -> Information:
    """Return the information of an update whose gradients are known to :data:`LEVEL`, by group.

    Parameters
    ----------
    reference : Reference
    factor : Tensor, shape (n / B, n / B)
        Of the prior's covariance.
    blocks : sequence of Block
        In units of ``reference.errors``.
    """
    floored = combined(reference.errors, relative_errors(reference.jacobian.gradient, LEVEL))
    rows = blocks_at(reference, floored, blocks)
    # The level sets the unit of the rows, and with it what further noise is relative to.
    scaled = [replace(b, rows=b.rows * LEVEL) for b in rows]
    return Information(regrouped(scaled, groups_of(reference)), factor, LEVEL)


def groups_of(reference: Reference) -> tuple[Group, ...]:
    """Return the layers of a reference's model, in few groups."""
    n = reference.jacobian.images.numel()
    return group_layers(list(reference.errors), max(2, int(GROUPS * min(1.0, (MANY / n) ** 2))))


def attribute(
    reference: Reference, factor: Tensor, blocks: Sequence[Block], told: Information | None = None
) -> Attribution:
    """Return what each layer tells.

    Parameters
    ----------
    reference : Reference
        A batch and its defended update.
    factor : Tensor, float64, shape (n / B, n / B)
        Lower triangular factor of the prior's covariance.
    blocks : sequence of Block
        The rows in units of ``reference.errors``.
    told : Information, optional
        :func:`information` of the same, where it is at hand.
    """
    told = information(reference, factor, blocks) if told is None else told
    gradient = reference.jacobian.gradient
    nothing = decibels(float(factor.square().sum()) / len(factor))
    whole = told.psnr_db() if told.layers else nothing
    floor = relative_errors(gradient, LEVEL)
    pruned: Sequence[Block] | None = None
    if prunable(reference):
        pruned = _changed(reference, combined(pruned_errors(reference, PRUNED), floor), blocks)
    noise = combined(reference.errors, relative_errors(gradient, NOISED), floor)
    scales = _noise_scales(reference, floor, noise)
    noised: Sequence[Block] = []
    if any(k not in scales for k in told.layers):
        noised = _changed(reference, noise, blocks)
    leaks = []
    for group in groups_of(reference):
        name = group.name
        entries = sum(gradient[k].numel() for k in group.parameters)
        if name not in told.layers:  # a defence withholds it, or its gradient is zero
            leaks.append(LayerLeak(name, group.modules, entries, 0.0, 0.0, 0.0, nothing, False))
            continue
        if name in scales:
            under_noise = told.psnr_db({name: scales[name]})
        else:
            under_noise = told.exchanged(name, _one(noised, name, factor))
        lost_pruned = None
        if pruned is not None:
            lost_pruned = max(whole - told.exchanged(name, _one(pruned, name, factor)), 0.0)
        leak = LayerLeak(
            name=name,
            modules=group.modules,
            entries=entries,
            withheld_db=max(whole - told.psnr_db({name: 0.0}), 0.0),
            pruned_db=lost_pruned,
            noised_db=max(whole - under_noise, 0.0),
            alone_db=told.alone(name),
            sketched=any(b.sketched for b in blocks if b.name in group.parameters),
        )
        leaks.append(leak)
    return Attribution(whole, nothing, LEVEL, tuple(leaks))


def _changed(reference: Reference, errors: Gradients, blocks: Sequence[Block]) -> list[Block]:
    return regrouped(blocks_at(reference, errors, blocks), groups_of(reference))


def _one(blocks: Sequence[Block], name: str, factor: Tensor) -> Information:
    return Information([b for b in blocks if b.layer == name], factor, 1.0)


def _noise_scales(reference: Reference, floor: Gradients, noise: Gradients) -> Mapping[str, float]:
    """Return by how much noise scales the information of each group, where it is one factor."""
    factors = _factors(combined(reference.errors, floor), noise)
    out = {}
    for group in groups_of(reference):
        told = [k for k in group.parameters if not bool(noise[k].isinf().all())]
        found = [factors.get(k, math.nan) for k in told]
        if found and all(math.isclose(f, found[0], rel_tol=1e-9) for f in found):
            out[group.name] = found[0] ** -2
    return out
