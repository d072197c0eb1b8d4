"""Linear systems where they are solvable, gradient matching under a prior elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.attacks.base import ATTACKS, Reconstruction
from fedleak.attacks.evidence import Evidence, relative
from fedleak.attacks.linear import (
    CLEAN,
    LinearSolution,
    package,
    row_deviations,
    solve_layer,
    solve_recursively,
)
from fedleak.errors import InvalidInputError
from fedleak.observation import Observation
from fedleak.priors import GaussianPrior
from fedleak.solvers import cgls, lbfgs
from fedleak.systems import Affine, Rows

#: Two fits below this are equally good: both are within the rounding of float32.
_ROUNDED = 1e-6
#: Least squares fits the noise too: under noise the prior may cost this much of the fit, and
#: any fit within twice the noise is a good one (the discrepancy principle).
_SLACK = 1.1
#: How near to the 8-bit grid, in steps of it, every pixel must come to be rounded.
_ON_GRID = 0.1


@ATTACKS.register("hybrid")
@dataclass(frozen=True)
class HybridAttack:
    """Linear systems from the head down, then joint matching in whitened coordinates.

    Layers are solved exactly, from the head down, as long as their systems have full rank.
    What is left, the image and the layers up to the first deficient one, is matched
    jointly: minimise the relative error of the known values and of every gradient, plus
    ``||u||^2`` for the image ``mean + B u`` of a Gaussian prior. Where only the first
    convolution is left this is linear, and solved as such. Under noise deeper networks are
    matched as a whole, with the noise level estimated from the update itself. The result
    never fits a clean gradient worse than the linear one, and a noisy one hardly. An image
    that comes out on the grid of 8-bit pixels is rounded to it: all pixels of a wrong image
    do not lie there by chance.

    Parameters
    ----------
    steps : int
        Evaluations of the matching objective, at most.
    precision : float
        Relative error at which a tensor counts as matched; noise raises it.
    mean, sigma, rho, colour : float
        The prior, see :class:`fedleak.priors.GaussianPrior`.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    """

    steps: int = 600
    precision: float = 3e-4
    mean: float = 0.5
    sigma: float = 0.25
    rho: float = 0.96
    colour: float = 0.93
    device: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise InvalidInputError(f"steps must be a whole number above 0, not {self.steps!r}")
        for name in ("precision", "mean", "sigma", "rho", "colour"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InvalidInputError(f"{name} must be a finite number, not {value!r}")
        if self.precision <= 0 or self.sigma <= 0:
            raise InvalidInputError(
                f"precision ({self.precision}) and sigma ({self.sigma}) must be above 0"
            )
        for name in ("rho", "colour"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must lie in [0, 1), not {getattr(self, name)}")

    def __call__(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        evidence = Evidence.gather(observations, self.device)
        solution = solve_recursively(evidence)
        images, by = solution.image.clone(), ["linear"] * len(evidence)
        clean = solution.noise < CLEAN
        depth = solution.undetermined(evidence.chain.layers)
        for mask, known in ((clean, True), (~clean, False)):
            if not bool(mask.any()) or (known and depth == 0):
                continue
            part = evidence.subset(mask)
            matched = self._match(part, solution.subset(mask), depth if known else None)
            bound = part.fit(images[mask]).clamp_min(_ROUNDED)
            if not known:
                bound = torch.maximum(_SLACK * bound, 2 * solution.noise[mask])
            better = part.fit(matched) <= bound
            chosen = better.reshape(-1, 1, 1, 1)
            images[mask] = torch.where(chosen, matched, images[mask])
            for n, good in zip(mask.nonzero().flatten().tolist(), better.tolist(), strict=True):
                by[n] = "matching" if good else "linear"
        return package(evidence, _snap(evidence, images), solution, by)

    def _match(self, evidence: Evidence, solution: LinearSolution, depth: int | None) -> Tensor:
        """Match the first ``depth`` layers to what is known above; all of them if None."""
        chain = evidence.chain
        prior = GaussianPrior(
            chain.input_shape,  # type: ignore[arg-type]
            mean=self.mean,
            sigma=self.sigma,
            rho=self.rho,
            colour=self.colour,
            device=chain.device,
        )
        first = chain.layers[0] if chain.layers else None
        if solution.undetermined(chain.layers) <= 1 and isinstance(first, Affine):
            image = prior.image(_posterior(first, evidence, solution, prior, self.precision))
            return image if depth is None else _exact_fit(first, evidence, solution, image)
        residuals = _residuals(evidence, solution, depth, self.precision)

        def objective(u: Tensor) -> tuple[Tensor, Tensor]:
            u = u.detach().requires_grad_()
            x = prior.image(u.reshape(-1, *prior.latent_shape))
            data = torch.stack([r.square().sum(1) for r in residuals(x)]).sum(0)
            value = (data + u.square().sum(1)) / (2 * u.shape[1])
            (gradient,) = torch.autograd.grad(value.sum(), u)
            return value.detach(), gradient

        size = math.prod(prior.latent_shape)
        start = torch.zeros(len(evidence), size, dtype=torch.float64, device=chain.device)
        u, _ = lbfgs(objective, start, self.steps)
        return prior.image(u.reshape(-1, *prior.latent_shape))


def _snap(evidence: Evidence, images: Tensor, levels: int = 255) -> Tensor:
    """Round images that lie on the grid of 8-bit pixels, where the gradient agrees."""
    rounded = (images * levels).round() / levels
    near = (images - rounded).flatten(1).abs().amax(1) < _ON_GRID / levels
    if not bool(near.any()):
        return images
    agrees = evidence.fit(rounded) <= evidence.fit(images).clamp_min(_ROUNDED)
    return torch.where((near & agrees).reshape(-1, 1, 1, 1), rounded, images)


def _residuals(
    evidence: Evidence, solution: LinearSolution, depth: int | None, precision: float
) -> Callable[[Tensor], list[Tensor]]:
    """Return ``images -> residuals``, each in units of its own standard deviation."""
    chain, gradient = evidence.chain, evidence.gradient

    def scale(name: str) -> Tensor:
        # Noise nu relative to an entry's size is nu / sqrt(n) relative to the tensor's norm.
        entries = gradient[name][0].numel()
        return (solution.noise / math.sqrt(entries)).clamp_min(precision).unsqueeze(1)

    def known_above(x: Tensor) -> list[Tensor]:
        assert depth is not None
        inputs = chain.features(x, depth)
        made = chain.backward(inputs, solution.cotangents[depth]).gradients
        terms = [relative(g, gradient[k]) / scale(k) for k, g in made.items()]
        return [relative(inputs[-1], solution.values[depth]) / precision, *terms]

    def whole(x: Tensor) -> list[Tensor]:
        made = chain.trace(x, evidence.labels[:, 0]).gradients
        return [relative(g, gradient[k]) / scale(k) for k, g in made.items()]

    return whole if depth is None else known_above


def _posterior(
    layer: Affine,
    evidence: Evidence,
    solution: LinearSolution,
    prior: GaussianPrior,
    precision: float,
) -> Tensor:
    """Return the posterior mean of ``u``, given the first layer's linear system.

    With everything above known the system ``U x = v`` is linear, and the posterior mean of
    ``x = mean + B u`` has the ``u`` that solves ``[U B / s; I] u = [(v - U mean) / s; 0]``
    by least squares, with ``s`` the standard deviation of each row.
    """
    z, e = solution.values[1], solution.cotangents[1]
    gradient = evidence.gradient[layer.weight_name]
    target = layer.target(z, gradient)
    mean = torch.full((len(evidence), *layer.in_shape), prior.mean).to(z)
    at_mean = layer.apply(mean, e)
    miss = (target.weight - at_mean.weight, target.gradient - at_mean.gradient)
    # Rows more exact than a third of the matching precision only slow the solver down.
    least = [m.flatten(1).square().mean(1).sqrt().clamp_min(1e-300) * precision / 3 for m in miss]
    of_z, of_gradient = row_deviations(z, solution.deviations[1], gradient, solution.noise)
    of_z = torch.maximum(of_z, least[0].reshape(-1, *[1] * (of_z.dim() - 1)))
    of_gradient = torch.maximum(of_gradient, least[1].reshape(-1, *[1] * (gradient.dim() - 1)))

    def apply(u: Tensor) -> tuple[Tensor, ...]:
        rows = layer.apply(prior.root(u), e)
        return rows.weight / of_z, rows.gradient / of_gradient, u

    def adjoint(rows: tuple[Tensor, ...]) -> Tensor:
        back = layer.adjoint(Rows(rows[0] / of_z, rows[1] / of_gradient), e)
        return prior.root_adjoint(back) + rows[2]

    start = torch.zeros(len(evidence), *prior.latent_shape).to(z)
    rhs = (miss[0] / of_z, miss[1] / of_gradient, start)
    return cgls(apply, adjoint, rhs, start, tolerance=1e-6, max_iterations=1500)[0]


def _exact_fit(
    layer: Affine, evidence: Evidence, solution: LinearSolution, image: Tensor
) -> Tensor:
    """Fit what is determined to the last digit; the null space stays as ``image`` has it."""
    z, e = solution.values[1], solution.cotangents[1]
    gradient = evidence.gradient[layer.weight_name]
    deviations = row_deviations(z, solution.deviations[1], gradient, solution.noise)
    return solve_layer(layer, z, e, gradient, deviations, image)[0]
