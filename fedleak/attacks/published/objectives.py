"""Terms of the objectives of gradient matching, one value for each update."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.systems.base import Gradients


def squared_distance(made: Gradients, target: Gradients) -> Tensor:
    """Return the sum of squared differences over all parameters, shape (N,)."""
    return torch.stack([(made[k] - target[k]).flatten(1).square().sum(1) for k in made]).sum(0)


def cosine_distance(made: Gradients, target: Gradients) -> Tensor:
    """Return one minus the cosine of the two whole, concatenated gradients, shape (N,)."""

    def dot(a: Gradients, b: Gradients) -> Tensor:
        return torch.stack([(a[k] * b[k]).flatten(1).sum(1) for k in made]).sum(0)

    sizes = (dot(made, made) * dot(target, target)).sqrt()
    return 1 - dot(made, target) / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)


def total_variation(x: Tensor) -> Tensor:
    """Return the anisotropic total variation, shape (N,).

    The mean absolute difference of vertical neighbours plus that of horizontal ones. An
    input without two spatial dimensions, or with one pixel in one of them, varies by 0 there.

    Parameters
    ----------
    x : Tensor, shape (N, ..., H, W)
    """
    total = torch.zeros_like(x.flatten(1)[:, 0])
    if x.dim() < 4:
        return total
    for dim in (-2, -1):
        if x.shape[dim] > 1:
            total = total + x.diff(dim=dim).abs().flatten(1).mean(1)
    return total
