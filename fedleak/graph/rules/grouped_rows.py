r"""The input of a grouped or depthwise convolution from its weight's gradient and its cotangent.

Each group is a small convolution of its own, ``K(e_g) x_g = G_g``. A depthwise layer has no more
rows for each channel than its kernel has offsets, and a channel whose units are all inactive has
none: its input stays open. That is no loss further down, where nothing arrives from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.graph.capture import Node
from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kernels.rows import cotangent_matrix, least_squares
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge, Known
from fedleak.graph.rules.mixtures import geometry_of

#: Relative error up to which an entry counts as known.
_KNOWN = 1e-3
#: Residual, in units of the rounding that is expected, above which nothing is believed.
_FACTOR = 20.0
#: Singular values below this part of the largest leave a direction open.
_NEGLIGIBLE = 1e-9
#: Entries of all groups' matrices, at most.
_MOST = 50_000_000
#: Rows for each unknown from which a residual says something.
_REDUNDANT = 1.1
#: A group's input counts as this part of the usual size at least, where errors are weighed.
_LEAST = 1e-3


def apply(knowledge: Knowledge) -> bool:
    """Solve one layer whose cotangent is known, or check it where its input is known."""
    for node in reversed(knowledge.graph.nodes.values()):
        if node.kind is not Kind.CONVOLUTION or node.module.groups == 1:
            continue
        done = node.name in knowledge.short or node.name in knowledge.checked
        if done or node.name not in knowledge.cotangents:
            continue
        if knowledge.gradient_of(node, "weight") is not None:
            _solve(knowledge, node)
            return True
    return False


def _solve(knowledge: Knowledge, node: Node) -> None:
    (edge,), geometry = node.inputs, geometry_of(knowledge, node)
    known = knowledge.cotangents[node.name]
    gradient = knowledge.gradient[f"{node.path}.weight"].double()
    entries = known.value.shape[1] * geometry.taps * len(known.value) * geometry.positions
    if entries > _MOST:
        knowledge.short[node.name] = f"{node.path}: {entries} entries of matrices, at most {_MOST}"
        return
    matrix, right = _rows(known, gradient, geometry, knowledge.errors.get(f"{node.path}.weight"))
    told = knowledge.values.get(edge)
    if told is not None and told.whole:
        value = _by_group(told.value, geometry.groups)
        if _worst(matrix, right, value) <= _FACTOR * (1 + told.relative / ROUNDING):
            knowledge.checked.add(node.name)
        else:
            _contradiction(knowledge, node)
        return
    value, deviation, _, null = least_squares(matrix, right, _NEGLIGIBLE)
    clear = null.square().sum(2) < 1e-12
    size = float((value * clear.unsqueeze(2)).square().sum().div(clear.sum().clamp_min(1)).sqrt())
    clear &= deviation <= _KNOWN * size
    if not bool(clear.any()):
        knowledge.short[node.name] = f"{node.path}: gradient rows leave positions open"
        return
    if _worst(matrix, right, value) > _FACTOR:
        _contradiction(knowledge, node)
        return
    rank = matrix.shape[2] - null.square().sum((1, 2))
    rows = (matrix != 0).any(2).sum(1)
    if float(rows.sum()) >= _REDUNDANT * float(rank.sum()):
        knowledge.checked.add(node.name)
    else:
        knowledge.short[node.name] = f"{node.path}: as many rows as positions"
    error = max(float(deviation[clear].square().mean().sqrt()), ROUNDING * size)
    channels = matrix.new_ones(1, 1, value.shape[2], dtype=torch.bool)
    mask = _by_edge(clear.unsqueeze(2) & channels, len(known.value), geometry)
    found = _by_edge(value, len(known.value), geometry)
    whole = bool(mask.all())
    knowledge.learn_value(edge, Known(found, error, "grouped rows", None if whole else mask))


def _contradiction(knowledge: Knowledge, node: Node) -> None:
    knowledge.contradicted.add(node.name)
    knowledge.short[node.name] = f"{node.path}: gradient rows contradict each other"


def _rows(
    known: Known, gradient: Tensor, geometry: Geometry, observed: float | None
) -> tuple[Tensor, Tensor]:
    """Return each group's matrix and right sides, rows in units of the expected error.

    That is relative to the size of the group's input, as in :class:`.gradient_rows.System`.
    """
    matrix = cotangent_matrix(known.value, geometry)
    each = matrix.flatten(1)
    size, active = each.norm(dim=1), (each != 0).sum(1)
    noise = ((ROUNDING * size).square() + known.error**2 * active).div(geometry.taps)
    noise = (noise + (observed or 0.0) ** 2).sqrt()
    weight = torch.where(size > 1e-9 * size.max(), 1 / noise.clamp_min(1e-300), 0.0)[:, None, None]
    right = gradient.flatten(2).mT * weight
    grouped = geometry.groups, -1
    matrix = (matrix * weight).unflatten(0, grouped).flatten(1, 2)
    return matrix, right.unflatten(0, grouped).flatten(1, 2)


def _worst(matrix: Tensor, right: Tensor, value: Tensor) -> float:
    """Return the largest residual of a group, in expected errors."""
    rest = (right - matrix @ value).square().mean((1, 2)).sqrt()
    sizes = value.square().mean((1, 2)).sqrt()
    usual = float(value.square().mean().sqrt())
    return float((rest / sizes.clamp_min(max(_LEAST * usual, 1e-300))).max())


def _by_group(value: Tensor, groups: int) -> Tensor:
    """Return (B, C, H, W) as (groups, positions of all images, channels of a group)."""
    return value.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _by_edge(value: Tensor, batch: int, geometry: Geometry) -> Tensor:
    """Undo :func:`_by_group`."""
    apart = value.unflatten(1, (batch, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return apart.unflatten(2, geometry.size)
