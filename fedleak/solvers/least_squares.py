"""Conjugate gradients on the normal equations (CGLS), batched and matrix-free."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedleak import deadline
from fedleak.tensors import per_update

Vector = tuple[Tensor, ...]


#: The loop looks this often whether all are done: looking waits for the device.
_LOOK = 4


def _dot(a: Vector) -> Tensor:
    """Squared norm of each update: sum over everything but the first dimension."""
    flat = [x.flatten(1) for x in a]
    total = torch.linalg.vecdot(flat[0], flat[0])
    for x in flat[1:]:
        total = total + torch.linalg.vecdot(x, x)
    return total


def cgls(
    apply: Callable[[Tensor], Vector],
    adjoint: Callable[[Vector], Tensor],
    rhs: Vector,
    start: Tensor,
    tolerance: float = 1e-11,
    max_iterations: int = 3000,
) -> tuple[Tensor, Tensor]:
    """Solve ``min ||U x - v||`` for many right sides at once.

    Started at zero, the limit is the least-norm solution, also where ``U`` is rank
    deficient. Each update stops on its own; the loop ends when all have, or when the time allowed
    (:mod:`fedleak.deadline`) has passed.

    Parameters
    ----------
    apply : callable
        ``x -> U x``, a tuple of tensors with the updates in the first dimension.
    adjoint : callable
        ``r -> U^T r``.
    rhs : tuple of Tensor
        ``v``.
    start : Tensor, shape (N, ...)
        First guess.
    tolerance : float
        An update is done when ``||U^T r||`` has fallen by this factor.
    max_iterations : int
        Upper bound on the products with ``U``.

    Returns
    -------
    x : Tensor, shape (N, ...)
    residual : Tensor, shape (N,)
        ``||U x - v|| / ||v||``.
    """
    x = start.clone()
    r = tuple(v - u for v, u in zip(rhs, apply(x), strict=True))
    s = adjoint(r)
    p = s
    gamma = _dot((s,))
    goal = tolerance**2 * _dot((adjoint(rhs),))
    for step in range(max_iterations):
        active = gamma > goal
        if step % _LOOK == 0 and (not bool(active.any()) or deadline.passed()):
            break
        q = apply(p)
        delta = _dot(q)
        alpha = torch.where(active & (delta > 0), gamma / delta.clamp_min(1e-300), 0.0)
        # In place: these are this function's own, and there are many small steps.
        x.addcmul_(per_update(alpha, x), p)
        for a, b in zip(r, q, strict=True):
            a.addcmul_(per_update(alpha, a), b, value=-1)
        s = adjoint(r)
        fresh = _dot((s,))
        beta = torch.where(active, fresh / gamma.clamp_min(1e-300), 0.0)
        p = torch.addcmul(s, per_update(beta, p), p)
        gamma = torch.where(active, fresh, gamma)
    r = tuple(v - u for v, u in zip(rhs, apply(x), strict=True))
    size = _dot(rhs).clamp_min(1e-300)
    return x, (_dot(r) / size).sqrt()
