"""Wrong slopes of an activation: found by the gradient of the layer below, and mended.

A unit within rounding of zero may be taken for active, or not. Its output channel's gradient
rows then contradict the others', by far more than rounding. The rest of the channels tell the
layer's input, the input tells the channel's cotangent, and that the slopes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak.graph.activations import flat_outside
from fedleak.graph.capture import Node
from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge
from fedleak.graph.rules.derivatives import pulled_back

#: How far a slope may be off a whole number, to be rounded to it.
_NEAR = 0.1
#: How many standard deviations off a kink a unit may be, to be turned over.
_CLOSE = 100.0


def potential(knowledge: Knowledge, node: Node) -> tuple[list[Node], Tensor, float] | None:
    """Return a layer's cotangent as it were if every unit above it were active.

    Between the layer and the next derivative that is known lie scales, sums, activations that are
    flat or the identity, and max pools without overlap: of each entry the true one is that, or
    zero. None where there is anything else.

    Returns
    -------
    switches : list of Node
        The activations and pools between, from the layer up.
    full : Tensor
        Of the shape of the layer's output.
    relative : float
        Its relative error: that of the derivative above.
    """
    graph, chain, name = knowledge.graph, list[tuple[Node, int]](), node.name
    switches: list[Node] = []
    while not switches or name not in knowledge.cotangents:
        if len(graph.consumers[name]) != 1:
            return None
        ((above, place),) = graph.consumers[name]
        upper = graph.nodes[above]
        if not (_passes(upper) or (upper.shape == graph.nodes[name].shape and _keeps(upper))):
            return None
        chain.append((upper, place))
        switches += [upper] if upper.kind in (Kind.POINTWISE, Kind.MAX_POOL) else []
        name = above
    known = knowledge.cotangents[name]
    made = known.value
    for between, place in reversed(chain):
        if between.kind is Kind.MAX_POOL:
            made = _unpooled(between, made, graph.nodes[between.inputs[0]].shape)
        elif between.kind is not Kind.POINTWISE:
            made = pulled_back(graph, between, place, made)
    return switches, made, max(known.relative, ROUNDING)


def _keeps(node: Node) -> bool:
    """Return whether an operation hands every entry on, times a number, or cuts it off."""
    if node.kind is Kind.POINTWISE:
        return flat_outside(node.target, node.args) is not None
    return node.kind in (Kind.SCALE, Kind.ADD, Kind.RESHAPE)


def _passes(node: Node) -> bool:
    """Return whether an operation is a max pool whose windows do not overlap."""
    pool = node.target
    if node.kind is not Kind.MAX_POOL or not isinstance(pool, nn.MaxPool2d):
        return False
    plain = pool.padding in (0, (0, 0)) and pool.dilation in (1, (1, 1)) and not pool.ceil_mode
    return plain and _pair(pool.kernel_size) == _pair(pool.stride)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _unpooled(node: Node, e: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give every entry of a window the derivative of the whole; what no window covers, none."""
    high, wide = _pair(node.target.kernel_size)
    spread = e.repeat_interleave(high, 2).repeat_interleave(wide, 3)
    return F.pad(spread, (0, shape[3] - spread.shape[3], 0, shape[2] - spread.shape[2]))


def cotangent_rows(node: Node, value: Tensor, gradient: Tensor, channels: Tensor) -> Tensor:
    """Return what a layer's gradient says of its cotangent, where its input is known.

    Parameters
    ----------
    node : Node
    value : Tensor
        Its input.
    gradient : Tensor
        Of its weight.
    channels : Tensor of bool, shape (C_out,)

    Returns
    -------
    Tensor, shape (channels, positions)
        Positions of the output of all images, by least squares.
    """
    if node.kind is Kind.DENSE:
        patches = value.flatten(0, -2)
    else:
        taken = Geometry.of(node.module, (value.shape[2], value.shape[3])).patches(value)
        patches = taken.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
    right = gradient[channels].flatten(1)
    return torch.linalg.lstsq(patches.mT, right.mT).solution.mT


def distance(knowledge: Knowledge, node: Node) -> Tensor:
    """Return how far an activation's outputs are off its kinks, in standard deviations.

    Infinite where they are not known.
    """
    known, bounds = knowledge.values.get(node.name), flat_outside(node.target, node.args)
    shape = knowledge.graph.nodes[node.name].shape
    if known is None or bounds is None:
        like = knowledge.slopes[node.name]
        return torch.full(shape, torch.inf, dtype=like.dtype, device=like.device)
    off = torch.full_like(known.value, torch.inf)
    for kink in bounds:
        if kink < torch.inf:
            off = off.minimum((known.value - kink).abs())
    each = off.new_tensor(known.error) if known.deviation is None else known.deviation
    return off / each.clamp_min(1e-300)


def mend(knowledge: Knowledge, node: Node, value: Tensor, wrong: Tensor) -> bool:
    """Set the slopes of the activation above a layer anew in some channels.

    Returns whether any changed: all cotangents below the activation are then forgotten.
    """
    above = potential(knowledge, node) if bool(wrong.any()) else None
    gradient = knowledge.gradient_of(node, "weight")
    if above is None or gradient is None or node.kind is not Kind.CONVOLUTION:
        return False
    switches, full, _ = above
    if len(switches) != 1 or switches[0].kind is not Kind.POINTWISE:
        return False
    (activation,) = switches
    slopes = knowledge.slopes.get(activation.name)
    if slopes is None:
        return False
    rows = cotangent_rows(node, value, gradient, wrong)
    batch, _, *grid = node.shape
    e = rows.reshape(len(rows), batch, *grid).movedim(0, 1)
    part = full[:, wrong]
    told = part.abs() > 1e-3 * part.abs().mean()
    found = torch.where(told, e / torch.where(told, part, 1.0), slopes[:, wrong])
    near = (found - found.round()).abs() < _NEAR
    fresh = torch.where(told & near, found.round(), slopes[:, wrong])
    turned = fresh != slopes[:, wrong]
    if not bool(turned.any()) or bool(
        (distance(knowledge, activation)[:, wrong][turned] > _CLOSE).any()
    ):
        return False
    slopes = slopes.clone()
    slopes[:, wrong] = fresh
    knowledge.slopes[activation.name] = slopes
    knowledge.forget_below(activation)
    return True
