"""Small things that are done to many updates at once, the first dimension counting them."""

from __future__ import annotations

from torch import Tensor


def per_update(scalar: Tensor, like: Tensor) -> Tensor:
    """Return one number for each update, shape (N,), to broadcast over ``like``, (N, ...)."""
    return scalar.reshape(-1, *[1] * (like.dim() - 1))


def rms(x: Tensor) -> Tensor:
    """Return the root mean square of each update, shape (N, 1, ...), above 0."""
    return per_update(x.flatten(1).square().mean(1).sqrt().clamp_min(1e-300), x)
