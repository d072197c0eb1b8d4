"""Cotangents from an operation's output to its inputs, and up again through what is invertible."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.graph.capture import Node
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge, Known, probe
from fedleak.graph.rules.derivatives import pulled_back
from fedleak.graph.rules.inverse import scale_of


def apply(knowledge: Knowledge) -> bool:
    """Carry every known cotangent on."""
    new = False
    for node in reversed(knowledge.graph.nodes.values()):
        new |= _gather(knowledge, node.name)
        known = knowledge.cotangents.get(node.name)
        if known is not None:
            for place in range(len(node.inputs)):
                new |= _contribute(knowledge, node, place, known)
        elif len(node.inputs) and node.kind in (Kind.ADD, Kind.SCALE, Kind.RESHAPE):
            new |= _up(knowledge, node)
    return new


def _gather(knowledge: Knowledge, edge: str) -> bool:
    """Add up what an edge's consumers contribute, where all are known."""
    consumers = knowledge.graph.consumers[edge]
    if edge in knowledge.cotangents or not consumers:
        return False
    parts = [knowledge.contributions.get(c) for c in consumers]
    known = [p for p in parts if p is not None]
    if len(known) < len(parts):
        return False
    value = torch.stack([p.value for p in known]).sum(0)
    error = sum(p.error**2 for p in known) ** 0.5
    return knowledge.learn_cotangent(edge, Known(value, error, known[0].by))


def _contribute(knowledge: Knowledge, node: Node, place: int, known: Known) -> bool:
    edge = node.inputs[place]
    if (node.name, place) in knowledge.contributions:
        return False
    if knowledge.graph.nodes[edge].kind is Kind.CONSTANT:
        return False
    if node.kind in (Kind.CONVOLUTION, Kind.DENSE) and not _trusted(knowledge, node):
        return False

    def pull(d: Tensor) -> Tensor:
        return pulled_back(knowledge.graph, node, place, d, values)

    values = None
    if node.kind is Kind.POINTWISE and node.name in knowledge.slopes:
        slope = knowledge.slopes[node.name]
        found = Known(known.value * slope, known.error, "backward")
    else:
        if not node.kind.affine:
            inputs = [knowledge.value(i) for i in node.inputs]
            values = [v for v in inputs if v is not None]
            if len(values) < len(inputs):
                return False
        made = pull(known.value)
        rounding = ROUNDING * float(made.square().mean().sqrt())
        square = probe(pull, known.value, known.error) ** 2 + rounding**2
        if values is not None and len(values) == 1:

            def at(x: Tensor) -> Tensor:
                return pulled_back(knowledge.graph, node, place, known.value, [x])

            square += probe(at, values[0], knowledge.values[edge].error) ** 2
        error = square**0.5
        found = Known(made, error, "backward")
    knowledge.contributions[node.name, place] = found
    return True


def _trusted(knowledge: Knowledge, node: Node) -> bool:
    """Return whether a layer's cotangent may be mixed: its own gradient agrees, or cannot."""
    return node.name in knowledge.checked or node.name in knowledge.short


def _up(knowledge: Knowledge, node: Node) -> bool:
    """Find the derivative by an output from that by an input that nothing else takes."""
    for place, edge in enumerate(node.inputs):
        known = knowledge.cotangents.get(edge)
        alone = knowledge.graph.consumers[edge] == [(node.name, place)]
        same = node.kind is Kind.RESHAPE or knowledge.graph.nodes[edge].shape == node.shape
        if known is None or not alone or not same:
            continue
        if node.kind is Kind.ADD:
            value, error = known.value, known.error
        else:
            scale, shift = scale_of(knowledge.graph, node, known.value.new_zeros(node.shape))
            if not bool((scale != 0).all()):
                continue
            with torch.no_grad():  # the operation itself, linear, undoes its transpose
                part = [known.value / scale.square()]
                value = node(part, knowledge.graph.parameters) - shift
            error = known.error / float(scale.abs().mean())
        return knowledge.learn_cotangent(node.name, Known(value, error, "backward"))
    return False
