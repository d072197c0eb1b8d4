"""The image from what is known above it: forwards, under a prior.

What an edge holds is a continuous function of the image; the gradient of a network with ReLU is
not. So the image is first matched to known values, by a quasi-Newton solver over falling
error levels and then by Gauss-Newton, in coordinates that the prior whitens. Pixels are not
clamped: brightness and contrast may still be open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import jvp, vjp

from fedleak import deadline
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import Knowledge, spread
from fedleak.graph.rules import RULES, choices
from fedleak.graph.targets import BelowTargets, NearestTargets, Targets
from fedleak.images import on_grid
from fedleak.priors import Prior
from fedleak.solvers import cgls, lbfgs
from fedleak.tensors import per_update

#: Relative errors at which known values count, one after the other.
LEVELS = (1e-1, 1e-2, 1e-3)
#: Value of the objective from which a level is left as soon as it falls slowly.
_GOOD = 1.0
#: Gauss-Newton steps, at most; each must lower the misfit to this part of it.
MOST_NEWTON, _PAYS = 8, 0.9
#: Known values for each unknown that tell enough without gradients, which cost more.
_AMPLE = 8
#: Misfit, in units of the errors, at which all is said.
_MATCHED = 2.0
#: How often images are matched to better estimates of what lies below a max pool.
_CHOICES = 4

#: How near to the grid of 8-bit pixels, in steps of it and root mean square, images must come for
#: the grid's to be tried (any that are not on it are at 0.29): what is known decides.
_ON_GRID = 0.2

#: Temperatures of the softened gradient, from first to last, and how each follows.
HOTTEST, COLDEST, _COOLING = 0.5, 1e-4, 0.7
#: Evaluations at each temperature, at most, and the temperature from which the valley may be right.
_EACH, _NEAR = 60, 1e-2

#: Is told the misfit and the images of each stage.
Watch = Callable[[float, Tensor], None]
#: What a model sees of images.
Seen = Callable[[Tensor], Tensor]


def match_images(
    knowledge: Knowledge,
    prior: Prior,
    steps: int = 150,
    watch: Watch | None = None,
    seen: Seen = torch.positive,
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
    seen : callable
        What the model sees of images with values in [0, 1].

    Returns
    -------
    Tensor, shape (B, C, H, W)
        As the model sees them.
    """
    image = knowledge.value(knowledge.graph.image)
    if image is not None:
        return image
    nearest = NearestTargets(knowledge, rows=False)
    unknowns = knowledge.graph.batch * math.prod(prior.shape)
    if nearest.values.numel() < _AMPLE * unknowns:
        nearest = NearestTargets(knowledge)
    search = _Search(nearest, prior, watch, seen)
    u = search.descend(search.start(), steps)
    if search.exact is not None:
        return search.exact
    chosen = _by_choices(search, u, steps)
    if chosen is None:
        return match_images(knowledge, prior, steps, watch, seen)
    u = search.finish(chosen)
    if search.exact is not None:
        return search.exact
    matched = search.misfit(u) < _MATCHED
    if not matched and nearest.layers:
        values = _Search(NearestTargets(knowledge, rows=False), prior, watch, seen)
        alone = values.finish(u)
        if values.misfit(alone) < _MATCHED:
            u, search.gain, matched = alone, values.gain, True
    below = BelowTargets.of(knowledge)
    if below is None or deadline.passed():
        return search.images(u).detach()
    whole = _Search(below, prior, watch, seen)
    whole.gain = search.gain
    if matched:  # what is left open there the rest of the gradient may tell, masks being right
        return whole.finished(u)
    other, tried = whole.start(), False
    for temperature in whole.temperatures():
        other = whole.cool(other, temperature)
        if temperature < _NEAR and not tried:
            # Perhaps this is the right valley, and the continuous targets lead on at once.
            near = _Search(nearest, prior, watch, seen)
            near.gain = whole.gain
            tried, end = True, near.finish(other)
            if near.exact is not None or near.misfit(end) < _MATCHED:
                return near.images(end).detach() if near.exact is None else near.exact
    other = whole.finish(whole.cool(other, 0.0))
    if whole.exact is not None:
        return whole.exact
    images, misfit = whole.images(other).detach(), whole.misfit(other)
    whole.gain = search.gain
    return images if misfit < whole.misfit(u) else search.images(u).detach()


def _by_choices(search: _Search, u: Tensor, steps: int) -> Tensor | None:
    """Find choices of max pools, or images nearer to the truth; None where more became known."""
    knowledge = search.targets.knowledge
    for _ in range(_CHOICES):
        before = search.misfits(u)
        if bool((before < _MATCHED).all()) or search.exact is not None or deadline.passed():
            break
        found, nearer = choices.apply(knowledge, search.images(u).detach())
        if found:
            spread(knowledge, RULES)
            return None
        if not nearer:
            break
        # Images that make the better estimates may lie in the right valley.
        led = replace(knowledge, values={**knowledge.values, **nearer})
        to = search.towards(NearestTargets(led, rows=False))
        moved = search.quasi_newton(to.descend(u, steps), LEVELS[-1], steps)
        after = search.misfits(moved)
        u = search.finish(torch.where(per_update(after < before, u), moved, u))
        if not bool((after < _PAYS * before).any()):
            break
    return u


def unseen(images: Tensor, seen: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the images of which a model sees these; what it sees is affine."""
    shift = seen(torch.zeros_like(images))
    return (images - shift) / (seen(torch.ones_like(images)) - shift)


class _Search:
    """Images as the prior's: ``mean + B P w``, ``P`` what the data make of it.

    The model sees them normalised, and a gain times that.

    Attributes
    ----------
    exact : Tensor or None
        Images on the grid of 8-bit pixels, as the model sees them, that make what is known.
    """

    gain = 1.0
    exact: Tensor | None = None

    def __init__(self, targets: Targets, prior: Prior, watch: Watch | None, seen: Seen):
        self.targets, self.prior, self.watch, self.seen = targets, prior, watch, seen
        graph = targets.knowledge.graph
        self.batch = graph.batch
        self.latent = (self.batch, *prior.latent_shape)
        self.parts = self.batch if targets.apart else 1
        self.scaled = any(n.kind is Kind.NORMALISATION for n in graph.nodes.values())

    def towards(self, targets: Targets) -> _Search:
        """Return the same search for other targets."""
        other = _Search(targets, self.prior, self.watch, self.seen)
        other.gain = self.gain
        return other

    def start(self) -> Tensor:
        return self.targets.values.new_zeros(self.latent)

    def descend(self, u: Tensor, steps: int) -> Tensor:
        """Match at falling error levels."""
        for level in LEVELS:
            u = self.quasi_newton(u, level, steps)
            matched = _all(self.tell(u)) < _MATCHED
            if matched or self.exact is not None or deadline.passed():
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
        self.tell(u)
        return u

    def finish(self, u: Tensor) -> Tensor:
        """Go on by Gauss-Newton as long as that pays."""
        self.choose_gain(u)
        left = self.tell(u)
        for _ in range(MOST_NEWTON):
            matched = bool((left < _MATCHED).all())
            if matched or self.exact is not None or deadline.passed():
                break
            u = self.gauss_newton(u)
            before, left = left, self.tell(u)
            if not bool(((before >= _MATCHED) & (left <= _PAYS * before)).any()):
                break
        return u

    def finished(self, u: Tensor) -> Tensor:
        """Return the images that :meth:`finish` leads to."""
        u = self.finish(u)
        return self.images(u).detach() if self.exact is None else self.exact

    def choose_gain(self, u: Tensor) -> None:
        """Choose what all pixels are multiplied by, of which normalisation leaves eps to tell.

        Zeros beyond the border stay: brightness goes along. A long way for steps that other
        directions rule, and one number.
        """
        if not self.scaled:
            return
        tried: dict[float, float] = {}

        def at(gain: float) -> float:
            if gain not in tried:
                self.gain = gain
                tried[gain] = self.misfit(u)
            return tried[gain]

        best, width = self.gain, 2.0
        while width > 1.0001 and not deadline.passed():
            nearest = min((best / width, best, best * width), key=at)
            width = width if nearest != best else width**0.5
            best = nearest
        self.gain = best

    def tell(self, u: Tensor) -> Tensor:
        """Return :meth:`misfits`; tell of them, and try the grid where images are near."""
        images = self.images(u).detach()
        misfits = self._misfits_of(images)
        rounded, off = on_grid(unseen(images, self.seen))
        if float(off.max()) < _ON_GRID:
            on_it = self.seen(rounded)
            if bool((self._misfits_of(on_it) < _MATCHED).all()):
                self.exact = on_it
        if self.watch is not None:
            self.watch(_all(misfits), images)
        return misfits

    def images(self, u: Tensor) -> Tensor:
        return self.gain * self.seen(self.prior.image(u))

    def made(self, u: Tensor) -> Tensor:
        return self.targets.made(self.images(u))

    def misfit(self, u: Tensor) -> float:
        """Return how far off the known values are, in units of their errors."""
        return _all(self.misfits(u))

    def misfits(self, u: Tensor) -> Tensor:
        """Return the same of each part, shape (N,)."""
        return self._misfits_of(self.images(u))

    def _misfits_of(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self._in_errors(self.targets.values - self.targets.made(images))

    def _in_errors(self, rest: Tensor) -> Tensor:
        return (rest / self.targets.errors).square().mean(1).sqrt()

    def weight(self, u: Tensor, errors: Tensor) -> Tensor:
        """Return how much the data tell of a pixel, its inverse variance, on average.

        Shape (N, 1, 1, 1).
        """
        generator = torch.Generator().manual_seed(0)
        x = self.images(u).detach()
        z = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        moved = jvp(self.targets.made, (x,), (z,))[1]
        told = (moved.detach() / errors).square().sum(1)
        return per_update(told / z.reshape(self.parts, -1).square().sum(1), x)

    def quasi_newton(self, u: Tensor, level: float, steps: int) -> Tensor:
        errors = self.targets.errors.clamp_min(level)
        weight, size = self.weight(u, errors), u.numel() // self.parts

        def objective(w: Tensor) -> tuple[Tensor, Tensor]:
            w = w.detach().requires_grad_()
            u = self.prior.damped(w.reshape(self.latent), weight)
            rest = (self.made(u) - self.targets.values) / errors
            off = u.reshape(self.parts, -1).square().sum(1)
            values = (rest.square().sum(1) + off) / (2 * size)
            (gradient,) = torch.autograd.grad(values.sum(), w)
            return values.detach(), gradient

        w = self.prior.damped(u, weight, 0.5).reshape(self.parts, -1)
        # At the truth the value is about a half, of the prior: near it Gauss-Newton is faster.
        w, _ = lbfgs(objective, w, steps, near=_GOOD)
        return self.prior.damped(w.reshape(self.latent), weight)

    def gauss_newton(self, u: Tensor, iterations: int = 100) -> Tensor:
        """Take one Gauss-Newton step, by conjugate gradients on products with the Jacobian."""
        u = u.detach()
        with torch.no_grad():
            rest = self.targets.values - self.made(u)
            misfits = self._in_errors(rest)
        levels = rest.square().mean(1, keepdim=True).sqrt()
        errors = self.targets.errors.maximum((0.1 * levels).clamp_max(1e-3))
        weight = self.weight(u, errors)
        pull = vjp(self.made, u)[1]
        brighter, size = self._by_gain(u, errors)

        def placed(w: Tensor) -> Tensor:
            return self.prior.damped(w[:, 1:].reshape(self.latent), weight)

        def apply(w: Tensor) -> tuple[Tensor, ...]:
            d = placed(w)
            moved = jvp(self.made, (u,), (d,))[1] / errors + w[:, :1] * brighter
            return moved, d.reshape(self.parts, -1)

        def adjoint(rows: tuple[Tensor, ...]) -> Tensor:
            d = pull(rows[0] / errors)[0].detach() + rows[1].reshape(self.latent)
            gain = (brighter * rows[0]).sum(1, keepdim=True)
            return torch.cat([gain, self.prior.damped(d, weight).reshape(self.parts, -1)], 1)

        rhs = (rest / errors, -u.reshape(self.parts, -1))
        with torch.no_grad():
            start = u.new_zeros(self.parts, 1 + u.numel() // self.parts)
            w, _ = cgls(apply, adjoint, rhs, start, 1e-5, iterations)
            step = placed(w)
            change, gain = float(w[0, 0] / size), self.gain
            better = torch.zeros_like(misfits, dtype=torch.bool)
            for scale in (1.0, 0.5, 0.25, 0.1):
                self.gain = gain * math.exp(max(-1.0, min(1.0, scale * change)))
                tried = u + scale * per_update(~better, u) * step
                lower = ~better & (self.misfits(tried) < misfits)
                u = torch.where(per_update(lower, u), tried, u)
                better |= lower
                if bool(better.all()):
                    return u
            if not bool(better.any()):
                self.gain = gain
        return u

    def _by_gain(self, u: Tensor, errors: Tensor) -> tuple[Tensor, float]:
        """Return how what is made changes with the gain, of unit length, and the length."""
        if not self.scaled:
            return torch.zeros_like(errors), 1.0
        x = self.images(u).detach()
        column = jvp(self.targets.made, (x,), (x,))[1].detach() / errors
        size = float(column.norm().clamp_min(1e-300))
        return column / size, size


def _all(misfits: Tensor) -> float:
    """Return the misfit of all parts together."""
    return float(misfits.square().mean().sqrt())
