"""What an update leaves open of its images: linear information against an image prior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedleak.metric.jacobian_rows import Block
from fedleak.solvers.gaussian import cholesky

#: Error, relative to the prior's precision, up to which the normal equations will do.
_NORMAL = 1e-4


@dataclass(frozen=True)
class Posterior:
    """The normal distribution of the images, given an update that is linear in them.

    Attributes
    ----------
    variance : Tensor, float64, shape (B, C, H, W)
        Variance that is left of each pixel.
    effective_dimensions : float
        Directions that the update tells more of than the prior: ``sum_i s_i^2 / (1 + s_i^2)``
        over the singular values of the rows in units of their errors and of the prior.
    """

    variance: Tensor
    effective_dimensions: float

    @property
    def psnr_db(self) -> float:
        """Predicted PSNR in dB (peak 1): ``-10 log10`` of an image's mean variance.

        Of a batch the mean over its images, as the PSNR of an attack is.
        """
        return mean_decibels(self.variance.flatten(1).mean(1))


@dataclass(frozen=True)
class Prediction:
    """Predicted leakage of one update.

    Attributes
    ----------
    psnr_db : float
        Predicted PSNR (peak 1) in dB, the mean over references and images.
    each_db : tuple of float
        The same at each reference.
    floor_db : float
        Bayesian Cramer-Rao (van Trees) bound: no attack whatever has a greater mean PSNR, for
        images that follow the prior and errors that are normal and at least as large.
    effective_dimensions : float
        Of the ``unknowns`` (all pixels of the batch), the directions that the update tells
        more of than the prior does.
    unknowns : int
    error_db : float
        Numerical uncertainty of ``psnr_db``; 0 where the Jacobian was held in memory whole.
    rms : Tensor, shape (B, C, H, W)
        What is left open of each pixel, root mean square over references.
    """

    psnr_db: float
    each_db: tuple[float, ...]
    floor_db: float
    effective_dimensions: float
    unknowns: int
    error_db: float
    rms: Tensor


def decibels(mse: float) -> float:
    """Return the PSNR in dB, for a peak of 1."""
    return -10 * math.log10(max(mse, 1e-300))


def mean_decibels(mse: Tensor) -> float:
    """Return the mean PSNR in dB of some images, given the mean square error of each."""
    return float(-10 * mse.clamp_min(1e-300).log10().mean())


def posterior(blocks: Sequence[Block], factor: Tensor, shape: tuple[int, ...]) -> Posterior:
    """Return what is left open, to full precision.

    Parameters
    ----------
    blocks : sequence of Block
        Rows in units of their errors, ``n = B C H W`` unknowns.
    factor : Tensor, float64, shape (C H W, C H W)
        Lower triangular factor ``L`` of the prior's covariance.
    shape : tuple of int
        (B, C, H, W).

    Returns
    -------
    Posterior

    Notes
    -----
    With ``W = J L`` the open part is ``L (1 + W^T W)^-1 L^T``. At the noise of float32 the
    normal equations would leave nothing of it in float64: unless the noise is large, all comes
    from an orthogonal factorisation.
    """
    n = len(factor) * shape[0]
    rows = torch.cat([whiten(b.rows, factor) for b in blocks] or [factor.new_zeros(0, n)])
    if len(rows) < n:
        left, effective = _dual(rows, factor)
    else:
        left, effective = _primal(rows, factor)
    return Posterior(left.reshape(shape), effective)


def _primal(rows: Tensor, factor: Tensor) -> tuple[Tensor, float]:
    """Return the open variances from the triangular root of ``1 + W^T W``."""
    n = rows.shape[1]
    eye = torch.eye(n, dtype=rows.dtype, device=rows.device)
    if float(rows.square().sum()) * torch.finfo(rows.dtype).eps < _NORMAL:
        root = cholesky((rows.mT @ rows + eye).unsqueeze(0))[0].mT
    else:
        root = torch.linalg.qr(torch.cat([rows, eye]), mode="r")[1]
    inverse = torch.linalg.solve_triangular(root, eye, upper=True)
    left = (factor @ inverse.unflatten(0, (-1, len(factor)))).square().sum(2)
    return left, n - float(inverse.square().sum())


def _dual(rows: Tensor, factor: Tensor) -> tuple[Tensor, float]:
    """Return the same where there are fewer rows than unknowns, from their span alone."""
    count = len(rows)
    eye = torch.eye(count, dtype=rows.dtype, device=rows.device)
    q, r = torch.linalg.qr(rows.mT)
    root = torch.linalg.qr(torch.cat([r.mT, eye]), mode="r")[1]
    inverse = torch.linalg.solve_triangular(root, eye, upper=True)
    span = factor @ q.unflatten(0, (-1, len(factor)))
    known = span.square().sum(2) - (span @ inverse).square().sum(2)
    return factor.square().sum(1) - known, count - float(inverse.square().sum())


def whiten(rows: Tensor, factor: Tensor) -> Tensor:
    """Return rows by whitened unknowns, ``J L`` for each image of the batch, in float64."""
    return (rows.to(factor).unflatten(1, (-1, len(factor))) @ factor).flatten(1)


class Information:
    """What each layer tells, as matrices that can be scaled and left out one by one.

    Parameters
    ----------
    blocks : sequence of Block
        Rows in units of the entries' own size (:func:`fedleak.metric.attribution.relative_errors`).
    factor : Tensor, float64, shape (n / B, n / B)
        Lower triangular factor of the prior's covariance.
    level : float
        Error of every gradient relative to its size, root mean square: at least 1e-4, as
        sums of squares resolve no less.

    Attributes
    ----------
    layers : dict of str to Tensor
        ``L^T J^T J L`` of each layer at that error, shape (n, n).
    """

    def __init__(self, blocks: Sequence[Block], factor: Tensor, level: float):
        self.factor, self.level = factor, level
        self.layers: dict[str, Tensor] = {}
        for block in blocks:
            rows = whiten(block.rows, factor) / level
            gram = rows.mT @ rows
            if block.layer in self.layers:
                self.layers[block.layer] += gram
            else:
                self.layers[block.layer] = gram

    @cached_property
    def total(self) -> Tensor:
        """The sum over all layers."""
        return torch.stack(list(self.layers.values())).sum(0)

    @cached_property
    def _spread(self) -> Tensor:
        """Return ``L^T L``: the mean square of an image, by whitened unknowns."""
        return self.factor.mT @ self.factor

    def psnr_db(self, scales: Mapping[str, float] | None = None) -> float:
        """Return the predicted PSNR in dB with some layers' information scaled.

        Parameters
        ----------
        scales : dict of str to float, optional
            0 withholds a layer; ``1 / (1 + s^2)`` adds noise of ``s`` times its error.
        """
        matrix = self.total.clone()
        for name, scale in (scales or {}).items():
            matrix += (scale - 1) * self.layers[name]
        return self._psnr_db(matrix)

    def exchanged(self, name: str, other: Information) -> float:
        """Return the predicted PSNR in dB with one layer as in ``other``."""
        new = other.layers.get(name, torch.zeros(()).to(self.total))
        return self._psnr_db(self.total - self.layers[name] + new)

    def alone(self, name: str) -> float:
        """Return the predicted PSNR in dB if nothing else were sent."""
        return self._psnr_db(self.layers[name].clone())

    def _psnr_db(self, matrix: Tensor) -> float:
        matrix.diagonal().add_(1.0)
        inverse = torch.cholesky_inverse(cholesky(matrix.unsqueeze(0))[0])
        size, batch = len(self.factor), len(matrix) // len(self.factor)
        parts = [slice(b * size, (b + 1) * size) for b in range(batch)]
        left = torch.stack([(inverse[s, s] * self._spread).sum() for s in parts])
        return mean_decibels(left / size)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of the total, and each image's square along them."""
        values, vectors = torch.linalg.eigh(self.total)
        parts = vectors.unflatten(0, (-1, len(self.factor)))
        return values.clamp_min(0), (self.factor @ parts).square().sum(1)

    def noised(self, strength: float) -> float:
        """Return the predicted PSNR in dB under noise on every gradient, relative to its size."""
        values, weights = self._spectrum
        level = max(strength, self.level) / self.level
        left = (weights / (1 + values / level**2)).sum(1)
        return mean_decibels(left / len(self.factor))
