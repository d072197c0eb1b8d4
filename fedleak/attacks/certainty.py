"""What is to be expected of images that were found, without a truth to compare them with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedleak.attacks.evidence import Evidence
from fedleak.attacks.targets.base import Target
from fedleak.solvers import Gaussian, Measurements, jacobian
from fedleak.solvers.gaussian import Rows
from fedleak.systems import Gradients

#: Unknowns of several images, and entries of their Jacobian, up to which it is taken.
_UNKNOWNS, _ENTRIES = 2048, 5e7
#: Relative error of an entry, at least: that of float32 and a little more.
_FINE = 1e-6
#: Standard deviation of a pixel of which nothing is known.
_PIXEL = 0.3
#: Share of the noise's variance, at least, that a fit is taken to leave.
_LEAST_LEFT = 0.1


def fits(target: Target, unknowns: int) -> bool:
    """Whether the Jacobian of what images make of a target is taken."""
    entries = target.values.shape[1] * unknowns
    small = unknowns <= _UNKNOWNS and entries <= _ENTRIES
    return small and target.dense and not target.hidden


def expected_db(target: Target, images: Tensor, prior: Gaussian) -> list[float]:
    """Return the PSNR in dB that an attacker expects of images, shape (K, C, H, W).

    From the covariance that the target and the prior leave open, linearised at the images
    themselves: no truth is asked. NaN where there are too many unknowns for that.

    Parameters
    ----------
    target : Target
        One; its errors are known.
    images : Tensor
    prior : Gaussian
        Of all their pixels together.
    """
    if not fits(target, images.numel()):
        return [math.nan] * len(images)
    at = images[None].to(target.values)

    def residual(x: Tensor) -> Tensor:
        return target.made(x.reshape(at.shape)) - target.values

    rows = Rows(jacobian(residual, at.flatten(1)))
    left = Measurements(rows, target.errors.clamp_min(_FINE), prior).covariance()[0]
    each = left.diagonal().clamp_min(1e-300).reshape(len(images), -1).mean(1)
    return (-10 * each.log10()).tolist()


def indifferent(images: Tensor) -> Gaussian:
    """Return a prior that takes every pixel for itself.

    That neighbours are alike is a prior's word, and none of the update's.
    """
    unknowns = images.numel()
    mean = torch.full((unknowns,), 0.5, dtype=torch.float64)
    return Gaussian(mean, _PIXEL**2 * torch.eye(unknowns, dtype=torch.float64))


def unexplained(evidence: Evidence, images: Tensor, noise: float = 0.0) -> Gradients:
    """Return for every tensor the error that images leave, root mean square, in its full shape.

    The images were fitted to the noise, too: of m numbers, n unknowns leave (m - n) / m of it.

    Parameters
    ----------
    evidence : Evidence
        Of one update.
    images : Tensor, shape (B, C, H, W)
    noise : float
        Of the update's entries, relative to a tensor's root mean square, at least.
    """
    made = evidence.made(images[None].to(evidence.labels.device))
    numbers = sum(g[0].numel() for g in evidence.gradient.values())
    fitted = max(1 - images.numel() / numbers, _LEAST_LEFT) ** 0.5
    out = {}
    for name, g in evidence.gradient.items():
        left = (made[name] - g).square().mean().sqrt() / fitted
        least = noise * g.square().mean().sqrt()
        out[name] = torch.maximum(left, least).clamp_min(1e-300).expand_as(g)
    return out
