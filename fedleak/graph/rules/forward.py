"""An edge whose operation's inputs are all known."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.graph.capture import Graph, Node
from fedleak.graph.knowledge import ROUNDING, Knowledge, Known, probe


def apply(knowledge: Knowledge) -> bool:
    """Run every operation whose inputs are known and whose output is not."""
    new = False
    for node in knowledge.graph.nodes.values():
        known = knowledge.values.get(node.name)
        if not node.inputs or not node.shape or (known is not None and known.whole):
            continue
        inputs = [knowledge.values.get(i) for i in node.inputs]
        whole = [i for i in inputs if i is not None and i.whole]
        if len(whole) == len(inputs):
            new |= knowledge.learn_value(node.name, _made(knowledge.graph, node, whole))
    return new


def _made(graph: Graph, node: Node, inputs: list[Known]) -> Known:
    values = [i.value for i in inputs]
    with torch.no_grad():
        made = node(values, graph.parameters)
    square = (ROUNDING * float(made.square().mean().sqrt())) ** 2
    for place, known in enumerate(inputs):

        def at(x: Tensor, place: int = place) -> Tensor:
            return node([*values[:place], x, *values[place + 1 :]], graph.parameters)

        square += probe(at, known.value, known.error) ** 2
    return Known(made, square**0.5, "forward")
