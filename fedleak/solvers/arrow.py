"""Cholesky factors of arrow matrices: block tridiagonal with a border. Batched, no waiting."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.solvers.gaussian import symmetric_product


class Arrow:
    """The factors of ``[[T, R], [R^T, Q]]``, with ``T`` block tridiagonal.

    Systems of convolutions have this form: what lies in one strip of an image meets the strips
    beside it only, and few equations meet all of it. Everything is matrix products and batched
    factorisations, as many as there are strips, whatever the number M of matrices; inverses of
    small triangles take the place of substitutions, which are slow. What is not positive
    definite comes out as NaN, not as an error: nothing is waited for.

    Parameters
    ----------
    diagonal : Tensor, shape (M, k, b, b)
        Blocks of ``T``, of which the lower triangles are read.
    right : Tensor, shape (M, k, b, q + b), or (M, k, b, q) where ``T`` is block diagonal
        ``R``, and beside it the blocks right of the diagonal, the last of which is not read.
        Overwritten.
    corner : Tensor, shape (N, q, q)
        ``Q``; or ``-Q``, for a negative ``sign``. M / N of the matrices, one after the other,
        share a corner.
    sign : float
        1 where all is positive definite, -1 where the corner is negative definite.
    """

    def __init__(self, diagonal: Tensor, right: Tensor, corner: Tensor, sign: float = 1.0):
        q, strips = corner.shape[-1], diagonal.shape[1]
        self._sign, self._coupled = sign, right.shape[3] > q
        self._border, self._beside = right[..., :q], right[..., q:]
        eye = torch.eye(diagonal.shape[2]).to(diagonal)
        self._inverse = torch.empty_like(diagonal)  # of the lower triangles
        for i in range(strips):
            block = diagonal[:, i]
            if i and self._coupled:
                above = self._beside[:, i - 1]
                block = block - above.mT @ above
                self._border[:, i] -= above.mT @ self._border[:, i - 1]
            factor = torch.linalg.cholesky_ex(block)[0]
            inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
            self._inverse[:, i] = inverse
            right[:, i] = inverse @ right[:, i]
        self._flat = self._border.reshape(len(corner), -1, q)
        schur = corner - sign * symmetric_product(self._flat.mT, self._flat.mT)
        self._corner = torch.linalg.cholesky_ex(schur)[0]

    def solve(self, own: Tensor, shared: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the solution for a right side of shapes (M, k, b) and (N, q), or 0 there."""
        y = own.unsqueeze(3).clone()
        for i in range(y.shape[1]):
            if i and self._coupled:
                y[:, i] -= self._beside[:, i - 1].mT @ y[:, i - 1]
            y[:, i] = self._inverse[:, i] @ y[:, i]
        rest = -(self._flat.mT @ y.reshape(len(self._flat), -1, 1))
        if shared is not None:
            rest += shared.unsqueeze(2)
        found = self._sign * torch.cholesky_solve(rest, self._corner)
        y -= (self._flat @ found).reshape(y.shape)
        for i in reversed(range(y.shape[1])):
            if i + 1 < y.shape[1] and self._coupled:
                y[:, i] -= self._beside[:, i] @ y[:, i + 1]
            y[:, i] = self._inverse[:, i].mT @ y[:, i]
        return y.squeeze(3), found.squeeze(2)
