"""The input of a convolution from its gradient, where the derivative by its output is known.

The gradient of a convolution's weight is linear in its input: ``K(e) x = G``, with ``e`` the
derivative of the loss by the output. For every input channel it is the same small matrix, of
``C_out * taps`` rows and ``B * H * W`` columns: one factorisation serves all channels. With
groups there is one such matrix for each. (Chen & Campbell, BMVC 2022, call these the gradient
constraints of a layer.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.graph.kernels.geometry import Geometry
from fedleak.precision import HALF

#: Singular values below this, relative to the largest, tell nothing under float32's rounding.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True, eq=False)
class Rows:
    """The gradient rows of one convolution.

    Attributes
    ----------
    gradient : Tensor, shape (C_out, C_in / groups, kh, kw)
        Of the weight; for a batch the sum over its images (its mean, if ``cotangent`` is that of
        the mean loss).
    cotangent : Tensor, shape (B, C_out, H_out, W_out)
        Derivative of the loss by the output, image by image.
    geometry : Geometry
    """

    gradient: Tensor
    cotangent: Tensor
    geometry: Geometry

    def __post_init__(self) -> None:
        geometry, (out, *_) = self.geometry, self.gradient.shape
        expected = (out, *geometry.out)
        if self.cotangent.dim() != 4 or tuple(self.cotangent.shape[1:]) != expected:
            raise InvalidInputError(
                f"a cotangent of shape {tuple(self.cotangent.shape)}; "
                f"the geometry and the gradient say (images, {', '.join(map(str, expected))})"
            )
        if tuple(self.gradient.shape[2:]) != geometry.kernel:
            raise InvalidInputError(
                f"a gradient of shape {tuple(self.gradient.shape)}; "
                f"the geometry's kernel is {geometry.kernel}"
            )

    @property
    def scale(self) -> Tensor:
        """What the rows of each filter are divided by, (C_out,): rounding goes with their size."""
        size = self.cotangent.double().square().sum((0, 2, 3)).sqrt()
        return size.clamp_min(1e-6 * size.max().clamp_min(1e-300))

    def system(self) -> tuple[Tensor, Tensor]:
        """Return the matrix and the right sides, of each group.

        Returns
        -------
        matrix : Tensor, shape (groups, C_out / groups * taps, B * H * W)
        right : Tensor, shape (groups, C_out / groups * taps, C_in / groups)
        """
        geometry = self.geometry
        matrix = cotangent_matrix(self.cotangent, geometry)
        weight = 1 / self.scale
        matrix = matrix * weight[:, None, None]
        right = self.gradient.double().flatten(2).mT * weight[:, None, None]
        matrix = matrix.unflatten(0, (geometry.groups, -1)).flatten(1, 2)
        return matrix, right.unflatten(0, (geometry.groups, -1)).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class RowsSolution:
    """An input found from gradient rows.

    Attributes
    ----------
    values : Tensor, float64, shape (B, C_in, H, W)
        The least-norm one where the rows leave directions open.
    residual : float
        ``||K(e) x - G|| / ||G||``, rows weighed as they were solved.
    condition : float
        Least singular value that counts over the largest, of the worst group.
    open : int
        Directions of one channel's ``B * H * W`` values that no row tells, in the worst group.
    error : float
        Estimate of ``||x - truth|| / ||truth||``, from the residual (or float32's rounding,
        if that is larger) and the singular values. Infinite where directions are open.
    deviation : Tensor, shape (B, groups, H, W)
        Estimated standard deviation of a value at each position, in the values' own unit.
    """

    values: Tensor
    residual: float
    condition: float
    open: Tensor
    error: float
    deviation: Tensor


def cotangent_matrix(cotangent: Tensor, geometry: Geometry) -> Tensor:
    """Return the matrix of one input channel, (C_out, taps, B * H * W), in float64."""
    batch, out = cotangent.shape[:2]
    reads = geometry.reads.to(cotangent.device)
    index = torch.where(reads < 0, geometry.positions, reads)
    matrix = cotangent.new_zeros(
        out, geometry.taps, batch, geometry.positions + 1, dtype=torch.float64
    )
    entries = cotangent.double().flatten(2).transpose(0, 1).unsqueeze(1)
    shape = out, geometry.taps, batch, geometry.outputs
    matrix.scatter_add_(3, index[None, :, None, :].expand(shape), entries.expand(shape))
    return matrix[..., : geometry.positions].flatten(2)


def solve_rows(*parts: Rows, negligible: float = NEGLIGIBLE) -> RowsSolution:
    """Solve ``K(e) x = G`` for the input of one or more convolutions that read the same tensor.

    Parameters
    ----------
    *parts : Rows
        A block's convolution and, beside it, the 1x1 convolution of its shortcut. With more
        than one part all must have one group.
    negligible : float
        Singular values below this share of the largest are taken for zero.

    Returns
    -------
    RowsSolution

    Raises
    ------
    InvalidInputError
        The parts do not read the same tensor.
    """
    size, batch = _agree(parts)
    systems = [part.system() for part in parts]
    matrix = torch.cat([m for m, _ in systems], 1)
    right = torch.cat([r for _, r in systems], 1)
    solved, deviation, condition, null = least_squares(matrix, right, negligible)
    residual = _relative(matrix @ solved - right, right)
    values = solved.unflatten(1, (batch, -1)).permute(1, 0, 3, 2)  # (B, groups, C / groups, HW)
    deviation = deviation.unflatten(1, (batch, *size)).transpose(0, 1)
    error = float((deviation.square().mean() / values.square().mean().clamp_min(1e-300)).sqrt())
    return RowsSolution(
        values.flatten(1, 2).unflatten(2, size),
        residual,
        condition,
        null,
        float("inf") if null.shape[2] else error,
        deviation,
    )


def least_squares(
    matrix: Tensor, right: Tensor, negligible: float = NEGLIGIBLE
) -> tuple[Tensor, Tensor, float, Tensor]:
    """Solve a batch of least-squares problems, least-norm where rank is missing.

    Parameters
    ----------
    matrix : Tensor, shape (N, m, n)
    right : Tensor, shape (N, m, k)

    Returns
    -------
    solution : Tensor, shape (N, n, k)
    deviation : Tensor, shape (N, n)
        Standard deviation of a row of the solution, for errors of the right side of the size
        that the residual shows, at least :data:`HALF`.
    condition : float
        Least over largest singular value, of those that count.
    null : Tensor, shape (N, n, k)
        Orthonormal directions of those that do not; ``k`` is the most in a problem.
    """
    rows, n = matrix.shape[1:]
    triangle, reduced = matrix, right
    if rows > n:
        q, triangle = torch.linalg.qr(matrix)
        reduced = q.mT @ right
    u, s, vh = torch.linalg.svd(triangle, full_matrices=rows < n)
    u, s = u[:, :, : s.shape[1]], F.pad(s, (0, n - s.shape[1]))
    u = F.pad(u, (0, n - u.shape[2]))
    counts = s > negligible * s[:, :1]
    inverse = torch.where(counts, 1 / s.clamp_min(1e-300), 0.0)
    solution = vh.mT @ (inverse.unsqueeze(2) * (u.mT @ reduced))
    rank = int(counts.sum(1).min())
    null = (vh * ~counts.unsqueeze(2)).mT[:, :, rank:]
    left = (rows - counts.sum(1)).clamp_min(1).to(right)
    off = (matrix @ solution - right).square().sum(1).mean(1) / left  # variance of an entry
    floor = (HALF**2) * right.square().mean((1, 2))
    deviation = (vh.square() * inverse.square().unsqueeze(2)).sum(1)
    deviation = (deviation * off.maximum(floor).unsqueeze(1)).sqrt()
    least = torch.where(counts, s, torch.inf).amin(1) / s[:, 0].clamp_min(1e-300)
    return solution, deviation, float(least.min()), null


def _relative(off: Tensor, right: Tensor) -> float:
    return float(off.norm() / right.norm().clamp_min(1e-300))


def _agree(parts: Sequence[Rows]) -> tuple[tuple[int, int], int]:
    if not parts:
        raise InvalidInputError("no rows to solve: give at least one convolution's")
    read = {(p.geometry.size, len(p.cotangent), p.gradient.shape[1]) for p in parts}
    groups = {p.geometry.groups for p in parts}
    if len(read) > 1 or (len(parts) > 1 and groups != {1}):
        raise InvalidInputError(
            "the parts do not read the same tensor (input size, images, channels per group): "
            f"{sorted(map(str, read))}, groups {sorted(groups)}"
        )
    return parts[0].geometry.size, len(parts[0].cotangent)
