"""From an operation's output back to its input: activations, scales, shapes, sums."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.graph.activations import invert
from fedleak.graph.capture import Graph, Node
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import Knowledge, Known
from fedleak.graph.rules.derivatives import pulled_back


def apply(knowledge: Knowledge) -> bool:
    """Go back through what can be inverted, entry by entry."""
    new = False
    for node in knowledge.graph.nodes.values():
        known = knowledge.values.get(node.name)
        if known is None:
            continue
        if node.kind is Kind.POINTWISE:
            new |= _pointwise(knowledge, node, known)
        elif node.kind.entrywise:
            new |= _entrywise(knowledge, node, known)
        elif node.kind is Kind.ADD:
            new |= _sum(knowledge, node, known)
        elif node.kind is Kind.CAT and known.whole:
            new |= _parts(knowledge, node, known)
    return new


def _pointwise(knowledge: Knowledge, node: Node, known: Known) -> bool:
    if node.name in knowledge.slopes or not (known.whole or _idle(knowledge, node, known)):
        return False
    each = known.error if known.deviation is None else known.deviation
    found = invert(node.target, node.args, known.value, each)
    if found is None:
        return False
    inside = found.known if known.mask is None else found.known & known.mask
    if bool(found.slope_known.all()):
        slopes = found.slope if known.mask is None else found.slope * known.mask
        knowledge.slopes[node.name] = slopes
    mask = None if bool(inside.all()) else inside
    slope = found.slope[inside].abs()
    error = known.error / float(slope.mean().clamp_min(1e-12)) if slope.numel() else known.error
    knowledge.learn_value(node.inputs[0], Known(found.value, error, "inverse", mask))
    return True


def _idle(knowledge: Knowledge, node: Node, known: Known) -> bool:
    """Return whether nothing arrives where an output is not known: there no slope counts."""
    above = knowledge.cotangents.get(node.name)
    return above is not None and known.mask is not None and not bool(above.value[~known.mask].any())


def _entrywise(knowledge: Knowledge, node: Node, known: Known) -> bool:
    (edge,), graph = node.inputs, knowledge.graph
    if not _less(knowledge, edge, known):
        return False
    scale, shift = scale_of(graph, node, known.value)
    if not bool((scale != 0).all()):
        return False
    value = pulled_back(graph, node, 0, known.value - shift) / scale.square()
    mask = known.mask
    if mask is not None:
        mask = pulled_back(graph, node, 0, mask.to(known.value)) != 0
    error = known.error / float(scale.abs().mean())
    return knowledge.learn_value(edge, Known(value, error, "inverse", mask))


def scale_of(graph: Graph, node: Node, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor of every input entry of an entrywise node, and the constant added."""
    zero = like.new_zeros(graph.nodes[node.inputs[0]].shape)
    with torch.no_grad():
        shift = node([zero], graph.parameters)
    return pulled_back(graph, node, 0, torch.ones_like(like)), shift


def _less(knowledge: Knowledge, edge: str, known: Known) -> bool:
    """Return whether less is known of an edge than ``known`` tells."""
    before = knowledge.values.get(edge)
    return before is None or (known.whole and not before.whole)


def _sum(knowledge: Knowledge, node: Node, known: Known) -> bool:
    if len(node.inputs) != 2:
        return False
    shapes = [knowledge.graph.nodes[i].shape for i in node.inputs]
    new = False
    for edge, other, shape in zip(node.inputs, reversed(node.inputs), shapes, strict=True):
        term = knowledge.values.get(other)
        if term is None or not term.whole or shape != node.shape:
            continue
        error = (known.error**2 + term.error**2) ** 0.5
        made = Known(known.value - term.value, error, "inverse", known.mask)
        if _less(knowledge, edge, made):
            new |= knowledge.learn_value(edge, made)
    return new


def _parts(knowledge: Knowledge, node: Node, known: Known) -> bool:
    new = False
    for place, edge in enumerate(node.inputs):
        if knowledge.value(edge) is None:
            value = pulled_back(knowledge.graph, node, place, known.value)
            new |= knowledge.learn_value(edge, Known(value, known.error, "inverse"))
    return new
