"""The predicted PSNR of images too large for a Jacobian in memory, from products with it.

What is left open is ``trace(R (1 + A^T A)^-1 R^T)`` with ``A = J R`` in units of the errors and
``R R^T`` the prior's covariance. Conjugate gradients bound it from both sides:

- from above, by attacking: of a random image and its noisy linear measurements, the image that
  conjugate gradients find in k steps is an estimate like any other, so its mean square error is
  no less than that of the best one;
- from below, by quadrature: for a random ``z`` the steps of conjugate gradients on
  ``(1 + A^T A) w = R^T z`` add up to ``z^T R (1 + A^T A)^-1 R^T z``, all of them positive
  (Golub & Meurant 2010, chapter 4).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vjp

from fedleak import events
from fedleak.metric.derivatives import affordable_steps, derivable
from fedleak.metric.posterior import Prediction, decibels
from fedleak.metric.reference import Reference
from fedleak.priors import Prior
from fedleak.tensors import per_update

#: Relative error of every gradient, at least: conjugate gradients do not get much deeper.
FLOOR = 1e-3
#: Random images and random directions, each.
PROBES = 2
#: Steps and floating-point operations for each reference, at most, and the distance of the two
#: bounds, in dB, that is near enough.
STEPS, WORK, NEAR_DB = 400, 7e11, 0.5


@dataclass
class _Bounds:
    """Mean square errors between which the open part lies."""

    lower: float
    upper: float

    @property
    def apart_db(self) -> float:
        return 10 * math.log10(max(self.upper / max(self.lower, 1e-300), 1.0))


class _Operator:
    """Products with ``A = J R``, for several vectors at once."""

    def __init__(self, reference: Reference, prior: Prior):
        jacobian = reference.jacobian
        self.images, self.prior, self.model = jacobian.images, prior, jacobian.replay.model
        self.weights = {}
        for name, g in jacobian.gradient.items():
            least = FLOOR * g.square().mean().sqrt()
            self.weights[name] = 1 / torch.hypot(reference.errors[name], least)

        def made(x: Tensor) -> dict[str, Tensor]:
            replayed = jacobian.replay(x.unsqueeze(0), jacobian.labels.unsqueeze(0))
            return {k: g[0] * self.weights[k] for k, g in replayed.gradients.items()}

        self._made = made
        with derivable():
            self._pull = vjp(made, self.images)[1]

    def root(self, u: Tensor) -> Tensor:
        """Return ``R u``, shape (P, B, C, H, W)."""
        return self.prior.root(u.flatten(0, 1)).unflatten(0, u.shape[:2])

    def root_adjoint(self, x: Tensor) -> Tensor:
        return self.prior.root_adjoint(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def normal(self, u: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Return ``A^T (A u + noise)``, for ``u`` of shape (P, B, *latent)."""
        change = self.root(u).to(self.images)
        out = []
        with derivable():
            for part in change:
                rows: dict[str, Tensor] = jvp(self._made, (self.images,), (part,))[1]
                if noise is not None:
                    rows = {k: r + _normal(r, noise) for k, r in rows.items()}
                out.append(self._pull(rows)[0].detach())
        return self.root_adjoint(torch.stack(out).double())


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def estimate(references: Sequence[Reference], prior: Prior, steps: int = STEPS) -> Prediction:
    """Return the prediction with an estimate of its error, matrix-free.

    Stopped early, the two bounds lie further apart, and ``error_db`` says so.

    Parameters
    ----------
    references : sequence of Reference
    prior : Prior
    steps : int
        Of conjugate gradients for each reference, at most; fewer where each of them is much
        work (:data:`WORK`).

    Returns
    -------
    Prediction
        ``psnr_db`` is the middle between the two bounds, ``error_db`` half their distance and
        the spread over random draws. ``floor_db`` and ``effective_dimensions`` are not known
        (NaN); ``rms`` is that of the random images.
    """
    each, errors, spreads = [], [], []
    for n, reference in enumerate(references):
        bounds, spread = _bracket(_Operator(reference, prior), steps, n)
        middle = [math.sqrt(b.lower * b.upper) for b in bounds]
        each.append(statistics.fmean(decibels(m) for m in middle))
        draws = statistics.pstdev(decibels(m) for m in middle) / math.sqrt(len(bounds))
        errors.append(statistics.fmean(b.apart_db for b in bounds) / 2 + draws)
        spreads.append(spread)
    return Prediction(
        psnr_db=statistics.fmean(each),
        each_db=tuple(each),
        floor_db=math.nan,
        effective_dimensions=math.nan,
        unknowns=references[0].jacobian.images.numel(),
        error_db=max(errors),
        rms=torch.stack(spreads).mean(0).sqrt(),
    )


def _bracket(operator: _Operator, steps: int, seed: int) -> tuple[list[_Bounds], Tensor]:
    """Run conjugate gradients from both sides until they meet, or the steps are used up."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(operator.images)
    like = torch.zeros(PROBES, batch, *operator.prior.latent_shape, dtype=torch.float64)
    truth = _normal(like, generator).to(operator.images.device)
    signs = torch.randint(0, 2, (PROBES, *operator.images.shape), generator=generator)
    ahead = operator.root_adjoint((2.0 * signs - 1).double().to(truth.device))
    rhs = torch.cat([operator.normal(truth, generator), ahead])
    count = operator.images.numel()
    bounds = [_Bounds(0.0, math.inf) for _ in range(PROBES)]
    spread = torch.zeros(operator.images.shape)

    def look(v: Tensor, form: Tensor) -> bool:
        nonlocal spread
        rest = operator.root(v[:PROBES] - truth).square()
        spread = rest.mean(0)
        for p in range(PROBES):
            upper = float(rest[p].sum()) / count
            bounds[p] = _Bounds(float(form[PROBES + p]) / count, min(upper, bounds[p].upper))
        return all(b.apart_db < NEAR_DB for b in bounds)

    steps = affordable_steps(operator.model, operator.images, WORK / len(rhs), steps)
    _conjugate_gradients(lambda u: u + operator.normal(u), rhs, steps, look)
    return bounds, spread


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    rhs: Tensor,
    steps: int,
    look: Callable[[Tensor, Tensor], bool],
) -> None:
    """Solve ``apply(v) = rhs`` for each row; ``look(v, rhs^T v so far)`` ends it."""
    v, r = torch.zeros_like(rhs), rhs
    p, form = r, rhs.new_zeros(len(rhs))

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1)

    size = inner(r, r)
    for _ in events.steps(steps, "conjugate gradients"):
        moved = apply(p)
        length = size / inner(p, moved).clamp_min(1e-300)
        v, r = v + per_update(length, rhs) * p, r - per_update(length, rhs) * moved
        form = form + length * size
        new = inner(r, r)
        p = r + per_update(new / size.clamp_min(1e-300), rhs) * p
        size = new
        if look(v, form):
            return
