"""Terms of the objectives of gradient matching."""

from __future__ import annotations

import torch
from torch import Tensor


def total_variation(x: Tensor) -> Tensor:
    """Return the anisotropic total variation of each update, shape (N,).

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
