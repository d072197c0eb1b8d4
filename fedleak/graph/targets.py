"""What an image must reproduce, of all that is known of a graph."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
    apart : bool
        Whether every image makes its own part of them: then nothing couples the images.
    values, errors : Tensor, shape (N, m)
        What is known, each tensor in units of its root mean square, and its relative error; image
        by image (N = B) where they are apart, else N = 1.
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
        self.apart = len(tensors) == len(edges) and _apart(knowledge.graph, edges)
        sizes = [float(t.square().mean().sqrt()) for t in tensors]
        self._sizes = [s if s > 0 else 1.0 for s in sizes]
        each = zip(tensors, errors, self._sizes, strict=True)
        spread = [torch.full_like(t, e * s) for t, e, s in each]
        self.values = self._joined(tensors) if tensors else torch.empty(1, 0)
        self.errors = self._joined(spread) if tensors else torch.empty(1, 0)

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        parts = self.knowledge.graph.batch if self.apart else 1
        each = zip(tensors, self._sizes, strict=True)
        return torch.cat([t.reshape(parts, -1) / s for t, s in each], 1)

    def made(self, images: Tensor) -> Tensor:
        """Return what images, shape (B, C, H, W), make of it, shape (N, m)."""
        return self._joined(self._tensors(images))

    @abstractmethod
    def _tensors(self, images: Tensor) -> list[Tensor]:
        """Return what images make of each tensor, the edges' first."""


class NearestTargets(Targets):
    """Values of edges, and gradients of layers below that are continuous in the images.

    Those of a layer whose cotangent is known are linear in its input. Through a normalisation by
    its own statistics, or an activation without a kink, a known derivative goes on down.

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
        self.parameters = [name for node in self.layers for name in node.parameters]
        told = carried(knowledge, edges)
        self.nodes = [n for n in knowledge.graph.nodes if n in told]
        self.cotangents = {n: knowledge.cotangents[n] for n in told if n in knowledge.cotangents}
        errors = []
        for node in self.layers:
            known = knowledge.cotangents.get(node.name)
            each = self.cotangents.values() if known is None else [known]
            relative = max(k.relative for k in each)
            errors += [max(relative, knowledge.relative(p)) for p in node.parameters]
        tensors = [knowledge.gradient[name] for name in self.parameters]
        super().__init__(knowledge, edges, tensors, errors)

    def _tensors(self, images: Tensor) -> list[Tensor]:
        graph = self.knowledge.graph
        inner = [i for n in self.nodes for i in graph.nodes[n].inputs] if self.parameters else []
        values = graph.run({graph.image: images}, [*self.edges, *inner])
        tensors = [values[e] for e in self.edges]
        if not self.parameters:
            return tensors
        above = {e: k.value for e, k in self.cotangents.items()}
        found = gradients_below(graph, values, above, self.nodes)
        return [*tensors, *(found[name] for name in self.parameters)]


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
        errors = [max(relative, knowledge.relative(p)) for p in self.parameters]
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


def _apart(graph: Graph, edges: list[str]) -> bool:
    """Return whether each image makes its own part of some edges, first among their sizes.

    Normalisation by the batch's statistics couples them; what else does shows when one is changed.
    """
    if graph.batch == 1 or any(n.kind is Kind.NORMALISATION for n in graph.nodes.values()):
        return False
    if any(graph.nodes[e].shape[:1] != (graph.batch,) for e in edges):
        return False
    like = next(iter(graph.parameters.values()))
    images = torch.linspace(0, 1, math.prod(graph.nodes[graph.image].shape)).to(like)
    images = images.reshape(graph.nodes[graph.image].shape)
    with torch.no_grad():
        before = graph.run({graph.image: images}, edges)
        for image in range(graph.batch):
            changed = images.clone()
            changed[image] = images[image].flip(-1)
            after = graph.run({graph.image: changed}, edges)
            others = [i for i in range(graph.batch) if i != image]
            for e in edges:
                bound = 1e-9 * float(before[e].abs().max())
                if float((after[e] - before[e])[others].abs().max()) > bound:
                    return False
    return True


def frontier(knowledge: Knowledge) -> tuple[list[str], list[Node]]:
    """Return the known edges that the image reaches first, and the layers before them."""
    graph = knowledge.graph
    if knowledge.value(graph.image) is not None:
        return [graph.image], []
    reached = _reached(knowledge)
    edges = [n for n in reached if knowledge.value(n) is not None]
    told, layers = carried(knowledge, edges), []
    largest = max((float(g.abs().max()) for g in knowledge.gradient.values()), default=0.0)
    for node in (graph.nodes[n] for n in reached if n in told):
        if not node.parameters or node.kind not in _LAYERS:
            continue
        sent = all(p in knowledge.gradient for p in node.parameters)
        alone = not any(p in graph.shared for p in node.parameters)
        # A wrong mask is in the cotangents of the layer and of the scale above it.
        wrong = knowledge.contradicted & {node.name, *node.inputs}
        if sent and alone and not wrong and not _rounded(knowledge, node, largest):
            layers.append(node)
    return edges, layers


_LAYERS = (Kind.CONVOLUTION, Kind.DENSE, Kind.SCALE, Kind.NORMALISATION)


def _rounded(knowledge: Knowledge, node: Node, largest: float) -> bool:
    """Return whether a gradient is rounding: that of a bias before a normalisation."""
    each = [float(knowledge.gradient[p].abs().max()) for p in node.parameters]
    return node.name not in knowledge.cotangents and min(each) <= _ROUNDED_AWAY * largest


def _reached(knowledge: Knowledge) -> list[str]:
    """Return the edges that the image reaches, up to the first that are known."""
    graph, open_, found = knowledge.graph, {knowledge.graph.image}, list[str]()
    for node in graph.nodes.values():
        if any(i in open_ for i in node.inputs):
            found.append(node.name)
            if knowledge.value(node.name) is None:
                open_.add(node.name)
    return found


def carried(knowledge: Knowledge, edges: list[str]) -> set[str]:
    """Return the nodes up to known edges whose cotangent is a continuous function of the image."""
    graph, told = knowledge.graph, set[str]()
    reached = set(_reached(knowledge))
    for name in reversed([n for n in graph.nodes if n in reached]):
        above = graph.consumers[name]
        smooth = all(c in told and _smooth(graph.nodes[c]) for c, _ in above)
        if name in knowledge.cotangents or (above and smooth and name not in edges):
            told.add(name)
    return told


def _smooth(node: Node) -> bool:
    """Return whether an operation's derivative is continuous in its input."""
    if node.kind is Kind.POINTWISE:
        return isinstance(node.target, _SMOOTH) or node.target in _SMOOTH_FUNCTIONS
    return node.kind.affine or node.kind is Kind.NORMALISATION


_SMOOTH = (nn.Tanh, nn.Sigmoid, nn.Softplus, nn.SiLU, nn.GELU, nn.Mish)
_SMOOTH_FUNCTIONS = (
    torch.tanh, F.tanh, torch.sigmoid, F.sigmoid, F.softplus, F.silu, F.gelu, F.mish,
    "tanh", "sigmoid",
)  # fmt: skip


def parameter_gradients(graph: Graph, node: Node, value: Tensor, e: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a layer's parameters at its input, for the cotangent ``e``."""
    own = {name: graph.parameters[name] for name in node.parameters}
    pull = vjp(lambda p: node([value], {**graph.parameters, **p}), own)[1]
    return pull(e)[0]
