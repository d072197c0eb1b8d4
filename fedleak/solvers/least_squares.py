"""Conjugate gradients on the normal equations (CGLS), batched and matrix-free."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedleak import deadline
from fedleak.tensors import per_update

Vector = tuple[Tensor, ...]
#: ``(r, U^T r) -> M U^T r``.
Inverse = Callable[[Vector, Tensor], Tensor]

#: The loop looks this often whether all are done: looking waits for the device.
_LOOK = 4
#: Steps within which a preconditioner leads to the end, or is left out of the others.
_TRUSTED = 50


def _dot(a: Vector, b: Vector | None = None) -> Tensor:
    """Inner product of each update, its square without ``b``: over all but the first dimension."""
    total: Tensor | None = None
    for x, y in zip(a, b or a, strict=True):
        part = torch.linalg.vecdot(x.flatten(1), y.flatten(1))
        total = part if total is None else total + part
    assert total is not None
    return total


def cgls(
    apply: Callable[[Tensor], Vector],
    adjoint: Callable[[Vector], Tensor],
    rhs: Vector,
    start: Tensor,
    tolerance: float = 1e-11,
    max_iterations: int = 3000,
    inverse: Inverse | None = None,
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
    inverse : callable, optional
        ``(r, U^T r) -> M U^T r``, with M a function of ``U^T U``, such as ``(U^T U + d)^-1``: a
        preconditioner, which leaves the least-norm solution what it is.

    Returns
    -------
    x : Tensor, shape (N, ...)
    residual : Tensor, shape (N,)
        ``||U x - v|| / ||v||``.
    """
    x = start.clone()
    r = tuple(v - u for v, u in zip(rhs, apply(x), strict=True))
    s = adjoint(r)
    p, size = s, _dot((s,))
    gamma = size
    goal = tolerance**2 * _dot((adjoint(rhs),))
    look = _LOOK if inverse is None else 1  # each of these steps is long
    for step in range(max_iterations):
        active = size > goal
        if step % look == 0 and (not bool(active.any()) or deadline.passed()):
            break
        z, fresh = s, size
        if inverse is not None and step < _TRUSTED:
            z = inverse(r, s)
            fresh = _dot((s,), (z,))
            good = fresh > 0  # not where its factors failed
            z, fresh = torch.where(per_update(good, z), z, s), torch.where(good, fresh, size)
        beta = torch.where(active, fresh / gamma.clamp_min(1e-300), 0.0)
        fresh_start = step == 0 or (inverse is not None and step == _TRUSTED)
        p = z if fresh_start else torch.addcmul(z, per_update(beta, p), p)
        gamma = torch.where(active, fresh, gamma)
        q = apply(p)
        delta = _dot(q)
        alpha = torch.where(active & (delta > 0), gamma / delta.clamp_min(1e-300), 0.0)
        # In place: these are this function's own, and there are many small steps.
        x.addcmul_(per_update(alpha, x), p)
        for a, b in zip(r, q, strict=True):
            a.addcmul_(per_update(alpha, a), b, value=-1)
        s = adjoint(r)
        size = _dot((s,))
    r = tuple(v - u for v, u in zip(rhs, apply(x), strict=True))
    return x, (_dot(r) / _dot(rhs).clamp_min(1e-300)).sqrt()
