"""The image from what is known above it: forwards, under a prior.

What an edge holds is a continuous function of the image; the gradient of a network with ReLU is
not. So the image is first matched to known values, by a quasi-Newton solver over falling
error levels and then by Gauss-Newton, in coordinates that the prior whitens. Pixels are not
clamped: brightness and contrast may still be open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import jvp, vjp

from fedleak import deadline
from fedleak.graph.knowledge import Knowledge
from fedleak.graph.targets import BelowTargets, NearestTargets, Targets
from fedleak.priors import Prior
from fedleak.solvers import cgls, lbfgs

#: Relative errors at which known values count, one after the other.
LEVELS = (1e-1, 1e-2, 1e-3)
#: Gauss-Newton steps, at most; each must lower the misfit to this part of it.
MOST_NEWTON, _PAYS = 8, 0.9
#: Misfit, in units of the errors, at which all is said.
_MATCHED = 2.0

#: Temperatures of the softened gradient, from first to last, and how each follows.
HOTTEST, COLDEST, _COOLING = 0.5, 1e-4, 0.7
#: Evaluations at each temperature, at most, and the temperature from which the valley may be right.
_EACH, _NEAR = 60, 1e-2

#: Is told the misfit and the images of each stage.
Watch = Callable[[float, Tensor], None]


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
    image = knowledge.value(knowledge.graph.image)
    if image is not None:
        return image
    nearest = NearestTargets(knowledge)
    search = _Search(nearest, prior, watch)
    u = search.finish(search.descend(search.start(), steps))
    if search.misfit(u) > _MATCHED and nearest.layers:
        values = _Search(NearestTargets(knowledge, rows=False), prior, watch)
        alone = values.finish(u)
        if values.misfit(alone) < _MATCHED:
            return values.images(alone).detach()
    below = BelowTargets.of(knowledge)
    if search.misfit(u) < _MATCHED or below is None or deadline.passed():
        return search.images(u).detach()
    whole = _Search(below, prior, watch)
    other, tried = whole.start(), False
    for temperature in whole.temperatures():
        other = whole.cool(other, temperature)
        if temperature < _NEAR and not tried:
            # Perhaps this is the right valley, and the continuous targets lead on at once.
            tried, end = True, search.finish(other)
            if search.misfit(end) < _MATCHED:
                return search.images(end).detach()
    other = whole.finish(whole.cool(other, 0.0))
    better = whole.misfit(other) < whole.misfit(u)
    return whole.images(other if better else u).detach()


class _Search:
    """Images as ``mean + B P w``: ``B`` of the prior, ``P`` what the data make of it."""

    def __init__(self, targets: Targets, prior: Prior, watch: Watch | None):
        self.targets, self.prior, self.watch = targets, prior, watch
        graph = targets.knowledge.graph
        self.batch = graph.batch
        self.latent = (self.batch, *prior.latent_shape)

    def start(self) -> Tensor:
        return self.targets.values.new_zeros(self.latent)

    def descend(self, u: Tensor, steps: int) -> Tensor:
        """Match at falling error levels."""
        for level in LEVELS:
            u = self.quasi_newton(u, level, steps)
            if self._told(u) < _MATCHED or deadline.passed():
                break
        return u

    def temperatures(self) -> Iterator[float]:
        """Return the temperatures, hottest first, as long as there is time."""
        temperature = HOTTEST
        while temperature > COLDEST and not deadline.passed():
            yield temperature
            temperature *= _COOLING

    def cool(self, u: Tensor, temperature: float) -> Tensor:
        """Match at one temperature, with errors of its size."""
        self.targets.temperature = temperature
        u = self.quasi_newton(u, min(max(temperature, COLDEST), LEVELS[0]), _EACH)
        self._told(u)
        return u

    def finish(self, u: Tensor) -> Tensor:
        """Go on by Gauss-Newton as long as that pays."""
        misfit = self._told(u)
        for _ in range(MOST_NEWTON):
            if misfit < _MATCHED or deadline.passed():
                break
            u = self.gauss_newton(u)
            before, misfit = misfit, self._told(u)
            if misfit > _PAYS * before:
                break
        return u

    def _told(self, u: Tensor) -> float:
        misfit = self.misfit(u)
        if self.watch is not None:
            self.watch(misfit, self.images(u).detach())
        return misfit

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
