"""Gradients of the parameters below known edges, as a differentiable function of the images.

The backward pass is written out, so that it can be softened: where an activation or a max pool
switches, ``dL/dz`` jumps, and what jumps cannot be matched from afar. A temperature turns each
jump into a slope; at zero the gradient is the client's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp

from fedleak.graph.activations import flat_outside
from fedleak.graph.capture import Graph, Node
from fedleak.graph.kinds import Kind


def gradients_below(
    graph: Graph,
    values: Mapping[str, Tensor],
    cotangents: Mapping[str, Tensor],
    nodes: Iterable[str],
    temperature: float = 0.0,
) -> dict[str, Tensor]:
    """Return the gradient of every parameter of some nodes.

    Parameters
    ----------
    graph : Graph
    values : mapping of str to Tensor
        Of every input of these nodes.
    cotangents : mapping of str to Tensor
        The derivative of the loss by the uppermost of them.
    nodes : iterable of str
        From the image up, those with a known cotangent at the end of every path.
    temperature : float
        Width of the slope in the place of a jump, relative to the size of the values there.
    """
    order = [n for n in graph.nodes if n in set(nodes)]
    total = dict(cotangents)
    found: dict[str, Tensor] = {}
    for name in reversed(order):
        node = graph.nodes[name]
        if name not in total or not node.inputs:
            continue
        e, inputs = total[name], [values[i] for i in node.inputs]
        for parameter, g in _by_parameters(graph, node, inputs, e).items():
            found[parameter] = found[parameter] + g if parameter in found else g
        if not any(i in order and i not in cotangents for i in node.inputs):
            continue
        parts = _by_inputs(graph, node, inputs, e, temperature)
        for edge, part in zip(node.inputs, parts, strict=True):
            if edge in order and edge not in cotangents:
                total[edge] = total[edge] + part if edge in total else part
    return found


def _by_parameters(graph: Graph, node: Node, inputs: list[Tensor], e: Tensor) -> dict[str, Tensor]:
    own = {name: graph.parameters[name] for name in node.parameters}
    if not own:
        return {}
    return vjp(lambda p: node(inputs, {**graph.parameters, **p}), own)[1](e)[0]


def _by_inputs(
    graph: Graph, node: Node, inputs: list[Tensor], e: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    if temperature > 0 and node.kind is Kind.POINTWISE:
        bounds = flat_outside(node.target, node.args)
        if bounds is not None:
            (z,) = inputs
            width = temperature * z.detach().square().mean().sqrt()
            slope = torch.sigmoid((z - bounds[0]) / width)
            if bounds[1] < torch.inf:
                slope = slope * torch.sigmoid((bounds[1] - z) / width)
            return (e * slope,)
    if temperature > 0 and node.kind is Kind.MAX_POOL and isinstance(node.target, nn.MaxPool2d):
        return (_soft_pool(node.target, inputs[0], e, temperature),)
    return vjp(lambda *x: node(list(x), graph.parameters), *inputs)[1](e)


def _soft_pool(pool: nn.MaxPool2d, z: Tensor, e: Tensor, temperature: float) -> Tensor:
    """Share the derivative of every window among its entries, the largest most."""
    width = temperature * z.detach().square().mean().sqrt()
    batch, channels, *size = z.shape
    shape = pool.kernel_size, pool.dilation, 0, pool.stride
    pad = pool.padding if isinstance(pool.padding, tuple) else (pool.padding, pool.padding)
    border = (pad[1], pad[1], pad[0], pad[0])
    lowest = float(z.detach().min() - 1e3 * width)
    padded = F.pad(z, border, value=lowest)
    windows = F.unfold(padded.flatten(0, 1).unsqueeze(1), *shape)  # (B C, k, windows)
    share = torch.softmax(windows / width, 1) * e.reshape(batch * channels, 1, -1)
    folded = F.fold(share, tuple(padded.shape[2:]), *shape).reshape(
        batch, channels, *padded.shape[2:]
    )
    return folded[:, :, pad[0] : pad[0] + size[0], pad[1] : pad[1] + size[1]]
