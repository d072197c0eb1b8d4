"""Joint matching: the image under a prior that explains everything that is known.

Of a family of priors the one is taken that the evidence prefers, the middle of the image foremost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak.attacks.targets.base import QUASI_LEVEL, Target
from fedleak.errors import TimeLimitError
from fedleak.priors import Prior
from fedleak.priors.gaussian import DENSE_PRIOR
from fedleak.solvers import Gaussian, GaussNewton, Measurements, cgls, lbfgs

#: Quasi-Newton steps before the first Jacobian is taken, and the relative error at which the
#: known values count meanwhile: the prior leads to the right valley.
WARM_UP, WARM_LEVEL = 80, 3e-2
#: Jacobians taken, at most, and the mean square error (in units of the errors allowed) below
#: which the first was good enough: at the solution it is about 0.1.
MOST_JACOBIANS, _MATCHED = 3, 0.5
#: Root mean square error, in units of known errors, above which the truth was not found: there
#: it is 1.
MISSED = 1.2
#: How often the prior of a batch is halved where images miss more than the known errors.
_WEAKER = 3
#: Where values are known better than ``precision``: how much finer they count in the end.
FINE = 1e-3
#: Rows beyond which a Jacobian is not built; of several rounds, as many more as images are small.
DENSE_ROWS = 3 * DENSE_PRIOR
#: Memory for Jacobians and covariances at once, in entries: it sets how many updates are
#: solved together.
_ENTRIES = {"cpu": 3e7, "cuda": 2e9}


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
    chosen : sequence of Prior
        Those priors, where Gauss-Newton followed the evidence; else empty.
    """

    images: Tensor
    solver: str
    priors: list[str]
    hidden: Tensor | None = None
    chosen: Sequence[Prior] = ()


class Several(Prior):
    """The prior of K images that have nothing to do with each other, as one of K C channels."""

    def __init__(self, prior: Prior, count: int):
        channels, *size = prior.shape
        self.prior, self.count = prior, count
        self.shape = (count * channels, size[0], size[1])
        self.mean = prior.mean.expand(prior.shape).repeat(count, 1, 1)
        self.latent_shape = (count, *prior.latent_shape)

    def root(self, u: Tensor) -> Tensor:
        return self.prior.root(u.flatten(0, 1)).reshape(-1, *self.shape)

    def root_adjoint(self, x: Tensor) -> Tensor:
        each = x.reshape(-1, *self.prior.shape)
        return self.prior.root_adjoint(each).reshape(-1, *self.latent_shape)

    def dense(self) -> Gaussian:
        one = self.prior.dense()
        mean, whole = one.mean.repeat(self.count), [one.covariance] * self.count
        return Gaussian(mean, torch.block_diag(*whole))

    def family(self, stage: int = 0) -> Sequence[Prior]:
        return [Several(p, self.count) for p in self.prior.family(stage)]

    def __repr__(self) -> str:
        return repr(self.prior)


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
    rows = DENSE_ROWS if target.rounds == 1 else DENSE_ROWS * DENSE_PRIOR // n
    dense = target.dense and n <= DENSE_PRIOR and m <= rows
    if target.linear and prior.gaussian and not dense:
        return _least_squares(target, prior, start, precision)
    if not prior.gaussian or batch > 1 or not dense or target.hidden:
        rough = _quasi_newton(target, prior, start, steps, max(precision, QUASI_LEVEL))
        few = dense and n * m <= _ENTRIES[start.device.type]
        if prior.gaussian and batch > 1 and few and target.calibrated and not target.hidden:
            return _sharpened(target, prior, rough, precision)
        return rough
    budget = _ENTRIES[start.device.type] / (m * n + 2 * n * n + 9 * min(m, n) ** 2)
    parts = torch.arange(len(target), device=start.device).split(max(1, int(budget)))
    found = [_gauss_newton(target.subset(i), prior, start[i], precision) for i in parts]
    return Match(
        torch.cat([f.images for f in found]), "gauss-newton", [p for f in found for p in f.priors],
        chosen=[p for f in found for p in f.chosen],
    )  # fmt: skip


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
    for _ in range(_WEAKER if target.calibrated and batch > 1 and not target.hidden else 0):
        # Known errors are 1 at the truth (Morozov's principle): else the prior counts too much.
        missed = (target.misfit(images(u), level) > 1).unsqueeze(1)
        if not bool(missed.any()):
            break
        errors = torch.where(missed, target.errors.minimum(errors) / 2, errors).clamp_min(level)
        found, _ = lbfgs(objective, u, steps)
        u = torch.where(missed, found, u)
    return Match(images(u).detach(), "l-bfgs", [str(prior)] * count, u[:, size:])


def _sharpened(target: Target, prior: Prior, found: Match, precision: float) -> Match:
    """Take the batches on whose errors are known better than quasi-Newton steps can use.

    From where these came to, by Jacobians: kept where the update is explained better. On weights
    of four digits under ``dp:clip=1,noise=0.0001`` that is 57 dB instead of 43, of 56 predicted.
    """
    missed = target.misfit(found.images, precision)
    fine = (target.errors.median(1).values < QUASI_LEVEL) & (missed > MISSED)
    images, priors = found.images.clone(), list(found.priors)
    for n in fine.nonzero().flatten().tolist():
        part, begin = target.subset(fine.new_tensor([n], dtype=torch.int64)), found.images[n, None]
        try:
            solver, _, chosen = posterior(
                part, Several(prior, begin.shape[1]), begin, precision, begin
            )
        except TimeLimitError:
            break
        made = solver.x.reshape(begin.shape)
        if float(part.misfit(made, precision)[0]) < float(missed[n]):
            images[n], priors[n] = made[0], str(chosen[0])
    return replace(found, images=images, priors=priors)


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
    begin = None if target.linear else _warm(target, prior, start, precision)
    try:
        solver, _, chosen = posterior(target, prior, start, precision, begin)
    except TimeLimitError:
        so_far = start if begin is None else begin
        return Match(so_far, "l-bfgs", [str(prior)] * len(start))
    images, priors = solver.x.reshape(start.shape), list(chosen)
    found = Match(images, "gauss-newton", [str(p) for p in priors], chosen=priors)
    if not target.calibrated or target.linear:
        return found
    # A confident model is far from linear: from the prior's mean some end in a wrong valley.
    missed = target.misfit(images, precision)
    lost = (missed > MISSED).nonzero().flatten()
    if len(lost):
        part = target.subset(lost)
        try:
            solver, _, chosen = posterior(part, prior, start[lost], precision, start[lost])
        except TimeLimitError:
            return found
        again = solver.x.reshape(-1, *start.shape[1:])
        better = part.misfit(again, precision) < missed[lost]
        images[lost[better]] = again[better]
        for i in better.nonzero().flatten().tolist():
            priors[int(lost[i])] = chosen[i]
    return replace(found, priors=[str(p) for p in priors])


def posterior(
    target: Target, prior: Prior, start: Tensor, precision: float, begin: Tensor | None = None
) -> tuple[GaussNewton, Measurements, list[Prior]]:
    """Return the solver at the most probable images, the measurements, and the priors chosen.

    It begins at ``begin``; else, where the images act on the target in other than linear ways,
    where a quasi-Newton solver came to from the prior's mean.

    Raises
    ------
    TimeLimitError
        If the time allowed passes while a Jacobian is taken.
    """

    def residual(x: Tensor) -> Tensor:
        return target.made(x.reshape(start.shape)) - target.values

    errors = target.errors.clamp_min(precision)
    if begin is None and not target.linear:
        begin = _warm(target, prior, start, precision)
    first = (start if begin is None else begin).flatten(1)
    solver = GaussNewton(residual, first, target.constant_jacobian())
    level = target.errors.clamp_min(QUASI_LEVEL)
    chosen = _follow_evidence(solver, [prior] * len(start), level, (0, 1))
    expected = Gaussian.stack([p.dense() for p in chosen])
    for n in range(MOST_JACOBIANS + 1):
        measured = solver.descend(expected, errors)
        matched = ((residual(solver.x) / errors).square().mean(1) < _MATCHED).all()
        if target.linear or n == MOST_JACOBIANS or bool(matched):
            break
        solver.linearise()
    if target.calibrated and not target.linear and any(len(p.family(2)) > 1 for p in chosen):
        # Only now: from afar, what rough images would explain is the curvature of the model.
        solver.linearise()
        chosen = _follow_evidence(solver, chosen, level, (2,))
        expected = Gaussian.stack([p.dense() for p in chosen])
        measured = solver.descend(expected, errors)
    if target.calibrated and not target.linear and bool((target.errors < precision).any()):
        solver.linearise()
        measured = solver.descend(expected, target.errors.clamp_min(FINE * precision))
    if type(prior).local is not Prior.local:
        covariances = measured.covariance()
        near = [p.local(x, v) for p, x, v in zip(chosen, solver.x, covariances, strict=True)]
        del measured, covariances
        measured = solver.descend(Gaussian.stack(near), errors)
    return solver, measured, chosen


def _warm(target: Target, prior: Prior, start: Tensor, precision: float) -> Tensor:
    """Return where a quasi-Newton solver comes to from the prior's mean: the right valley."""
    level = max(precision, WARM_LEVEL)
    return _quasi_newton(target, prior, start, WARM_UP, level).images


def _focus(prior: Prior, like: Tensor) -> Tensor:
    """Return the weight of every pixel where evidence is weighed: the middle stands for all."""
    _, *size = prior.shape
    y, x = (torch.linspace(-1, 1, k).to(like) for k in size)
    return (2 - y.square()[:, None] - x.square()).expand(prior.shape).flatten()


def _follow_evidence(
    solver: GaussNewton, priors: list[Prior], errors: Tensor, stages: tuple[int, ...]
) -> list[Prior]:
    """Return, for each update, the prior of the family that its evidence prefers."""
    focus = _focus(priors[0], errors)
    known: dict[Gaussian, Tensor] = {}  # the chosen one is among the next stage's
    for stage in stages:
        chosen = list(priors)
        for prior in {id(p): p for p in priors}.values():
            family = prior.family(stage)
            if len(family) > 1:
                best = solver.choose([p.dense() for p in family], errors, focus, known).tolist()
                for i, k in enumerate(best):
                    chosen[i] = family[k] if priors[i] is prior else chosen[i]
        priors = chosen
    return priors
