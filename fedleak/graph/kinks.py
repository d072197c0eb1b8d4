"""Units so near a kink that the client's float32 may have put them on its other side.

There the gradient jumps: the same image makes two gradients, both right to rounding. In a deep
network of millions of units a few are that near.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedleak import deadline
from fedleak.graph.activations import flat_outside
from fedleak.graph.backprop import gradients_below
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import Knowledge

#: How near, in units of the root mean square: what float32 leaves after many layers.
_NEAR = 3e-6
#: What float32 leaves of the logits after many layers, relative to the largest: softmax is off by
#: as much, and where a client is sure of its image the derivative by the logits is far smaller.
_LOGITS = 1e-6
#: Units that are tried at most, each for a backward pass, those nearest to their kink first.
_MOST = 24
#: A unit was turned over if that takes this part of what is missed, squared, away.
_EXPLAINS = 0.3


def turned(
    knowledge: Knowledge, images: Tensor, made: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Return the gradient of images with the units turned over that the client had so.

    Parameters
    ----------
    knowledge : Knowledge
        The derivative by the logits must be known; otherwise ``made`` is returned.
    images : Tensor, shape (B, C, H, W)
        As the model sees them.
    made : mapping of str to Tensor
        The gradient as it is.
    """
    graph = knowledge.graph
    above = knowledge.cotangents.get(graph.logits)
    if above is None or above.value.shape != graph.nodes[graph.logits].shape:
        return made
    with torch.no_grad():
        values = graph.run({graph.image: images.to(above.value)}, list(graph.nodes))

    def backward() -> dict[str, Tensor]:
        with torch.no_grad():
            return gradients_below(graph, values, {graph.logits: above.value}, graph.nodes)

    before = backward()
    bias = graph.nodes[graph.logits].parameter("bias") or ""
    off = (made[bias] - knowledge.gradient[bias]).abs().max() if bias in made else torch.inf
    if off <= _LOGITS * max(1.0, float(values[graph.logits].abs().max())):
        # The derivative by the logits is the client's: it is a factor of all below.
        made = {**made, **before}
    rest = {n: knowledge.gradient[n] - made[n] for n in knowledge.gradient}
    missed = _missed(knowledge, rest)
    for edge, place, across in _near(knowledge, values):
        if deadline.passed():
            break
        values[edge] = values[edge].contiguous()
        flat = values[edge].view(-1)
        flat[place], back = across, float(flat[place])
        after = backward()
        left = {n: r - (after[n] - before[n]) if n in after else r for n, r in rest.items()}
        fewer = _missed(knowledge, left)
        if fewer < (1 - _EXPLAINS) * missed:
            rest, before, missed = left, after, fewer
        else:
            flat[place] = back
    return {n: knowledge.gradient[n] - r for n, r in rest.items()}


def _missed(knowledge: Knowledge, rest: Mapping[str, Tensor]) -> float:
    """Return what is missed, relative to each parameter's gradient, squared and summed."""
    sizes = {n: float(knowledge.gradient[n].square().sum()) for n in rest}
    return sum(float(r.square().sum()) / sizes[n] for n, r in rest.items() if sizes[n] > 0)


def _near(knowledge: Knowledge, values: Mapping[str, Tensor]) -> list[tuple[str, int, float]]:
    """Return units near a kink, from the head down: edge, place, and a value across the kink."""
    graph, found = knowledge.graph, list[tuple[float, int, str, int, float]]()
    for depth, node in enumerate(reversed(graph.nodes.values())):
        if node.kind is not Kind.POINTWISE:
            continue
        bounds = flat_outside(node.target, node.args)
        if bounds is None:
            continue
        z = values[node.inputs[0]].flatten()
        size = float(z.square().mean().sqrt())
        for kink in bounds:
            off = (z - kink).abs() if kink < torch.inf else torch.full_like(z, torch.inf)
            for place in (off < _NEAR * size).nonzero()[:, 0].tolist():
                side = -1.0 if float(z[place]) > kink else 1.0
                across = kink + side * _NEAR * size
                found.append((float(off[place]) / size, depth, node.inputs[0], place, across))
    nearest = sorted(found)[:_MOST]
    return [unit[2:] for unit in sorted(nearest, key=lambda unit: unit[1])]
