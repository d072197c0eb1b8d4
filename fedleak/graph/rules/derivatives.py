"""Derivatives of single operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import vjp

from fedleak.graph.capture import Graph, Node


def pulled_back(
    graph: Graph, node: Node, place: int, cotangent: Tensor, values: Sequence[Tensor] | None = None
) -> Tensor:
    """Return what ``cotangent`` by a node's output makes by its input at ``place``.

    Parameters
    ----------
    graph : Graph
    node : Node
    place : int
    cotangent : Tensor
    values : sequence of Tensor, optional
        The node's inputs; zeros where its derivative does not depend on them.
    """
    if values is None:
        values = [cotangent.new_zeros(graph.nodes[i].shape) for i in node.inputs]

    def made(x: Tensor) -> Tensor:
        return node([*values[:place], x, *values[place + 1 :]], graph.parameters)

    with torch.no_grad():
        pull = vjp(made, values[place])[1]
        return pull(cotangent)[0]
