"""Wrong slopes of an activation: found by the gradient of the layer below, and mended.

A unit within rounding of zero may be taken for active, or not. Its output channel's gradient
rows then contradict the others', by far more than rounding. The rest of the channels tell the
layer's input, the input tells the channel's cotangent, and that the slopes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.graph.capture import Node
from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import Knowledge
from fedleak.graph.rules.derivatives import pulled_back

#: How far a slope may be off a whole number, to be rounded to it.
_NEAR = 0.1


def potential(knowledge: Knowledge, node: Node) -> tuple[Node, Tensor] | None:
    """Return the activation above a layer, and the layer's cotangent if all units were active.

    Between the two are scales and sums only; None where there is anything else, or where the
    derivative by the activation's output is not known.
    """
    graph, chain = knowledge.graph, []
    name = node.name
    while True:
        if len(graph.consumers[name]) != 1:
            return None
        ((above, place),) = graph.consumers[name]
        upper = graph.nodes[above]
        if upper.shape != node.shape:
            return None
        if upper.kind is Kind.POINTWISE:
            break
        if upper.kind not in (Kind.SCALE, Kind.ADD, Kind.RESHAPE):
            return None
        chain.append((upper, place))
        name = above
    known = knowledge.cotangents.get(upper.name)
    if known is None:
        return None
    made = known.value
    for between, place in reversed(chain):
        made = pulled_back(graph, between, place, made)
    return upper, made


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


def mend(knowledge: Knowledge, node: Node, value: Tensor, wrong: Tensor) -> bool:
    """Set the slopes of the activation above a layer anew in some channels.

    Returns whether any changed: all cotangents below the activation are then forgotten.
    """
    above = potential(knowledge, node) if bool(wrong.any()) else None
    gradient = knowledge.gradient_of(node, "weight")
    if above is None or gradient is None or node.kind is not Kind.CONVOLUTION:
        return False
    activation, full = above
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
    if bool((fresh == slopes[:, wrong]).all()):
        return False
    slopes = slopes.clone()
    slopes[:, wrong] = fresh
    knowledge.slopes[activation.name] = slopes
    knowledge.forget_below(activation)
    return True
