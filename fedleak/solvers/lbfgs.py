"""Limited-memory BFGS, batched: every update has its own step and its own history."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedleak import events
from fedleak.errors import TimeLimitError

#: A step is accepted when it gains at least this part of what the slope promises.
_ARMIJO = 1e-4


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def lbfgs(
    objective: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    steps: int = 600,
    history: int = 20,
    tolerance: float = 1e-9,
    patience: int = 20,
    near: float = -torch.inf,
    slow: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Minimise many independent functions at once; never end above the start.

    Parameters
    ----------
    objective : callable
        ``x -> (values, gradients)`` of shapes (N,) and (N, n).
    start : Tensor, shape (N, n)
    steps : int
        Evaluations of the objective, at most.
    history : int
        Pairs of steps and gradient changes that are remembered.
    tolerance, patience : float, int
        An update is done when its value has fallen by less than this factor in this
        many steps.
    near, slow : float
        Below the value ``near`` it is done as soon as it has fallen by less than ``slow``.

    Returns
    -------
    x : Tensor, shape (N, n)
        The best point seen of each update.
    values : Tensor, shape (N,)
        Infinite where the time allowed passes within the first evaluation.
    """
    x = start.clone()
    try:
        f, g = objective(x)
    except TimeLimitError:
        return x, x.new_full((len(x),), torch.inf)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    direction = -g
    step = 1.0 / g.norm(dim=1).clamp_min(1e-300).clamp_min(1.0)
    past = f.clone()
    active = torch.ones_like(f, dtype=torch.bool)
    for done in events.steps(steps, "matching"):
        count = done + 1
        trial = x + step[:, None] * direction
        try:
            f_new, g_new = objective(trial)
        except TimeLimitError:  # half an evaluation says nothing, what there is stays
            break
        slope = _dot(g, direction)
        good = active & (f_new <= f + _ARMIJO * step * slope)  # a NaN compares as false
        # One list of pairs for all: where no step was taken the pair is zero and drops out.
        s = torch.where(good[:, None], trial - x, 0.0)
        y = torch.where(good[:, None], g_new - g, 0.0)
        curvature = _dot(s, y)
        useful = curvature > 1e-12 * s.norm(dim=1) * y.norm(dim=1)
        if bool(useful.any()):
            rho = torch.where(useful, 1.0 / curvature.clamp_min(1e-300), 0.0)
            pairs = [*pairs, (s, y, rho)][-history:]
        x, g = torch.where(good[:, None], trial, x), torch.where(good[:, None], g_new, g)
        f = torch.where(good, f_new, f)
        fresh = _two_loop(g, pairs)
        downhill = _dot(fresh, g) < 0
        fresh = torch.where(downhill[:, None], fresh, -g)
        direction = torch.where(good[:, None], fresh, direction)
        step = torch.where(good, 1.0, step * 0.3)
        if count % patience == 0:
            least = tolerance + (slow - tolerance) * (f < near).to(f)
            active = active & (past - f > least * past)
            past = f.clone()
            if not bool(active.any()):
                break
    return x, f


def _two_loop(g: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return ``-H g`` for the inverse Hessian that the pairs describe."""
    q = -g
    scale = torch.ones_like(g[:, 0])
    alphas = []
    for s, y, rho in reversed(pairs):
        alpha = rho * _dot(s, q)
        alphas.append(alpha)
        q = q - alpha[:, None] * y
    for s, y, rho in pairs:  # the newest useful pair sets the scale
        scale = torch.where(rho > 0, _dot(s, y) / _dot(y, y).clamp_min(1e-300), scale)
    q = scale[:, None] * q
    for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + (alpha - rho * _dot(y, q))[:, None] * s
    return q
