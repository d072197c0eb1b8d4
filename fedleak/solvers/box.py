"""Pixels lie in [0, 1]: what an estimate gains that knows it."""

from __future__ import annotations

import torch
from scipy.optimize import lsq_linear
from torch import Tensor

#: Unknowns up to which it is worth its time: active sets are searched one by one.
MOST = 1024


def into_box(points: Tensor, root: Tensor) -> Tensor:
    """Return the points of [0, 1]^n that are nearest, by a precision matrix.

    Where an estimate has normal errors of the covariance ``(R^T R)^-1``, this is the most
    probable one that is an image: pixels that are held at a bound tell of the others.

    Parameters
    ----------
    points : Tensor, float64, shape (..., n)
    root : Tensor, float64, shape (n, n)
        ``R``.

    Returns
    -------
    Tensor, float64, shape (..., n)
        On the device of ``points``.

    Notes
    -----
    Least squares between bounds, by active sets (Stark and Parker 1995).
    """
    flat = points.reshape(-1, points.shape[-1])
    outside = ((flat < 0) | (flat > 1)).any(1)
    made, matrix = flat.clone(), root.cpu().numpy()
    for i in outside.nonzero().flatten().tolist():
        target = (root @ flat[i]).cpu().numpy()
        found = lsq_linear(matrix, target, bounds=(0.0, 1.0), method="bvls").x
        made[i] = torch.from_numpy(found).to(made).clamp(0, 1)  # it rounds past the bounds
    return made.reshape(points.shape)
