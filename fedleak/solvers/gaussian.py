"""Dense normal distributions, and what linear measurements make of them. All batched."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

#: Share of entries below which rows count as sparse: one convolution sees few pixels.
_SPARSE = 0.1


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor; what rounding left negative is lifted."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    lift = 1e-14 * diagonal.mean(-1, keepdim=True)
    for _ in range(5):
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not bool(failed.any()):
            break
        # Only where it failed: the others do not depend on what stands beside them.
        needed = torch.where(failed.unsqueeze(-1) > 0, lift, 0.0)
        matrix = matrix + torch.diag_embed(needed.expand_as(diagonal))
        lift = 100 * lift
    return factor


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.mT``, shape (N, m, m), which is symmetric: half of it is mirrored."""
    m = a.shape[1]
    if m <= 256:
        return a @ b.mT
    upper, lower = slice(0, m // 2), slice(m // 2, m)
    out = a.new_empty(len(a), m, m)
    out[:, upper, upper] = symmetric_product(a[:, upper], b[:, upper])
    out[:, lower, lower] = symmetric_product(a[:, lower], b[:, lower])
    out[:, lower, upper] = a[:, lower] @ b[:, upper].mT
    out[:, upper, lower] = out[:, lower, upper].mT
    return out


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return ``rows @ matrix`` for rows of shape (..., n), skipping zeros where most are."""
    flat = rows.reshape(-1, rows.shape[-1])
    if int(flat.count_nonzero()) < _SPARSE * flat.numel():
        with warnings.catch_warnings():  # torch calls its sparse tensors a beta
            warnings.simplefilter("ignore")
            return (flat.to_sparse_csr() @ matrix).reshape(*rows.shape[:-1], -1)
    return rows @ matrix


class Gaussian:
    """A normal distribution over vectors of n entries, or one for each of N updates.

    Parameters
    ----------
    mean : Tensor, float64, shape (n,) or (N, n)
    covariance : Tensor, float64, shape (n, n) or (N, n, n)
    """

    def __init__(self, mean: Tensor, covariance: Tensor):
        self.mean = mean
        self._covariance = covariance

    @property
    def covariance(self) -> Tensor:
        return self._covariance

    @staticmethod
    def stack(parts: Sequence[Gaussian]) -> Gaussian:
        """Return one distribution for each update."""
        if all(p is parts[0] for p in parts):
            return parts[0]
        return Gaussian(
            torch.stack([p.mean for p in parts]), torch.stack([p.covariance for p in parts])
        )

    def times(self, rows: Tensor) -> Tensor:
        """Return ``rows @ covariance`` for rows of shape (N, m, n)."""
        return rows @ self.covariance

    @cached_property
    def factor(self) -> Tensor:
        """Lower Cholesky factor of the covariance."""
        return cholesky(self.covariance)

    @cached_property
    def precision(self) -> Tensor:
        """Inverse of the covariance."""
        return torch.cholesky_inverse(self.factor)

    def with_precision(self, matrix: Tensor) -> Tensor:
        """Return ``matrix + precision`` for a matrix of shape (N, n, n), which is overwritten."""
        return matrix.add_(self.precision)

    @cached_property
    def log_det(self) -> Tensor:
        """Logarithm of the covariance's determinant."""
        return 2 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def energy(self, x: Tensor) -> Tensor:
        """Return ``(x - mean)^T covariance^-1 (x - mean)`` for ``x``, shape (N, n)."""
        rest = (x - self.mean).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.factor, rest, upper=False).square().sum((1, 2))


class KroneckerGaussian(Gaussian):
    """A normal distribution of images whose covariance is ``colour kron space``.

    Parameters
    ----------
    mean : Tensor, shape (n,)
    colour : Tensor, shape (C, C)
    space : Tensor, shape (n / C, n / C)
    """

    def __init__(self, mean: Tensor, colour: Tensor, space: Gaussian):
        self.mean, self.colour, self.space = mean, colour, space

    @property
    def covariance(self) -> Tensor:
        return torch.kron(self.colour, self.space.covariance)

    def times(self, rows: Tensor) -> Tensor:
        parts = rows.reshape(*rows.shape[:-1], len(self.colour), -1) @ self.space.covariance
        return torch.einsum("...cs,cd->...ds", parts, self.colour).reshape(rows.shape)

    # Made when asked for, not kept: there are many such priors, and the parts are small.
    @property
    def factor(self) -> Tensor:
        return torch.kron(torch.linalg.cholesky(self.colour), self.space.factor)

    @property
    def precision(self) -> Tensor:
        return torch.kron(torch.linalg.inv(self.colour), self.space.precision)

    def with_precision(self, matrix: Tensor) -> Tensor:
        inverse, space = torch.linalg.inv(self.colour), self.space.precision
        size = (len(inverse), len(space))
        blocks = matrix.unflatten(1, size).unflatten(3, size)
        for i, row in enumerate(inverse):
            for j, value in enumerate(row):
                blocks[:, i, :, j].addcmul_(value, space)
        return matrix

    def energy(self, x: Tensor) -> Tensor:
        rest = (x - self.mean).reshape(len(x), len(self.colour), -1)
        by_colour = torch.linalg.solve_triangular(
            torch.linalg.cholesky(self.colour), rest, upper=False
        )
        both = torch.linalg.solve_triangular(self.space.factor, by_colour.mT, upper=False)
        return both.square().sum((1, 2))

    @cached_property
    def log_det(self) -> Tensor:
        colour = torch.linalg.slogdet(self.colour)[1]
        return colour * len(self.space.covariance) + self.space.log_det * len(self.colour)


class Rows:
    """Rows of a linear system, and their products with covariances, each made once.

    Parameters
    ----------
    jacobian : Tensor, float64, shape (N, m, n)
    """

    def __init__(self, jacobian: Tensor):
        self.jacobian = jacobian
        self._grams: dict[int, tuple[Gaussian, Tensor]] = {}
        self._colours: dict[int, tuple[Gaussian, Tensor, Tensor]] = {}
        self._normal: Tensor | None = None

    def gram(self, prior: Gaussian) -> Tensor:
        """Return ``J S J^T``, shape (N, m, m)."""
        if isinstance(prior, KroneckerGaussian):
            return self._by_colour(prior)
        if id(prior) not in self._grams:  # the prior is kept: its id stays its own
            self._grams = {
                id(prior): (prior, symmetric_product(prior.times(self.jacobian), self.jacobian))
            }
        return self._grams[id(prior)][1]

    def _by_colour(self, prior: KroneckerGaussian) -> Tensor:
        """Sum the products of the colours' principal axes.

        Priors that differ only in how much those axes vary share these products.
        """
        space, colour = prior.space, prior.colour
        if id(space) not in self._colours:
            axes = torch.linalg.eigh(colour)[1]
            rows = self.jacobian.reshape(*self.jacobian.shape[:2], len(colour), -1)
            parts = torch.einsum("nmcs,ca->anms", rows, axes)
            grams = torch.stack(
                [symmetric_product(_product(p, space.covariance), p) for p in parts]
            )
            self._colours[id(space)] = (space, axes, grams)
        _, axes, grams = self._colours[id(space)]
        share = axes.mT @ colour @ axes
        if float((share - share.diagonal().diag()).abs().max()) > 1e-9 * float(share.max()):
            return symmetric_product(prior.times(self.jacobian), self.jacobian)
        return torch.einsum("anij,a->nij", grams, share.diagonal())

    def normal(self, weights: Tensor) -> Tensor:
        """Return ``J^T diag(weights) J``, shape (N, n, n), for weights of shape (N, m)."""
        level = weights[:, :1]
        if bool((weights == level).all()):
            if self._normal is None:
                self._normal = symmetric_product(self.jacobian.mT, self.jacobian.mT)
            return self._normal * level.unsqueeze(2)
        return symmetric_product((self.jacobian * weights.unsqueeze(2)).mT, self.jacobian.mT)


class Measurements:
    """Linear measurements ``J x = target`` with independent errors, under a prior.

    Parameters
    ----------
    rows : Rows
    deviation : Tensor, shape (N, m)
        Standard deviations of the errors.
    prior : Gaussian

    Notes
    -----
    Works with the m x m matrix ``J S J^T + 1`` of rows in units of their errors where there
    are fewer measurements than unknowns, else with the n x n matrix ``J^T J + S^-1``.
    """

    def __init__(self, rows: Rows, deviation: Tensor, prior: Gaussian):
        self.rows, self.deviation, self.prior = rows, deviation, prior
        self.dual = rows.jacobian.shape[1] <= rows.jacobian.shape[2]
        if self.dual:
            matrix = rows.gram(prior) / deviation.unsqueeze(2) / deviation.unsqueeze(1)
            matrix.diagonal(dim1=1, dim2=2).add_(1.0)
        else:
            matrix = prior.with_precision(rows.normal(deviation**-2))
        self._factor = cholesky(matrix)

    def _rest(self, target: Tensor) -> Tensor:
        mean = self.prior.mean.expand(len(target), -1).unsqueeze(2)
        return (target - (self.rows.jacobian @ mean)[:, :, 0]) / self.deviation

    def _back(self, rest: Tensor) -> Tensor:
        """Return ``J^T rest`` of rows in units of their errors, shape (N, n)."""
        return ((rest / self.deviation).unsqueeze(1) @ self.rows.jacobian)[:, 0]

    def posterior_mean(self, target: Tensor) -> Tensor:
        """Return the mean of ``x``, shape (N, n), given ``J x = target``, shape (N, m)."""
        rest = self._rest(target)
        if self.dual:
            weights = torch.cholesky_solve(rest.unsqueeze(2), self._factor)[:, :, 0]
            step = self.prior.times(self._back(weights).unsqueeze(1))[:, 0]
        else:
            step = torch.cholesky_solve(self._back(rest).unsqueeze(2), self._factor)[:, :, 0]
        return self.prior.mean + step

    def covariance(self) -> Tensor:
        """Return the posterior covariance, shape (N, n, n)."""
        if not self.dual:
            return torch.cholesky_inverse(self._factor)
        cross = self.prior.times(self.rows.jacobian) / self.deviation.unsqueeze(2)
        half = torch.linalg.solve_triangular(self._factor, cross, upper=False)
        return self.prior.covariance - half.mT @ half

    def log_evidence(self, target: Tensor) -> Tensor:
        """Return the log probability of each target, up to a constant, shape (N,).

        All variances, of prior and errors, are multiplied by what is best for each target.

        Parameters
        ----------
        target : Tensor, shape (N, m)
        """
        rest = self._rest(target)
        log_det = 2 * self._factor.diagonal(dim1=1, dim2=2).log().sum(1)
        half = (rest if self.dual else self._back(rest)).unsqueeze(2)
        square = torch.linalg.solve_triangular(self._factor, half, upper=False).square().sum((1, 2))
        if not self.dual:
            square = rest.square().sum(1) - square
            log_det = log_det + self.prior.log_det
        count = self.deviation.isfinite().sum(1)  # others say nothing
        return -0.5 * (count * (square / count).clamp_min(1e-300).log() + log_det)
