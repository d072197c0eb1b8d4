"""Conjugate gradients on the normal equations (CGLS), batched and matrix-free."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Vector = tuple[Tensor, ...]


def _dot(a: Vector, b: Vector) -> Tensor:
    """Inner product of each update: sum over everything but the first dimension."""
    terms = [(x * y).flatten(1).sum(1) for x, y in zip(a, b, strict=True)]
    return torch.stack(terms).sum(0)


def _expand(scalar: Tensor, like: Tensor) -> Tensor:
    return scalar.reshape(-1, *[1] * (like.dim() - 1))


def cgls(
    apply: Callable[[Tensor], Vector],
    adjoint: Callable[[Vector], Tensor],
    rhs: Vector,
    start: Tensor,
    tolerance: float = 1e-13,
    max_iterations: int = 3000,
) -> tuple[Tensor, Tensor]:
    """Solve ``min ||U x - v||`` for many right sides at once.

    Started at zero, the limit is the least-norm solution, also where ``U`` is rank
    deficient. Each update stops on its own; the loop ends when all have.

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
    gamma = _dot((s,), (s,))
    scale = _dot((start_s := adjoint(rhs),), (start_s,))
    goal = tolerance**2 * scale
    for _ in range(max_iterations):
        active = gamma > goal
        if not bool(active.any()):
            break
        q = apply(p)
        delta = _dot(q, q)
        alpha = torch.where(active & (delta > 0), gamma / delta.clamp_min(1e-300), 0.0)
        x = x + _expand(alpha, x) * p
        r = tuple(a - _expand(alpha, a) * b for a, b in zip(r, q, strict=True))
        s = adjoint(r)
        fresh = _dot((s,), (s,))
        beta = torch.where(active, fresh / gamma.clamp_min(1e-300), 0.0)
        p = s + _expand(beta, p) * p
        gamma = torch.where(active, fresh, gamma)
    r = tuple(v - u for v, u in zip(rhs, apply(x), strict=True))
    size = _dot(rhs, rhs).clamp_min(1e-300)
    return x, (_dot(r, r) / size).sqrt()
