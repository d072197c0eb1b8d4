"""The numerical rank of a layer's system ``U = [A; K(e)]``, through its structure.

``A`` is sparse, and its Gram matrix banded. ``K`` is block diagonal over a group's input
channels with identical blocks, so that one block is factored for all of them. Often the
ranks of the two alone decide; if not, what remains is the rank of ``A`` on the null space
of ``K``, one dense symmetric matrix as large as the shorter side of ``A``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from fedleak.metric.rank_linalg import (
    TOLERANCE,
    counted,
    dense_rank,
    is_definite,
    largest_eigenvalue,
    row_space,
)
from fedleak.metric.rank_structure import (
    generic_block,
    gradient_block,
    is_decoupled,
    reach,
    relations,
    stride_classes,
    weight_rows,
)
from fedleak.systems import Affine
from fedleak.systems.conv import Conv


@dataclass(frozen=True)
class Effort:
    """What a rank may cost.

    Attributes
    ----------
    most : float
        Multiplications of one factorisation.
    joint : bool
        Whether to factor the two blocks together; their own ranks bound what they have
        together, and often decide it.
    """

    most: float = np.inf
    joint: bool = True

    def allows(self, side: int) -> bool:
        """Return whether a dense symmetric matrix of this side may be factored."""
        return side**3 <= self.most


#: A certificate in a fraction of a second, and the closed form where there is none.
FAST = Effort(2e9, joint=False)
#: Seconds for a layer.
AFFORDABLE = Effort(6e10)
#: Whatever it takes.
EXACT = Effort()


@dataclass(frozen=True)
class Ranks:
    """Ranks of the weight rows ``A`` alone, of the gradient rows ``K(e)`` alone, and of both.

    Attributes
    ----------
    weight, gradient, joint : int
    exact : bool
        Whether these are numerical ranks. If not, ``joint`` is the least upper bound found.
    """

    weight: int
    gradient: int
    joint: int
    exact: bool = True

    def __add__(self, other: Ranks) -> Ranks:
        return Ranks(
            self.weight + other.weight,
            self.gradient + other.gradient,
            self.joint + other.joint,
            self.exact and other.exact,
        )


def numerical_ranks(
    layer: Affine, e: Tensor, rows: csr_matrix | None = None, effort: Effort = EXACT
) -> Ranks:
    """Return the numerical ranks of a layer's system for one ``e``.

    Parameters
    ----------
    layer : Affine
    e : Tensor, shape (*out_shape)
        ``dL/dz`` of one example.
    rows : csr_matrix, shape (equations, outputs), optional
        What is known of the layer's outputs, in equations of one filter's outputs each;
        default: every output.
    effort : Effort
        Beyond it, counts take the place of factorisations, and the result says so.

    Returns
    -------
    Ranks
        Numbers of singular values above ``1e-7`` times the largest of their block.
    """
    e = e.detach().double().cpu()
    if not isinstance(layer, Conv):
        return _fully_connected(layer, e, rows)
    total = Ranks(0, 0, 0)
    filters = layer.out_shape[0] // layer.groups
    size = filters * e[0].numel()
    for g in range(layer.groups):
        known = None
        if rows is not None:
            known = rows[:, g * size : (g + 1) * size]
            known = known[np.diff(known.indptr) > 0]
        own = e[g * filters : (g + 1) * filters]
        total += _Group(layer, g, own, known, effort).ranks()
    return total


def selection(known: Tensor) -> csr_matrix:
    """Return the rows of the identity that pick the ``known`` outputs."""
    mask = known.detach().flatten().cpu().numpy()
    picked = np.flatnonzero(mask)
    ones = np.ones(len(picked))
    return csr_matrix((ones, (np.arange(len(picked)), picked)), (len(picked), len(mask)))


def _fully_connected(layer: Affine, e: Tensor, rows: csr_matrix | None) -> Ranks:
    """``K(e) x = e x^T`` alone gives ``x``."""
    weight = layer.weight[0].cpu()
    if rows is not None:
        weight = torch.from_numpy(rows @ weight.numpy())
    gradient = layer.unknowns if bool((e != 0).any()) else 0
    rank = dense_rank(weight)
    return Ranks(rank, gradient, max(rank, gradient))


class _Group:
    """The system of one group of a convolution.

    Attributes
    ----------
    a : csr_matrix, shape (equations, channels * pixels)
        The weight rows of what is known.
    block : Tensor, shape (live filters * offsets, pixels)
        One input channel's block of ``K(e)``.
    full : int
        Unknowns that any row reads.
    """

    def __init__(
        self, layer: Conv, group: int, e: Tensor, known: csr_matrix | None, effort: Effort
    ):
        self.layer, self.effort = layer, effort
        self.filters, self.e = len(e), e.flatten(1)[(e != 0).flatten(1).any(1)]
        self.known = known
        self.all_rows = weight_rows(layer, group)
        a = self.all_rows if known is None else known @ self.all_rows
        self.a = a[np.diff(a.indptr) > 0]
        self.block = gradient_block(layer, self.e)
        self.pixels = self.block.shape[1]
        self.channels = a.shape[1] // self.pixels
        self.largest = largest_eigenvalue(self.a)
        self.reached = np.bincount(self.a.indices, minlength=a.shape[1]) > 0
        read = self.reached.reshape(self.channels, -1) | (self.block != 0).any(0).numpy()
        self.full = int(read.sum())

    def ranks(self) -> Ranks:
        weight, weight_sure = self._weight_rank()
        basis = self._basis()
        if basis is None:
            gradient = self.channels * generic_block(stride_classes(self.layer), len(self.e))
        else:
            gradient = self.channels * len(basis)
        sure = weight_sure and basis is not None
        if sure and (gradient == 0 or max(weight, gradient) == self.full):
            return Ranks(weight, gradient, max(weight, gradient))
        if weight_sure and weight == self.full:
            return Ranks(weight, gradient, weight, False)
        if sure and self.effort.joint and self.effort.allows(min(self.a.shape)):
            assert basis is not None
            return Ranks(weight, gradient, gradient + self._rest_rank(basis))
        most = self._most(weight, gradient)
        proven = most <= max(weight, gradient)
        if self.known is None and weight == self.a.shape[0]:
            proven |= is_decoupled(self.layer)
        return Ranks(weight, gradient, max(most, weight, gradient), sure and proven)

    def _weight_rank(self) -> tuple[int, bool]:
        """Return the rank of ``A``, and whether it is certain."""
        a = self.a[:, self.reached]
        gram = (a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a).tocsr()
        if is_definite(gram, self.largest, self.effort.most):
            return int(gram.shape[0]), True
        if not self.effort.allows(gram.shape[0]):
            return int(gram.shape[0]), False
        rank = counted(torch.from_numpy(gram.toarray()), self.largest)
        if rank is None:
            rank = _svd_rank(torch.from_numpy(a.toarray()), self.largest)
        return rank, True

    def _basis(self) -> Tensor | None:
        """Return a basis of the row space of ``K``'s block; None if it is too large."""
        rows, pixels = self.block.shape
        if min(rows, pixels) * rows * pixels > self.effort.most:
            return None
        return row_space(self.block)

    def _most(self, weight: int, gradient: int) -> int:
        """Return an upper bound of the joint rank, which generic systems reach."""
        tied = relations(self.e, self.known, self.filters)
        classes = stride_classes(self.layer)
        positions = self.e.shape[1]
        limit = positions
        if gradient == self.channels * generic_block(classes, len(self.e)):
            limit = min(limit, reach(classes, len(self.e)))
        if self.known is None:
            equations = [positions] * self.filters
        else:
            place = self.known.indices[self.known.indptr[:-1]] // positions
            equations = np.bincount(place, minlength=self.filters).tolist()
        left = sum(min(m - len(r), limit) for m, r in zip(equations, tied, strict=True))
        return min(self.full, gradient + left, gradient + weight - self._shared(tied, weight))

    def _shared(self, tied: list[np.ndarray], weight: int) -> int:
        """Return the dimension of the relations, as rows of both ``A`` and ``K``."""
        count = sum(map(len, tied))
        if weight == self.a.shape[0]:
            return count
        if count**2 * self.all_rows.shape[1] > self.effort.most:
            return 0
        size = self.e.shape[1]
        rows = [self.all_rows[g * size : (g + 1) * size].T @ r.T for g, r in enumerate(tied)]
        return dense_rank(torch.from_numpy(np.concatenate(rows, 1)))

    def _rest_rank(self, basis: Tensor) -> int:
        """Return the rank of ``A`` on the null space of ``K``."""
        a = self.a
        if a.shape[0] <= a.shape[1]:
            q = basis.mT.numpy()
            starts = range(0, a.shape[1], self.pixels)
            inside = np.concatenate([a[:, i : i + self.pixels] @ q for i in starts], 1)
            within = torch.from_numpy(inside)
            gram = torch.from_numpy((a @ a.T).toarray()).addmm_(within, within.mT, alpha=-1)
        else:
            gram = torch.from_numpy((a.T @ a).toarray())
            for _ in range(2):  # from the right, then from the left
                gram = _without(gram, basis).mT
        rank = counted(gram, self.largest)
        if rank is None:
            return _svd_rank(_without(torch.from_numpy(a.toarray()), basis), self.largest)
        return rank


def _without(m: Tensor, basis: Tensor) -> Tensor:
    """Return the rows of ``m`` without their part in the row space of ``K``."""
    split = m.reshape(-1, basis.shape[1])
    return (split - (split @ basis.mT) @ basis).reshape(m.shape)


def _svd_rank(m: Tensor, largest: float) -> int:
    return int((torch.linalg.svdvals(m) > TOLERANCE * largest**0.5).sum())
