"""Where a fully connected layer sees one position, its bias' gradient is its cotangent."""

from __future__ import annotations

from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import Knowledge, Known


def apply(knowledge: Knowledge) -> bool:
    """Read ``dL/d`` of the outputs from the gradients of biases and embeddings.

    A parameter that is one of the graph's edges itself, as a position embedding, is told by its
    own gradient in the same way.
    """
    new = False
    for node in knowledge.graph.nodes.values():
        if node.name in knowledge.cotangents:
            continue
        if node.kind is Kind.DENSE and node.shape[:-1].count(1) == len(node.shape) - 1:
            found, name = knowledge.gradient_of(node, "bias"), f"{node.path}.bias"
        elif node.kind is Kind.PARAMETER and node.path not in knowledge.graph.shared:
            found, name = knowledge.gradient.get(node.path), node.path
        else:
            continue
        if found is None:
            continue
        value = found.reshape(node.shape)
        known = Known(value, knowledge.error_of(name), "head")
        new |= knowledge.learn_cotangent(node.name, known)
    return new
