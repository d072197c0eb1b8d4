"""An edge whose operation's inputs are all known."""

from __future__ import annotations

import torch

from fedleak.graph.knowledge import ROUNDING, Knowledge, Known, probe


def apply(knowledge: Knowledge) -> bool:
    """Run every operation whose inputs are known and whose output is not."""
    graph, new = knowledge.graph, False
    for node in graph.nodes.values():
        known = knowledge.values.get(node.name)
        if not node.inputs or not node.shape or (known is not None and known.whole):
            continue
        inputs = [knowledge.values.get(i) for i in node.inputs]
        if not all(i is not None and i.whole for i in inputs):
            continue
        values = [i.value for i in inputs if i is not None]
        with torch.no_grad():
            made = node(values, graph.parameters)
        error = ROUNDING * float(made.square().mean().sqrt())
        for place, i in enumerate(inputs):
            assert i is not None

            def at(x: torch.Tensor, place: int = place) -> torch.Tensor:
                return node([*values[:place], x, *values[place + 1 :]], graph.parameters)

            if i.value.is_floating_point():
                error = (error**2 + probe(at, i.value, i.error) ** 2) ** 0.5
        new |= knowledge.learn_value(node.name, Known(made, error, "forward"))
    return new
