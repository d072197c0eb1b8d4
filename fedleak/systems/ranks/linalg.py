"""Numerical ranks of sparse and structured matrices, decided without an SVD where that is safe.

A Gram matrix ``G = M M^T`` squares the singular values of ``M``, and float64 resolves its
eigenvalues to about ``1e-15`` of the largest. So an eigenvalue counts above ``1e-11`` of the
largest, does not below ``1e-14`` (:data:`TOLERANCE` squared), and between the two nothing is
decided here: the caller takes an SVD of ``M`` itself.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import reverse_cuthill_mckee
from torch import Tensor

#: A singular value counts when it exceeds this part of the largest one. A float32 gradient
#: says nothing about directions below it, and a Gram matrix in float64 resolves no smaller.
TOLERANCE = 1e-7
_ZERO, _SURE = 1e-14, 1e-11
_SPARSE_COST = 100  # of one multiplication, in those of a dense product
_SMALL = 500  # below this side, singular values take no time


def gram_matrix(m: csr_matrix) -> csr_matrix:
    """Return ``m m^T`` or ``m^T m``, the smaller of the two."""
    m = m if m.shape[0] <= m.shape[1] else m.T.tocsr()
    sparse = float(np.square(np.bincount(m.indices), dtype=np.float64).sum())
    if m.shape[0] ** 2 * float(m.shape[1]) < _SPARSE_COST * sparse:
        dense = torch.from_numpy(m.toarray())
        return csr_matrix((dense @ dense.mT).numpy())
    return (m @ m.T).tocsr()


def largest_eigenvalue(gram: csr_matrix) -> float:
    """Return the largest eigenvalue of a Gram matrix, from below and to a few percent."""
    v = np.random.default_rng(0).standard_normal(gram.shape[0])
    size = 0.0
    for _ in range(30 if gram.nnz else 0):
        v /= max(float(np.linalg.norm(v)), 1e-300)
        v = gram @ v
        size = float(np.linalg.norm(v))
    return size


def is_definite(
    gram: csr_matrix, largest: float, key: np.ndarray | None = None, most: float = np.inf
) -> bool:
    """Return whether all eigenvalues of a sparse Gram matrix certainly count.

    Cholesky of ``G - 1e-11 largest I`` exists only then, up to rounding of ``1e-15``. The
    Gram matrix of a convolution is banded once its unknowns are in a good order, so that
    this takes a small part of a dense factorisation.

    Parameters
    ----------
    gram : csr_matrix, shape (n, n)
    largest : float
        Its largest eigenvalue.
    key : array, shape (n,), optional
        An order to try beside that of Cuthill and McKee.
    most : float
        Multiplications to spend: beyond them the answer is no.
    """
    if gram.shape[0] == 0 or gram.nnz == 0:
        return gram.shape[0] == 0  # of zeros none counts
    entries = gram.tocoo()
    orders = [reverse_cuthill_mckee(gram, symmetric_mode=True)]
    if key is not None:
        orders.append(np.argsort(key, kind="stable"))
    places = [_inverse(order)[np.stack([entries.row, entries.col])] for order in orders]
    widths = [int((row - column).max()) for row, column in places]
    best = int(np.argmin(widths))
    if gram.shape[0] * float(widths[best]) ** 2 > most:
        return False
    ordered = csr_matrix((entries.data, tuple(places[best])), gram.shape)
    return _has_cholesky(ordered, max(widths[best], 64), _SURE * largest)


def _has_cholesky(m: csr_matrix, width: int, shift: float) -> bool:
    """Return whether ``m - shift I`` is positive definite; ``m`` has this half band width.

    Block by block: torch's products keep to its number of threads, which LAPACK's banded
    routine under scipy does not.
    """
    n, above = m.shape[0], torch.zeros(0)
    for begin in range(0, n, width):
        end = min(begin + width, n)
        rows = m[begin : min(end + width, n)]
        block = torch.from_numpy(rows[:, begin:end].toarray())
        size = end - begin
        corner = block[:size]
        corner.diagonal().sub_(shift)
        if begin:
            corner.addmm_(above, above.mT, alpha=-1)
        factor, info = torch.linalg.cholesky_ex(corner)
        if int(info) != 0:
            return False
        above = torch.linalg.solve_triangular(factor.mT, block[size:], upper=True, left=False)
    return True


def _inverse(order: np.ndarray) -> np.ndarray:
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return place


def counted(gram: Tensor, largest: float) -> int | None:
    """Return how many eigenvalues of a dense Gram matrix count; None if that is not clear.

    Parameters
    ----------
    gram : Tensor, float64, shape (n, n)
    largest : float
        The squared singular value to compare with.
    """
    if len(gram) == 0 or largest == 0:
        return 0
    sure, possible = (_above(gram, bound * largest) for bound in (_SURE, _ZERO))
    return sure if sure == possible else None


def _above(gram: Tensor, bound: float) -> int:
    """Return the number of eigenvalues above ``bound``, by Sylvester's law of inertia.

    ``L D L^T`` takes a tenth of the time of the eigenvalues.
    """
    shifted = gram.clone()
    shifted.diagonal().sub_(bound)
    factor, pivots = torch.linalg.ldl_factor(shifted)
    single = pivots > 0  # a 2 x 2 block has an eigenvalue of either sign
    return int((factor.diagonal()[single] > 0).sum()) + int((~single).sum()) // 2


def count_above(m: Tensor, bound: float) -> int:
    """Return how many singular values of a dense matrix exceed ``bound``, without squares.

    ``[[0, M], [M^T, 0]]`` has them as eigenvalues, with both signs: for large matrices its
    inertia takes a third of the time of the singular values.
    """
    if min(m.shape) <= _SMALL:
        return int((torch.linalg.svdvals(m) > bound).sum())
    if m.shape[0] < m.shape[1]:
        m = m.mT
    if 2 * m.shape[0] > 3 * m.shape[1]:
        m = torch.linalg.qr(m, mode="r").R
    rows, columns = m.shape
    both = m.new_zeros(rows + columns, rows + columns)
    both[rows:, :rows] = m.mT
    both[:rows, rows:] = m
    return _above(both, bound)


def dense_rank(m: Tensor) -> int:
    """Return the numerical rank of a dense matrix."""
    if m.numel() == 0:
        return 0
    gram = m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m
    if _is_definite(gram):
        return len(gram)
    values = torch.linalg.svdvals(m)
    return int((values > TOLERANCE * values[0]).sum())


def row_space(m: Tensor) -> Tensor:
    """Return an orthonormal basis of a dense matrix's rows, shape (rank, n)."""
    if m.numel() == 0:
        return m[:0]
    rows, n = m.shape
    touched = (m != 0).any(0)
    if not bool(touched.all()):  # fewer columns, and perhaps a full rank among them
        basis = row_space(m[:, touched])
        return m.new_zeros(len(basis), n).masked_scatter_(touched.expand(len(basis), n), basis)
    if rows >= n and _is_definite(m.mT @ m):
        return torch.eye(n, dtype=m.dtype)
    if rows < n and _is_definite(m @ m.mT):
        return torch.linalg.qr(m.mT).Q.mT
    _, values, vectors = torch.linalg.svd(m, full_matrices=False)
    return vectors[values > TOLERANCE * values[0]]


def _is_definite(gram: Tensor) -> bool:
    """As :func:`is_definite`, dense; the trace stands for the largest eigenvalue."""
    shifted = gram - _SURE * gram.trace() * torch.eye(len(gram), dtype=gram.dtype)
    return int(torch.linalg.cholesky_ex(shifted).info) == 0
