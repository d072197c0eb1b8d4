"""What an image must reproduce, of all that is known of a graph."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.func import vjp

from fedleak.graph.backprop import gradients_below
from fedleak.graph.capture import Graph, Node
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge

#: A gradient whose largest entry is below this part of the largest of all is rounding.
_ROUNDED_AWAY = 1e-6


class Targets(ABC):
    """Known values that images must make.

    Attributes
    ----------
    knowledge : Knowledge
    edges : list of str
        Edges whose values are known everywhere, reached from the image first.
    values, errors : Tensor, shape (m,)
        What is known, each tensor in units of its root mean square, and its relative error.
    temperature : float
        How far jumps of the gradient are softened, see :mod:`fedleak.graph.backprop`.
    """

    temperature = 0.0

    def __init__(
        self, knowledge: Knowledge, edges: list[str], tensors: list[Tensor], errors: list[float]
    ):
        self.knowledge, self.edges = knowledge, edges
        known = [knowledge.values[e] for e in edges]
        tensors = [*(k.value for k in known), *tensors]
        errors = [*(max(k.relative, ROUNDING) for k in known), *errors]
        sizes = [float(t.square().mean().sqrt()) for t in tensors]
        self._sizes = [s if s > 0 else 1.0 for s in sizes]
        spread = [t.new_full((t.numel(),), e) for t, e in zip(tensors, errors, strict=True)]
        self.values = self._joined(tensors) if tensors else torch.empty(0)
        self.errors = torch.cat(spread) if tensors else torch.empty(0)

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.flatten() / s for t, s in zip(tensors, self._sizes, strict=True)])

    def made(self, images: Tensor) -> Tensor:
        """Return what images, shape (B, C, H, W), make of it, shape (m,)."""
        return self._joined(self._tensors(images))

    @abstractmethod
    def _tensors(self, images: Tensor) -> list[Tensor]:
        """Return what images make of each tensor, the edges' first."""


class NearestTargets(Targets):
    """Values of edges, and gradients of layers below whose cotangent is known.

    Such a gradient is linear in the layer's input: all of it is continuous in the images.

    Parameters
    ----------
    knowledge : Knowledge
    rows : bool
        Whether gradients count. What checks their cotangents may be short of rows, so that a
        mask may be wrong there; values were checked.
    """

    def __init__(self, knowledge: Knowledge, rows: bool = True):
        edges, self.layers = frontier(knowledge)
        self.layers = self.layers if rows else []
        tensors, errors = [], []
        for node in self.layers:
            for name in node.parameters:
                tensors.append(knowledge.gradient[name])
                errors.append(max(knowledge.cotangents[node.name].relative, ROUNDING))
        super().__init__(knowledge, edges, tensors, errors)

    def _tensors(self, images: Tensor) -> list[Tensor]:
        graph = self.knowledge.graph
        inputs = [node.inputs[0] for node in self.layers]
        edges = graph.run({graph.image: images}, [*self.edges, *inputs])
        tensors = [edges[e] for e in self.edges]
        for node in self.layers:
            e = self.knowledge.cotangents[node.name].value
            found = parameter_gradients(graph, node, edges[node.inputs[0]], e)
            tensors += [found[name] for name in node.parameters]
        return tensors


class BelowTargets(Targets):
    """Values of edges, and the gradients of all parameters below them."""

    def __init__(self, knowledge: Knowledge):
        graph = knowledge.graph
        edges, _ = frontier(knowledge)
        below = set(edges).union(*(graph.below(e) for e in edges))
        self.nodes = [n for n in graph.nodes if n in below]
        self.inner = list(dict.fromkeys(i for n in self.nodes for i in graph.nodes[n].inputs))
        largest = max(float(g.abs().max()) for g in knowledge.gradient.values())
        parameters = dict.fromkeys(p for n in self.nodes for p in graph.nodes[n].parameters)
        self.parameters = [
            p
            for p in parameters
            if p in knowledge.gradient
            and float(knowledge.gradient[p].abs().max()) > _ROUNDED_AWAY * largest
            and all(u in below for u in graph.users(p))
        ]
        self.cotangents = {e: knowledge.cotangents[e] for e in edges if e in knowledge.cotangents}
        relative = max((k.relative for k in self.cotangents.values()), default=0.0)
        errors = [max(relative, ROUNDING)] * len(self.parameters)
        tensors = [knowledge.gradient[p] for p in self.parameters]
        super().__init__(knowledge, edges, tensors, errors)

    @classmethod
    def of(cls, knowledge: Knowledge) -> BelowTargets | None:
        """Return them; None where the derivative by some of the edges is not known."""
        edges, _ = frontier(knowledge)
        if not edges or any(e not in knowledge.cotangents for e in edges):
            return None
        made = cls(knowledge)
        return made if made.parameters else None

    def _tensors(self, images: Tensor) -> list[Tensor]:
        graph = self.knowledge.graph
        values = graph.run({graph.image: images}, [*self.edges, *self.inner])
        above = {e: k.value for e, k in self.cotangents.items()}
        found = gradients_below(graph, values, above, self.nodes, self.temperature)
        return [*(values[e] for e in self.edges), *(found[p] for p in self.parameters)]


def frontier(knowledge: Knowledge) -> tuple[list[str], list[Node]]:
    """Return the known edges that the image reaches first, and the layers before them."""
    graph = knowledge.graph
    reached, edges, layers = {graph.image}, [], []
    if knowledge.value(graph.image) is not None:
        return [graph.image], []
    for node in graph.nodes.values():
        if not any(i in reached for i in node.inputs):
            continue
        if node.kind in (Kind.CONVOLUTION, Kind.DENSE, Kind.SCALE) and node.parameters:
            sent = all(p in knowledge.gradient for p in node.parameters)
            alone = not any(p in graph.shared for p in node.parameters)
            # A wrong mask is in the cotangents of the layer and of the scale above it.
            wrong = knowledge.contradicted & {node.name, *node.inputs}
            if node.name in knowledge.cotangents and sent and alone and not wrong:
                layers.append(node)
        if knowledge.value(node.name) is not None:
            edges.append(node.name)
        else:
            reached.add(node.name)
    return edges, layers


def parameter_gradients(graph: Graph, node: Node, value: Tensor, e: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a layer's parameters at its input, for the cotangent ``e``."""
    own = {name: graph.parameters[name] for name in node.parameters}
    pull = vjp(lambda p: node([value], {**graph.parameters, **p}), own)[1]
    return pull(e)[0]
