"""Wrong slopes of an activation, found and mended by the gradient of a bias below it.

That gradient is a sum, over the positions of all images, of what arrives there: the derivative by
the activation's output, times its slopes. A channel whose sum is missed has units on the wrong side
of a kink, and those are among the few that lie within the error of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.graph.activations import flat_outside
from fedleak.graph.capture import Node
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge
from fedleak.graph.rules.masks import distance

#: How far off a sum may be, in units of the usual, and the usual at most, relative.
_FACTOR, _HOLDS = 5.0, 1e-5
#: Part of the channels that is right in any case: it tells the usual.
_RIGHT = 0.2
#: Standard deviations within which a unit may lie on either side, and how many of a channel are
#: tried together.
_NEAR, _MOST = 10.0, 12


def apply(knowledge: Knowledge) -> bool:
    """Weigh the slopes of every activation once its derivative is known."""
    new = False
    for node in reversed(knowledge.graph.nodes.values()):
        if node.kind is not Kind.POINTWISE or node.name in knowledge.weighed:
            continue
        if node.name not in knowledge.slopes or node.name not in knowledge.cotangents:
            continue
        bias = bias_below(knowledge, node)
        flat = flat_outside(node.target, node.args) is not None
        if bias is None or not flat or len(node.shape) != 4:
            continue
        knowledge.weighed.add(node.name)
        new |= _mend(knowledge, node, bias, distance(knowledge, node))
    return new


def bias_below(knowledge: Knowledge, node: Node) -> Tensor | None:
    """Return the gradient of a bias that is added to an activation's input, in each channel."""
    graph, stack = knowledge.graph, [node.inputs[0]]
    while stack:
        below = graph.nodes[stack.pop()]
        if len(graph.consumers[below.name]) != 1 or below.shape != node.shape:
            continue
        if below.kind is Kind.ADD:
            stack += below.inputs
        elif below.kind in (Kind.NORMALISATION, Kind.SCALE, Kind.CONVOLUTION):
            bias = knowledge.gradient_of(below, "bias")
            if bias is not None:
                return bias.double()
    return None


def _mend(knowledge: Knowledge, node: Node, bias: Tensor, near: Tensor) -> bool:
    """Turn units over so that every channel's sum comes out; where several ways do, none."""
    full, slopes = knowledge.cotangents[node.name].value, knowledge.slopes[node.name].clone()
    made = full * slopes
    off = bias - made.sum((0, 2, 3))
    size = made.square().sum((0, 2, 3)).sqrt()
    live = size > 1e-9 * size.max()
    if int(live.sum()) < 4:
        return False
    # Of normal errors a fifth are below a quarter of their standard deviation.
    usual = 4 * float((off.abs() / size.clamp_min(1e-300))[live].quantile(_RIGHT))
    usual = max(usual, ROUNDING)
    if usual > _HOLDS:
        return False
    bound, changed = _FACTOR * usual * size.clamp_min(float(size[live].median())), False
    for channel in (off.abs() > bound).nonzero()[:, 0].tolist():
        place = near[:, channel].flatten()
        units = (place < _NEAR).nonzero()[:, 0]
        units = units[place[units].argsort()]
        slope = slopes[:, channel].flatten().clone()
        change = full[:, channel].flatten()[units] * (1 - 2 * slope[units])
        turned = _turned(change, float(off[channel]), float(bound[channel]))
        if turned is not None:
            slope[units[turned]] = 1 - slope[units[turned]]
            slopes[:, channel] = slope.reshape(slopes[:, channel].shape)
            changed = True
    if changed:
        knowledge.slopes[node.name] = slopes
        knowledge.forget_below(node)
    return changed


def _turned(change: Tensor, total: float, bound: float) -> Tensor | None:
    """Return which numbers add up to a total: one of them, or several of the first few.

    None where none do, or more than one way.
    """
    chosen = torch.zeros(len(change), dtype=torch.bool, device=change.device)
    alone = ((change - total).abs() <= bound).nonzero()[:, 0]
    if len(alone):
        chosen[alone] = True
        return chosen if len(alone) == 1 else None
    count = min(len(change), _MOST)
    ways = torch.arange(2**count, device=change.device)
    each = (ways[:, None] >> torch.arange(count, device=change.device)) & 1
    off = (each.to(change) @ change[:count] - total).abs()
    fits = (off <= bound).nonzero()[:, 0]
    if len(fits) != 1:
        return None
    chosen[:count] = each[fits[0]].bool()
    return chosen
