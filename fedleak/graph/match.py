"""The image from what is known above it: forwards, under a prior.

What an edge holds is a continuous function of the image; the gradient of a network with ReLU is
not. So the image is first matched to known values, by a quasi-Newton solver over falling
error levels and then by Gauss-Newton, in coordinates that the prior whitens. Pixels are not
clamped: brightness and contrast may still be open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp

from fedleak import deadline
from fedleak.graph.capture import Graph, Node
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge
from fedleak.priors import Prior
from fedleak.solvers import cgls, lbfgs

#: Relative errors at which known values count, one after the other.
LEVELS = (1e-1, 1e-2, 1e-3)
#: Gauss-Newton steps, at most; each must lower the misfit to this part of it.
MOST_NEWTON, _PAYS = 8, 0.9
#: Misfit, in units of the errors, at which all is said.
_MATCHED = 2.0

#: Is told the misfit and the images of each stage.
Watch = Callable[[float, Tensor], None]


@dataclass
class Targets:
    """What the image must reproduce.

    Attributes
    ----------
    edges : list of str
        Edges whose values are known everywhere, reached from the image first.
    layers : list of Node
        Layers below them whose cotangent is known, and whose gradient so is linear in their
        input.
    values, errors : Tensor, shape (m,)
        What is known, each tensor in units of its root mean square, and its relative error.
    """

    knowledge: Knowledge
    edges: list[str]
    layers: list[Node]
    values: Tensor
    errors: Tensor
    sizes: list[float]

    @classmethod
    def read(cls, knowledge: Knowledge) -> Targets:
        """Return what lies nearest to the image of all that is known."""
        edges, layers = frontier(knowledge)
        known = [knowledge.values[e] for e in edges]
        tensors = [k.value for k in known]
        errors = [k.relative for k in known]
        for node in layers:
            for name in node.parameters:
                tensors.append(knowledge.gradient[name])
                errors.append(max(knowledge.cotangents[node.name].relative, ROUNDING))
        sizes = [float(t.square().mean().sqrt()) for t in tensors]
        sizes = [s if s > 0 else 1.0 for s in sizes]
        if not tensors:
            return cls(knowledge, edges, layers, torch.empty(0), torch.empty(0), sizes)
        values = torch.cat([t.flatten() / s for t, s in zip(tensors, sizes, strict=True)])
        spread = [t.new_full((t.numel(),), e) for t, e in zip(tensors, errors, strict=True)]
        return cls(knowledge, edges, layers, values, torch.cat(spread), sizes)

    def made(self, images: Tensor, graph: Graph | None = None) -> Tensor:
        """Return what images, shape (B, C, H, W), make of it, shape (m,)."""
        graph = self.knowledge.graph if graph is None else graph
        inputs = [node.inputs[0] for node in self.layers]
        edges = graph.run({graph.image: images}, [*self.edges, *inputs])
        tensors = [edges[e] for e in self.edges]
        for node in self.layers:
            e = self.knowledge.cotangents[node.name].value.to(images)
            found = parameter_gradients(graph, graph.nodes[node.name], edges[node.inputs[0]], e)
            tensors += [found[name] for name in node.parameters]
        return torch.cat([t.flatten() / s for t, s in zip(tensors, self.sizes, strict=True)])


def frontier(knowledge: Knowledge) -> tuple[list[str], list[Node]]:
    """Return the known edges that the image reaches first, and the layers before them."""
    graph = knowledge.graph
    reached, edges, layers = {graph.image}, [], []
    for node in graph.nodes.values():
        if not any(i in reached for i in node.inputs):
            continue
        if node.kind in (Kind.CONVOLUTION, Kind.DENSE, Kind.SCALE) and node.parameters:
            sent = all(p in knowledge.gradient for p in node.parameters)
            alone = not any(p in graph.shared for p in node.parameters)
            if node.name in knowledge.cotangents and sent and alone:
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


def match_images(
    knowledge: Knowledge, prior: Prior, steps: int = 150, watch: Watch | None = None
) -> Tensor:
    """Find the images that make what is known.

    Parameters
    ----------
    knowledge : Knowledge
    prior : Prior
    steps : int
        Quasi-Newton evaluations at each level, at most.
    watch : callable, optional
        Is given the misfit and the images after each stage.

    Returns
    -------
    Tensor, shape (B, C, H, W)
    """
    search = _Search(Targets.read(knowledge), prior)
    u, misfit = search.start(), math.inf

    def report() -> None:
        if watch is not None:
            watch(misfit, search.images(u).detach())

    for level in LEVELS:
        u = search.quasi_newton(u, level, steps)
        misfit = search.misfit(u)
        report()
        if misfit < _MATCHED:
            break
    for _ in range(MOST_NEWTON):
        if misfit < _MATCHED or deadline.passed():
            break
        u = search.gauss_newton(u)
        before, misfit = misfit, search.misfit(u)
        report()
        if misfit > _PAYS * before:
            break
    return search.images(u).detach()


class _Search:
    """Images as ``mean + B P w``: ``B`` of the prior, ``P`` what the data make of it."""

    def __init__(self, targets: Targets, prior: Prior):
        self.targets, self.prior = targets, prior
        graph = targets.knowledge.graph
        self.batch = graph.batch
        self.latent = (self.batch, *prior.latent_shape)

    def start(self) -> Tensor:
        return self.targets.values.new_zeros(self.latent)

    def images(self, u: Tensor) -> Tensor:
        return self.prior.image(u)

    def made(self, u: Tensor) -> Tensor:
        return self.targets.made(self.images(u))

    def misfit(self, u: Tensor) -> float:
        """Return how far off the known values are, in units of their errors."""
        with torch.no_grad():
            rest = (self.made(u) - self.targets.values) / self.targets.errors
        return float(rest.square().mean().sqrt())

    def weight(self, u: Tensor, errors: Tensor) -> float:
        """Return how much the data tell of a pixel, its inverse variance, on average."""
        generator = torch.Generator().manual_seed(0)
        x = self.images(u).detach()
        z = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        moved = jvp(self.targets.made, (x,), (z,))[1]
        return float((moved / errors).square().sum() / z.square().sum())

    def quasi_newton(self, u: Tensor, level: float, steps: int) -> Tensor:
        errors = self.targets.errors.clamp_min(level)
        weight, size = self.weight(u, errors), u.numel()

        def objective(w: Tensor) -> tuple[Tensor, Tensor]:
            w = w.detach().requires_grad_()
            u = self.prior.damped(w.reshape(self.latent), weight)
            rest = (self.made(u) - self.targets.values) / errors
            value = (rest.square().sum() + u.square().sum()) / (2 * size)
            (gradient,) = torch.autograd.grad(value, w)
            return value.detach()[None], gradient

        w = self.prior.damped(u, weight, 0.5).reshape(1, -1)
        w, _ = lbfgs(objective, w, steps)
        return self.prior.damped(w.reshape(self.latent), weight)

    def gauss_newton(self, u: Tensor, iterations: int = 100) -> Tensor:
        """Take one Gauss-Newton step, by conjugate gradients on products with the Jacobian."""
        u = u.detach()
        rest, misfit = self.targets.values - self.made(u), self.misfit(u)
        level = float(rest.square().mean().sqrt())
        errors = self.targets.errors.clamp_min(min(1e-3, 0.1 * level))
        weight = self.weight(u, errors)
        pull = vjp(self.made, u)[1]

        def apply(w: Tensor) -> tuple[Tensor, ...]:
            d = self.prior.damped(w[0], weight)
            return (jvp(self.made, (u,), (d,))[1] / errors)[None], d[None]

        def adjoint(rows: tuple[Tensor, ...]) -> Tensor:
            d = pull(rows[0][0] / errors)[0].detach() + rows[1][0]
            return self.prior.damped(d, weight)[None]

        rhs = ((rest / errors)[None], -u[None])
        with torch.no_grad():
            w, _ = cgls(apply, adjoint, rhs, torch.zeros_like(u)[None], 1e-5, iterations)
            step = self.prior.damped(w[0], weight)
            for scale in (1.0, 0.5, 0.25, 0.1):
                if self.misfit(u + scale * step) < misfit:
                    return u + scale * step
        return u
