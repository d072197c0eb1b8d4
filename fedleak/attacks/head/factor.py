"""The factor that a batch's update was multiplied by, found with what demixes it.

A loss that is summed instead of averaged, gradients that are accumulated, another learning rate
and clipping all multiply an update by one number ``a``. Then ``E(M)^T M = t G R^T`` and
``sum E(M) = t g`` with one more unknown, ``t = 1 / a``. The part of ``t g`` that is negative is
the probability that the model does not give to the batch's own labels, mean over its images: so
``t`` lies on a short line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from fedleak import deadline
from fedleak.attacks.head.equations import Mixture, damped

#: Mean probability, over a batch, that the model does not give to its own labels: tried in turn.
_MISSED = (0.9, 0.8, 0.7, 0.6, 0.95, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 3e-3, 1e-3)
#: Sets of labels for each, the likeliest ones; random starts of each set; Gauss-Newton steps.
_LABELS, _STARTS, _STEPS = 6, 6, 60
#: Bounds the sets of labels tried in all; each costs as the sixth power of the batch's size.
_WORK = 4e5
#: Part of the largest entry of a bias gradient from which its sign is sure.
_SURE = 1e-3
#: Steps from the best starts, and relative residual of a solution worth polishing.
_POLISH, _NEAR = 200, 1e-3

#: ``(t, labels) -> Mixture``: the equations for an update divided by ``1 / t``.
Make = Callable[[float, Tensor], Mixture]


def search(
    bias: Tensor,
    candidates: Callable[[float], Iterator[Tensor]],
    make: Make,
    images: int,
    signs: tuple[int, ...],
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield ``t``, labels and ``M`` that solve the equations of a batch up to rounding.

    Parameters
    ----------
    bias : Tensor, shape (classes,)
        Gradient of the head's bias, as observed.
    candidates : callable
        ``t -> `` sets of labels, the likeliest first.
    make : callable
    images : int
        Batch size B.
    signs : tuple of int
        Those of ``t``.
    """
    least = _SURE * float(bias.abs().max())
    like = make(1.0, torch.zeros(images, dtype=torch.int64, device=bias.device))
    whole = float((like.own / like.divisor).sum())  # of the negative part: 1 of a mean
    most = int((like.own > 0).sum())
    for sign in signs:
        negative = float((sign * bias).clamp(max=0).sum().neg())
        # Only labels of the batch have negative entries.
        if negative <= 0 or int((sign * bias < -least).sum()) > most:
            continue
        by_labels: dict[tuple[int, ...], list[float]] = {}
        for missed in _MISSED:
            t = sign * whole * missed / negative
            for labels in islice(candidates(t), _LABELS):
                by_labels.setdefault(tuple(labels.tolist()), []).append(t)
        # Labels that many factors agree on are the likelier ones.
        likely = sorted(by_labels.items(), key=lambda item: -len(item[1]))
        for own, tried in likely[: max(2, int(_WORK / images**6))]:
            if deadline.passed():
                return
            found = _solve(make, torch.tensor(own, device=bias.device), tried)
            if found is not None:
                yield found


def _solve(make: Make, labels: Tensor, tried: list[float]) -> tuple[float, Tensor, Tensor] | None:
    """Solve for ``M`` and ``t`` together, from random probabilities at each ``t`` tried."""
    problem = make(1.0, labels)
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor(tried).to(problem.own).repeat_interleave(_STARTS)
    shape = (len(t), *problem.own.shape)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(problem.own)
    means = torch.stack(
        [make(v, labels).mean_probabilities().clamp_min(1e-9) for v in tried]
    ).repeat_interleave(_STARTS, 0)
    p = problem.probabilities(means.unsqueeze(1), 0.3 * noise)
    target = t.reshape(-1, 1, 1) * problem.target
    m = torch.linalg.lstsq(problem.cotangents(p).mT, target).solution
    size = problem.target.square().sum() + problem.bias.square().sum()
    m, t, value = joint(problem, m, t, _STEPS)
    best = (value / t.square()).nan_to_num(torch.inf).argsort()[:2]
    m, t, value = joint(problem, m[best], t[best], _POLISH)
    relative = value / (t.square() * size)
    k = int(relative.nan_to_num(torch.inf).argmin())
    if float(relative[k]) > _NEAR**2:
        return None
    return float(t[k]), labels, m[k]


def joint(problem: Mixture, m: Tensor, t: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levenberg-Marquardt for ``M``, shape (K, B, B), and ``t``, shape (K,); and the values.

    ``problem`` is that of the update as observed; its equations are weighted as they are there.
    """
    target = (problem.target @ problem.mix) * problem.rows.unsqueeze(1)
    sums = problem.bias * problem.sums
    r0 = target.square().sum() + sums.square().sum()

    def evaluate(m: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        p, e, r1, r2, _ = problem.evaluate(m)
        r1 = r1 + (1 - t).reshape(-1, 1, 1) * target
        r2 = r2 + (1 - t).unsqueeze(1) * sums
        return p, e, r1, r2, r1.square().sum((1, 2)) + r2.square().sum(1)

    damping = torch.full((len(m),), 1e-2).to(m)
    state = evaluate(m, t)
    idle = torch.zeros(len(m), dtype=torch.int64, device=m.device)
    for _ in range(steps):
        p, e, r1, r2, value = state
        jtj, slope = problem.normal(m, p, e, r1, r2)
        _, border = problem.normal(m, p, e, -target.expand_as(r1), -sums.expand_as(r2))
        own = -(r1 * target).sum((1, 2)) - (r2 * sums).sum(1)
        jtj = torch.cat([jtj, border.unsqueeze(1)], 1)
        corner = torch.cat([border, r0.expand(len(m), 1)], 1)
        jtj = torch.cat([jtj, corner.unsqueeze(2)], 2)
        step = damped(jtj, torch.cat([slope, own.unsqueeze(1)], 1), damping)
        trial_m, trial_t = m - step[:, :-1].reshape(m.shape), t - step[:, -1]
        trial = evaluate(trial_m, trial_t)
        # Not towards an update of nothing, which images of nothing explain.
        down = (trial[4] < value) & (trial_t / t > 0.2)
        gained = down & (trial[4] < value * (1 - 1e-4))
        idle = torch.where(gained, 0, idle + 1)
        state = tuple(
            torch.where(down.reshape(-1, *[1] * (new.dim() - 1)), new, old)
            for new, old in zip(trial, state, strict=True)
        )
        m = torch.where(down.reshape(-1, 1, 1), trial_m, m)
        t = torch.where(down, trial_t, t)
        damping = torch.where(down, damping * 0.3, damping * 4).clamp(1e-15, 1e8)
        if bool((idle >= 8).all()):
            break
    return m, t, state[4]
