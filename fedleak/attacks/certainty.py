"""What is to be expected of images that were found, without a truth to compare them with."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import jvp, vjp

from fedleak import deadline
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.targets.base import Target
from fedleak.solvers import Gaussian, Measurements, jacobian
from fedleak.solvers.gaussian import Rows
from fedleak.systems import Gradients

#: Unknowns of several images, and entries of their Jacobian, up to which it is taken.
_UNKNOWNS, _ENTRIES = 2048, 5e7
#: Steps towards the variance of more unknowns: by the entries of the update, between bounds; how
#: far in dB the second half of them may lead for the result to count.
_WORK, _FEWEST, _MOST, _SETTLED = 4e8, 40, 600, 1.0
#: Share of the first residual, as squares, that is none.
_NOTHING = 1e-16
#: Relative error of an entry there, at least: what is finer says no more of some 20 dB, and takes
#: conjugate gradients twice the steps.
_COARSE = 1e-3
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


def expected_db(target: Target, images: Tensor, prior: Gaussian) -> list[list[float]]:
    """Return the PSNR in dB that an attacker expects of images, shape (N, K, C, H, W).

    From the covariance that the target and the prior leave open, linearised at the images
    themselves: no truth is asked. NaN where there are too many unknowns for that.

    Parameters
    ----------
    target : Target
        Of N updates; its errors are known.
    images : Tensor
    prior : Gaussian
        Of all pixels of an update together.
    """
    count, unknowns = images.shape[1], images[0].numel()
    if not fits(target, unknowns):
        return [[math.nan] * count] * len(images)
    together = max(1, int(_ENTRIES // (target.values.shape[1] * unknowns)))
    parts = _split(target, images, together)
    return [each for part, own in parts for each in _dense(part, own, prior)]


def _split(target: Target, images: Tensor, together: int) -> Iterator[tuple[Target, Tensor]]:
    """Return so many updates at a time, with their images."""
    for index in torch.arange(len(images), device=target.values.device).split(together):
        part = target if len(index) == len(images) else target.subset(index)
        yield part, images[index.to(images.device)]


def _dense(target: Target, images: Tensor, prior: Gaussian) -> list[list[float]]:
    at = images.to(target.values)

    def residual(x: Tensor) -> Tensor:
        return target.made(x.reshape(at.shape)) - target.values

    rows = Rows(jacobian(residual, at.flatten(1)))
    left = Measurements(rows, target.errors.clamp_min(_FINE), prior).covariance()
    variances = left.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300)
    return (-10 * variances.reshape(*images.shape[:2], -1).mean(2).log10()).tolist()


def at_most_db(target: Target, images: Tensor, enough: float) -> list[list[float]]:
    """Return a PSNR in dB that no attacker expects to pass, of images of shape (N, K, C, H, W).

    As :func:`expected_db` under :func:`indifferent`, of any size. Where the Jacobian is too large,
    the mean variance of an image's pixels is that of random signs, ``z^T A^-1 z``; what conjugate
    gradients have found of it rises with each step, so that the decibels fall from above.

    Parameters
    ----------
    target : Target
        Of N updates; its errors are known.
    images : Tensor
    enough : float
        An image is settled as soon as its bound is below.

    Returns
    -------
    list of list of float
        NaN where the steps allowed (fewer for larger networks) settle nothing.
    """
    count = images.shape[1]
    if fits(target, images[0].numel()):
        return expected_db(target, images, indifferent(images[0]))
    if target.hidden or not target.dense:
        return [[math.nan] * count] * len(images)
    return [
        [_one_at_most(part, own, k, enough) for k in range(count)]
        for part, (own,) in _split(target, images, 1)
    ]


def _one_at_most(target: Target, images: Tensor, k: int, enough: float) -> float:
    """Return the bound of image ``k``; NaN where it is not settled."""
    at = images[None].to(target.values)
    weights = target.errors.clamp_min(_COARSE) ** -2

    def made(x: Tensor) -> Tensor:
        return target.made(x.reshape(at.shape))

    pull = vjp(made, at.flatten(1))[1]

    def precision(v: Tensor) -> Tensor:
        pushed = jvp(made, (at.flatten(1),), (v[None],))[1]
        return v / _PIXEL**2 + pull(weights * pushed)[0][0]

    signs = torch.zeros(images.shape, dtype=at.dtype)
    drawn = torch.randint(0, 2, signs[k].shape, generator=torch.Generator().manual_seed(k))
    signs[k] = 2 * drawn - 1
    z = signs.flatten().to(at)
    allowed = _WORK / (target.values.shape[1] * len(images))
    steps = int(min(max(allowed, _FEWEST), _MOST))
    rest = way = z
    first = size = float(z @ z)
    variance, before = 0.0, 0.0
    for step in range(steps):
        if deadline.passed():
            return math.nan
        along = precision(way)
        length = size / float(way @ along)
        variance += length * float(way @ z) / images[k].numel()
        rest = rest - length * along
        last, size = size, float(rest @ rest)
        way = rest + size / last * way
        decibels = -10 * math.log10(max(variance, 1e-300))
        if decibels < enough or size < _NOTHING * first:
            return decibels
        if step + 1 == steps // 2:
            before = decibels
    return decibels if before - decibels < _SETTLED else math.nan


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
