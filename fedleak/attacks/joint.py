"""Joint matching: the image under a prior that explains everything that is known."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak.attacks.evidence import Evidence
from fedleak.attacks.linear import LinearSolution
from fedleak.attacks.statistics import batch_statistics
from fedleak.priors import Prior
from fedleak.priors.gaussian import DENSE_UNKNOWNS
from fedleak.solvers import Gaussian, GaussNewton, Measurements, cgls, lbfgs

#: Quasi-Newton steps before the first Jacobian is taken, and the relative error at which the
#: known values count meanwhile: the prior leads to the right valley.
WARM_UP, WARM_LEVEL = 80, 3e-2
#: Jacobians taken, at most, and the mean square error (in units of the errors allowed) below
#: which the first was good enough: at the solution it is about 0.1.
MOST_JACOBIANS, _MATCHED = 3, 0.5
#: The same where there is no Jacobian, and where evidence is weighed.
QUASI_LEVEL = 1e-2
#: Variances of the prior between which the evidence decides where errors are known.
SCALES = (0.25, 1.0, 2.0, 4.0)
#: Width of the soft sign, in mean magnitudes, and the error that signs count with.
SOFT, SOFT_ERROR = 0.5, 0.2
#: Where some values are exact: how much finer they count in the end, after how many Jacobians.
FINE, POLISH = 1e-3, 1
#: Rows beyond which a Jacobian is not built.
DENSE_ROWS = 3 * DENSE_UNKNOWNS
#: Memory for Jacobians and covariances at once, in entries: it sets how many updates are
#: solved together.
_ENTRIES = {"cpu": 3e7, "cuda": 2e9}


class Target(ABC):
    """What candidate images must reproduce, for N updates.

    Attributes
    ----------
    values : Tensor, shape (N, m)
        The known values, each tensor divided by its root mean square.
    errors : Tensor, shape (N, m)
        Standard deviations that they are known with, in the same units.
    """

    values: Tensor
    errors: Tensor
    #: Whether what images make is affine in them: one Jacobian is then enough.
    linear: bool = False
    #: Whether the errors are known, and not only estimated from the update.
    calibrated: bool = False
    #: Whether a Jacobian says enough to step by.
    dense: bool = True
    #: Unknowns of each update beside its images: standard normal before anything is known.
    hidden: int = 0

    def __len__(self) -> int:
        return len(self.values)

    def _known(self, values: list[Tensor], errors: list[Tensor]) -> None:
        """Set ``values`` and ``errors``; a tensor that is all zero says nothing.

        Nor does an entry of infinite error: what no update tells is left out.
        """
        told = [e.expand_as(v).flatten(1).isfinite() for e, v in zip(errors, values, strict=True)]
        sizes = [
            (torch.where(t, v.flatten(1), 0.0).square().sum(1, keepdim=True)
             / t.sum(1, keepdim=True).clamp_min(1)).sqrt()
            for t, v in zip(told, values, strict=True)
        ]  # fmt: skip
        self._sizes = [torch.where(s > 0, s, torch.inf) for s in sizes]
        any_told = torch.cat(told, 1).any(0)
        self._kept = None if bool(any_told.all()) else any_told.nonzero().flatten()
        self.values = self._joined(values)
        known = [
            torch.where(t, e.expand_as(v).flatten(1), 0.0)
            for t, e, v in zip(told, errors, values, strict=True)
        ]
        lost = self._joined(
            [
                torch.where(t, 0.0, torch.inf) * s.clamp(max=1.0)
                for t, s in zip(told, self._sizes, strict=True)
            ]
        ).nan_to_num(torch.inf)
        self.errors = self._joined(known) + lost

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        rows = [t.flatten(1) / s for t, s in zip(tensors, self._sizes, strict=True)]
        joined = torch.cat(rows, 1)
        return joined if self._kept is None else joined[:, self._kept]

    @abstractmethod
    def made(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return what ``images``, shape (N, B, C, H, W), make of it, shape (N, m)."""

    @abstractmethod
    def subset(self, index: Tensor) -> Target:
        """Return the part of the updates in ``index``."""


class ChainTarget(Target):
    """Known values above the first ``depth`` layers of a chain, and the gradients below.

    With ``exact`` the backward pass starts from what is known there; else from the image's
    own logits.
    """

    def __init__(self, evidence: Evidence, solution: LinearSolution, depth: int, exact: bool):
        self.evidence, self.solution = evidence, solution
        self.depth, self.exact = depth, exact
        self.calibrated = evidence.defended and not exact
        self.linear = exact and depth <= 1
        names = {layer.name for layer in evidence.chain.layers[:depth]}
        self.names = [n for n in evidence.gradient if n.rpartition(".")[0] in names]
        gradients = [evidence.gradient[n] for n in self.names]
        noise = solution.noise_below(depth)

        def error(name: str) -> Tensor:
            g = evidence.gradient[name]
            if evidence.defended:
                return evidence.errors[name]
            size = g.flatten(1).square().mean(1).sqrt() * noise
            return size.reshape(-1, *[1] * (g.dim() - 1))

        self._known(
            [self._together(solution.values[depth]), *gradients],
            [self._together(solution.deviations[depth]), *(error(n) for n in self.names)],
        )

    def _together(self, each: Tensor) -> Tensor:
        """Return values of (N * B, ...) as (N, B, ...)."""
        return each.unflatten(0, (-1, self.evidence.images))

    def made(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        chain = self.evidence.chain
        inputs = chain.features(images.flatten(0, 1), self.depth)
        if self.exact:
            above = self.solution.cotangents[self.depth]
        else:
            logits = chain.head.forward(inputs[-1])
            labels = F.one_hot(self.evidence.labels.flatten(), logits.shape[1])
            e = (logits.softmax(1) - labels) / self.evidence.images
            above = chain.head.backward(inputs[-1], logits, e)
        gradients = chain.backward(inputs, above).gradients
        shared = [self._together(gradients[n]).sum(1) for n in self.names]
        return self._joined([self._together(inputs[-1]), *shared])

    def subset(self, index: Tensor) -> ChainTarget:
        part = self.evidence.subset(index), self.solution.subset(index)
        return ChainTarget(*part, self.depth, self.exact)


class ModuleTarget(Target):
    """Every gradient of any torch module, and the head's input where it is known."""

    def __init__(self, evidence: Evidence):
        self.evidence = evidence
        self.names = list(evidence.gradient)
        known = list(evidence.gradient.values())
        self.features = _head_input(evidence)
        known += [] if self.features is None else [self.features]
        known += evidence.statistics.values()
        errors = [torch.zeros_like(k) for k in known]
        self.calibrated = evidence.defended
        if evidence.defended:
            errors[: len(self.names)] = [evidence.errors[n] for n in self.names]
        self._known(known, errors)

    def made(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        replayed = self.evidence.replay(images, self.evidence.labels)
        made = [replayed.gradients[n] for n in self.names]
        if self.features is not None:
            assert replayed.head_input is not None
            made.append(replayed.head_input)
        names = list(self.evidence.statistics)
        if names:
            made += batch_statistics(self.evidence.replay, images, names).values()
        joined = self._joined(made)
        if not self.evidence.rescales:
            return joined
        weight = self.errors.clamp_min(QUASI_LEVEL) ** -2
        factor = (weight * joined * self.values).sum(1) / (weight * joined.square()).sum(1)
        return joined * factor.clamp_min(1e-12).unsqueeze(1)  # that of clipping, unknown

    def subset(self, index: Tensor) -> ModuleTarget:
        return ModuleTarget(self.evidence.subset(index))


class SignTarget(ModuleTarget):
    """The signs of every gradient, where a defence leaves no more.

    Of images' own gradient, each tensor is divided by its mean magnitude, so that no scale is
    compared, and a soft step takes the place of the sign: entries near zero may well have the
    other one.
    """

    dense = False

    def __init__(self, evidence: Evidence):
        super().__init__(evidence)
        self.values = self.values.sign()
        self.errors = torch.full_like(self.values, SOFT_ERROR)

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        sizes = [t.flatten(1).abs().mean(1, keepdim=True).clamp_min(1e-300) for t in tensors]
        rows = [(t.flatten(1) / s / SOFT).tanh() for t, s in zip(tensors, sizes, strict=True)]
        joined = torch.cat(rows, 1)
        return joined if self._kept is None else joined[:, self._kept]

    def made(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        replayed = self.evidence.replay(images, self.evidence.labels)
        return self._joined([replayed.gradients[n] for n in self.names])

    def subset(self, index: Tensor) -> SignTarget:
        return SignTarget(self.evidence.subset(index))


def _head_input(evidence: Evidence) -> Tensor | None:
    """Return the input of a fully connected head, exact for one image: ``G = g x^T``."""
    head = evidence.replay.head
    if head is None or evidence.images > 1 or evidence.defended:
        return None
    bias = evidence.gradient.get(f"{head}.bias")
    weight = evidence.gradient.get(f"{head}.weight")
    if bias is None or weight is None:
        return None
    total = bias.square().sum(1, keepdim=True).clamp_min(1e-300)
    return (torch.einsum("nc,ncf->nf", bias, weight) / total).unsqueeze(1)


@dataclass
class Match:
    """The image that a prior and the target agree on.

    Attributes
    ----------
    images : Tensor, shape (N, B, C, H, W)
    solver : str
        ``gauss-newton``, ``least squares`` or ``l-bfgs``.
    priors : list of str
        The prior of each update, with what its evidence chose.
    hidden : Tensor or None, shape (N, target.hidden)
        What was found of the target's other unknowns.
    """

    images: Tensor
    solver: str
    priors: list[str]
    hidden: Tensor | None = None


def match(
    target: Target, prior: Prior, start: Tensor, batch: int, steps: int, precision: float
) -> Match:
    """Find the most probable images.

    Parameters
    ----------
    target : Target
    prior : Prior
    start : Tensor, shape (N, B, C, H, W)
        Says shape and device; what is linear is solved from here, the rest from the prior's mean.
    batch : int
        Images B behind each update.
    steps : int
        Evaluations of the quasi-Newton solver, at most.
    precision : float
        Relative error at which a value counts as matched, at least.
    """
    n, m = batch * math.prod(prior.shape), target.values.shape[1]
    dense = target.dense and n <= DENSE_UNKNOWNS and m <= DENSE_ROWS
    if target.linear and prior.gaussian and not dense:
        return _least_squares(target, prior, start, precision)
    if not prior.gaussian or batch > 1 or not dense or target.hidden:
        return _quasi_newton(target, prior, start, steps, max(precision, QUASI_LEVEL))
    budget = _ENTRIES[start.device.type] / (m * n + 2 * n * n + 9 * min(m, n) ** 2)
    parts = torch.arange(len(target), device=start.device).split(max(1, int(budget)))
    found = [_gauss_newton(target.subset(i), prior, start[i], precision) for i in parts]
    return Match(
        torch.cat([f.images for f in found]), "gauss-newton", [p for f in found for p in f.priors]
    )


def _quasi_newton(target: Target, prior: Prior, start: Tensor, steps: int, level: float) -> Match:
    """Match in whitened coordinates, where ``||u||^2`` is the prior and the preconditioner."""
    count, batch = start.shape[:2]
    errors = target.errors.clamp_min(level)

    size = batch * math.prod(prior.latent_shape)

    def images(u: Tensor) -> Tensor:
        return prior.image(u[:, :size].reshape(-1, *prior.latent_shape)).reshape(start.shape)

    def objective(u: Tensor) -> tuple[Tensor, Tensor]:
        u = u.detach().requires_grad_()
        hidden = u[:, size:]
        data = ((target.made(images(u), hidden) - target.values) / errors).square().sum(1)
        energy = prior.energy(u[:, :size].reshape(count * batch, -1)).reshape(count, batch).sum(1)
        value = (data + energy + hidden.square().sum(1)) / (2 * size)
        (gradient,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), gradient

    # Images of one label would stay the same image if they all began as one.
    generator = torch.Generator().manual_seed(0)
    u = 0.1 * torch.randn(size, generator=generator, dtype=torch.float64) * (batch > 1)
    u = F.pad(u, (0, target.hidden)).to(start).expand(count, -1).clone()
    u, _ = lbfgs(objective, u, steps)
    return Match(images(u).detach(), "l-bfgs", [str(prior)] * count, u[:, size:])


def _least_squares(target: Target, prior: Prior, start: Tensor, precision: float) -> Match:
    """Match what is linear in the images, at any size: least squares for ``u``, no matrix."""
    errors = target.errors.clamp_min(precision)
    mean = prior.mean.expand(start.shape)
    at_mean = target.made(mean)

    def apply(u: Tensor) -> tuple[Tensor, ...]:
        made = target.made(mean + prior.root(u.flatten(0, 1)).reshape(start.shape))
        return (made - at_mean) / errors, u

    def adjoint(rows: tuple[Tensor, ...]) -> Tensor:
        x = mean.clone().requires_grad_()
        (back,) = torch.autograd.grad(target.made(x), x, rows[0] / errors)
        return prior.root_adjoint(back.flatten(0, 1)).reshape(u.shape) + rows[1]

    u = start.new_zeros(*start.shape[:2], *prior.latent_shape)
    rhs = ((target.values - at_mean) / errors, u)
    u, _ = cgls(apply, adjoint, rhs, u, tolerance=1e-6, max_iterations=1500)
    images = prior.image(u.flatten(0, 1)).reshape(start.shape)
    return Match(images, "least squares", [str(prior)] * len(start))


def _gauss_newton(target: Target, prior: Prior, start: Tensor, precision: float) -> Match:
    """Match by Gauss-Newton, the prior following the evidence of each update."""
    solver, _, chosen = posterior(target, prior, start, precision)
    return Match(solver.x.reshape(start.shape), "gauss-newton", [str(p) for p in chosen])


def posterior(
    target: Target, prior: Prior, start: Tensor, precision: float
) -> tuple[GaussNewton, Measurements, list[Prior]]:
    """Return the solver at the most probable images, the measurements, and the priors chosen."""

    def residual(x: Tensor) -> Tensor:
        return target.made(x.reshape(start.shape)) - target.values

    begin, errors = start, target.errors.clamp_min(precision)
    if not target.linear:
        begin = _quasi_newton(target, prior, start, WARM_UP, max(precision, WARM_LEVEL)).images
    solver = GaussNewton(residual, begin.flatten(1))
    chosen = _follow_evidence(
        solver,
        [prior] * len(start),
        target.errors.clamp_min(QUASI_LEVEL),
        3 if target.calibrated else 2,
    )
    if target.calibrated:
        # A prior of s times the variance is one of errors smaller by the root of s.
        scale = _scale(solver, chosen, errors)
        errors = errors / scale.sqrt().unsqueeze(1)
    for n in range(MOST_JACOBIANS + 1):
        measured = solver.descend(Gaussian.stack([p.dense() for p in chosen]), errors)
        matched = ((residual(solver.x) / errors).square().mean(1) < _MATCHED).all()
        if target.linear or n == MOST_JACOBIANS or bool(matched):
            break
        solver.linearise()
    if target.calibrated and not target.linear and bool((target.errors < FINE * precision).any()):
        for _ in range(POLISH):
            solver.linearise()
            fine = target.errors.clamp_min(FINE * precision) / scale.sqrt().unsqueeze(1)
            measured = solver.descend(Gaussian.stack([p.dense() for p in chosen]), fine)
    if type(prior).local is not Prior.local:
        covariances = measured.covariance()
        near = [p.local(x, v) for p, x, v in zip(chosen, solver.x, covariances, strict=True)]
        del measured, covariances
        measured = solver.descend(Gaussian.stack(near), errors)
    return solver, measured, chosen


def _focus(prior: Prior, like: Tensor) -> Tensor:
    """Return the weight of every pixel where evidence is weighed: the middle stands for all."""
    _, *size = prior.shape
    y, x = (torch.linspace(-1, 1, k).to(like) for k in size)
    return (2 - y.square()[:, None] - x.square()).expand(prior.shape).flatten()


def _scale(solver: GaussNewton, chosen: list[Prior], errors: Tensor) -> Tensor:
    """Return the scale of each update's prior, shape (N,)."""
    prior = Gaussian.stack([p.dense() for p in chosen])
    return solver.scale(prior, errors, _focus(chosen[0], errors), SCALES)


def _follow_evidence(
    solver: GaussNewton, priors: list[Prior], errors: Tensor, stages: int
) -> list[Prior]:
    """Return, for each update, the prior of the family that its evidence prefers."""
    focus = _focus(priors[0], errors)
    for stage in range(stages):
        chosen = list(priors)
        for prior in {id(p): p for p in priors}.values():
            family = prior.family(stage)
            if len(family) > 1:
                best = solver.choose([p.dense() for p in family], errors, focus).tolist()
                for i, k in enumerate(best):
                    chosen[i] = family[k] if priors[i] is prior else chosen[i]
        priors = chosen
    return priors
