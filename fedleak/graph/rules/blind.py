"""A convolution's input and cotangent from its weight's gradient alone.

The blind kernel finds both up to one factor. It is told by the cotangent that the layer would have
with every unit of the activation above active, and every entry of a pool's window the largest:
entry by entry the true one is that, or zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.graph.capture import Node
from fedleak.graph.kernels.blind import blind_criterion
from fedleak.graph.kernels.refusal import Refused
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge, Known
from fedleak.graph.rules.masks import potential
from fedleak.graph.rules.mixtures import geometry_of, resolved


def apply(knowledge: Knowledge) -> bool:
    """Solve one convolution whose cotangent is not known; those nearest to the head first."""
    for node in reversed(knowledge.graph.nodes.values()):
        if node.kind is Kind.CONVOLUTION and _open(knowledge, node) and _solve(knowledge, node):
            return True
    return False


def _open(knowledge: Knowledge, node: Node) -> bool:
    known = node.name in knowledge.cotangents or knowledge.value(node.inputs[0]) is not None
    return not known and node.name not in knowledge.blind


def _solve(knowledge: Knowledge, node: Node) -> bool:
    gradient = knowledge.gradient_of(node, "weight")
    above = potential(knowledge, node)
    if gradient is None or above is None:
        return False
    geometry = geometry_of(knowledge, node)
    out, channels = gradient.shape[:2]
    if not blind_criterion(geometry, out, channels, knowledge.graph.batch).holds:
        return False
    knowledge.blind.add(node.name)
    try:
        inputs, cotangents, relative = resolved(knowledge, node)
    except Refused as refusal:
        knowledge.short[node.name] = str(refusal)
        return False
    _, full = above
    values, slopes, left = [], [], list(range(len(inputs)))
    for potential_ in full:
        # The images come in an arbitrary order: each potential takes the one that fits it best.
        off, best = min((_fit(cotangents[b], potential_)[0], b) for b in left)
        if off > 1e-2:
            knowledge.short[node.name] = f"slopes found blindly are off whole numbers by {off:.1e}"
            return False
        left.remove(best)
        _, factor, slope = _fit(cotangents[best], potential_)
        values.append(inputs[best] * factor)
        slopes.append(slope)
    value, e = torch.stack(values), full * torch.stack(slopes)
    error = max(relative, ROUNDING) * float(value.square().mean().sqrt())
    size = float(e.square().mean().sqrt())
    knowledge.learn_cotangent(node.name, Known(e, ROUNDING * size, "blind convolution"))
    seen = geometry.seen.reshape(geometry.size).to(value.device).expand_as(value)
    mask = None if bool(seen.all()) else seen
    return knowledge.learn_value(node.inputs[0], Known(value, error, "blind convolution", mask))


def _fit(e: Tensor, full: Tensor) -> tuple[float, float, Tensor]:
    """Return how far slopes are off whole numbers, the number that ``e`` is off, and the slopes."""
    ratio = e / torch.where(full != 0, full, torch.inf)
    weight = full.square()
    # Entries are zero or one number: the mean over those that are clearly not zero.
    largest = ratio.flatten()[ratio.abs().argmax()]
    clear = ratio / largest > 0.5
    factor = (weight * ratio)[clear].sum() / weight[clear].sum()
    slopes = ratio / factor
    off = ((slopes - slopes.round()).square() * weight).sum().sqrt() / weight.sum().sqrt()
    return float(off), float(factor), slopes.round()
