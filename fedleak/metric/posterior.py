"""What an update leaves open of its images: linear information against an image prior."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedleak.metric.jacobian import Block
from fedleak.solvers.gaussian import cholesky

#: Rows that join a QR factorisation at once, per unknown.
_SLAB = 2


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
        """Predicted PSNR in dB (peak 1): ``-10 log10`` of the mean variance."""
        return decibels(float(self.variance.mean()))


def decibels(mse: float) -> float:
    """Return the PSNR in dB, for a peak of 1."""
    return -10 * math.log10(max(mse, 1e-300))


def posterior(blocks: Sequence[Block], factor: Tensor, shape: tuple[int, ...]) -> Posterior:
    """Return what is left open, to full precision.

    Works on a QR factorisation of ``[J L; 1]`` with ``L L^T`` the prior's covariance: the
    normal equations would leave nothing in float64 at the noise of float32.

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
    """
    size, batch = len(factor), shape[0]
    r = torch.eye(size * batch, dtype=factor.dtype, device=factor.device)
    for slab in _slabs(blocks, _SLAB * len(r)):
        r = torch.linalg.qr(torch.cat([r, whiten(slab, factor)]), mode="r")[1]
    # Rows of L R^-1, image by image.
    root = torch.cat(
        [
            torch.linalg.solve_triangular(r, pad, upper=True, left=False).square().sum(1)
            for pad in _padded(factor, batch)
        ]
    )
    open_ = torch.linalg.solve_triangular(r, torch.eye(len(r)).to(r), upper=True)
    return Posterior(root.reshape(shape), len(r) - float(open_.square().sum()))


def whiten(rows: Tensor, factor: Tensor) -> Tensor:
    """Return rows by whitened unknowns, ``J L`` for each image of the batch, in float64."""
    return (rows.to(factor).unflatten(1, (-1, len(factor))) @ factor).flatten(1)


def _slabs(blocks: Iterable[Block], most: int) -> Iterable[Tensor]:
    """Yield the rows of all blocks, about ``most`` at a time."""
    held: list[Tensor] = []
    for block in blocks:
        for part in block.rows.split(most):
            held.append(part)
            if sum(len(h) for h in held) >= most:
                yield torch.cat(held)
                held = []
    if held:
        yield torch.cat(held)


def _padded(factor: Tensor, batch: int) -> Iterable[Tensor]:
    """Yield the block row of ``1 kron L`` that belongs to each image."""
    size = len(factor)
    for b in range(batch):
        row = factor.new_zeros(size, size * batch)
        row[:, b * size : (b + 1) * size] = factor
        yield row


class Information:
    """What each layer tells, as matrices that can be scaled and left out one by one.

    Parameters
    ----------
    blocks : sequence of Block
        Rows in units of the entries' own size (:func:`fedleak.metric.audit.relative_errors`).
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
        left = sum(
            float((inverse[s, s] * self._spread).sum())
            for s in (slice(b * size, (b + 1) * size) for b in range(batch))
        )
        return decibels(left / len(matrix))

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of the total, and the mean square along each eigenvector."""
        values, vectors = torch.linalg.eigh(self.total)
        parts = vectors.unflatten(0, (-1, len(self.factor)))
        return values.clamp_min(0), (self.factor @ parts).square().sum((0, 1))

    def noised(self, strength: float) -> float:
        """Return the predicted PSNR in dB under noise on every gradient, relative to its size."""
        values, weights = self._spectrum
        level = max(strength, self.level) / self.level
        return decibels(float((weights / (1 + values / level**2)).sum()) / len(values))
