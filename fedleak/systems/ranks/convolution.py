"""The numerical rank of a convolution's system ``U = [A; K(e)]``, through its structure.

``A`` is sparse, and its Gram matrix banded. ``K`` is block diagonal over a group's input
channels with identical blocks, so that one block is factored for all of them. Often the
ranks of the two alone decide; if not, what remains is the rank of ``A`` on the null space
of ``K``, one dense symmetric matrix as large as the shorter side of ``A``.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from fedleak.systems.ranks.blocks import Effort, Ranks
from fedleak.systems.ranks.linalg import (
    TOLERANCE,
    count_above,
    counted,
    dense_rank,
    gram_matrix,
    is_definite,
    largest_eigenvalue,
    row_space,
)
from fedleak.systems.ranks.structure import (
    generic_block,
    gradient_block,
    is_decoupled,
    reach,
    relations,
    stride_classes,
    weight_rows,
)
from fedleak.systems.windows import Windows


def convolution_ranks(
    windows: Windows, weight: Tensor, e: Tensor, rows: csr_matrix | None, effort: Effort
) -> Ranks:
    """Return the numerical ranks of a convolution's system for one ``e``.

    Parameters
    ----------
    windows : Windows
    weight : Tensor, shape (groups, filters, fan_in)
    e : Tensor, shape (groups * filters, rows, columns)
    rows, effort
        As of :meth:`fedleak.systems.System.block_ranks`.
    """
    total = Ranks(0, 0, 0)
    filters = weight.shape[1]
    size = filters * e[0].numel()
    for g, own in enumerate(weight):
        known = None
        if rows is not None:
            known = rows[:, g * size : (g + 1) * size]
            known = known[np.diff(known.indptr) > 0]
        total += _Group(windows, own, e[g * filters : (g + 1) * filters], known, effort).ranks()
    return total


class _Group:
    """The system of one group of a convolution.

    Attributes
    ----------
    e : Tensor, shape (live filters, positions)
    equations : list of int
        What is known of each filter's outputs.
    block : Tensor, shape (live filters * offsets, pixels)
        One input channel's block of ``K(e)``.
    all_rows, a : csr_matrix, shape (equations, channels * pixels), or None
        The weight rows of all outputs and of what is known; None if they are too many.
    full : int
        Unknowns that any row reads.
    """

    def __init__(
        self,
        windows: Windows,
        weight: Tensor,
        e: Tensor,
        known: csr_matrix | None,
        effort: Effort,
    ):
        self.windows, self.weight = windows, weight
        self.effort, self.known = effort, known
        self.filters, self.e = len(e), e.flatten(1)[(e != 0).flatten(1).any(1)]
        self.classes = stride_classes(windows)
        self.channels = weight.shape[1] // (windows.kernel[0] * windows.kernel[1])
        positions = self.e.shape[1]
        if known is None:
            self.equations = [positions] * self.filters
        else:
            place = known.indices[known.indptr[:-1]] // positions
            self.equations = np.bincount(place, minlength=self.filters).tolist()
        self.full = self.channels * sum(n for _, n in self.classes)
        self.a: csr_matrix | None = None
        self.generic = self.channels * generic_block(self.classes, len(self.e))

    def _build(self) -> None:
        """Set ``A`` and its Gram matrix, unless they take too much."""
        if sum(self.equations) * self.weight.shape[1] ** 2 > self.effort.sparse:
            return
        self.all_rows = weight_rows(self.windows, self.weight)
        a = self.all_rows if self.known is None else self.known @ self.all_rows
        self.a = a[np.diff(a.indptr) > 0]
        self.gram = gram_matrix(self.a)
        self.largest = largest_eigenvalue(self.gram)

    def ranks(self) -> Ranks:
        """Return the ranks: proven, factored or counted, as the effort allows."""
        basis = self._basis() if self.effort.both or self.generic == self.full else None
        gradient = self.generic if basis is None else self.channels * len(basis)
        told = basis is not None and gradient == self.full
        if told and not self.effort.both:
            return Ranks(min(sum(self.equations), self.full), gradient, gradient)
        self._build()
        weight, sure = self._weight_rank()
        if told or (sure and weight == self.full):
            return Ranks(weight, gradient, self.full)
        if basis is None:
            basis = self._basis()
            gradient = self.generic if basis is None else self.channels * len(basis)
        least = max(weight, gradient)
        most = max(least, self._most(weight, gradient))
        if basis is None or self.a is None:
            return Ranks(weight, gradient, most, False)
        if sure and (most == least or self._is_decoupled(weight)):
            return Ranks(weight, gradient, most)
        rest = self._rest_rank(self.a, basis)
        return Ranks(weight, gradient, most if rest is None else gradient + rest, rest is not None)

    def _is_decoupled(self, weight: int) -> bool:
        """Return whether the patches share nothing: then their relations are all there are."""
        return self.known is None and weight == sum(self.equations) and is_decoupled(self.windows)

    def _weight_rank(self) -> tuple[int, bool]:
        """Return the rank of ``A``, and whether it is certain."""
        if self.a is None:
            return min(sum(self.equations), self.full), False
        a, gram, pixels = self.a, self.gram, self.a.shape[1] // self.channels
        if a.shape[0] <= a.shape[1]:  # in the order of each row's first pixel
            key = _first(a.indices % pixels, a.indptr)
        else:
            read = np.bincount(a.indices, minlength=a.shape[1]) > 0
            key = np.flatnonzero(read) % pixels
            a, gram = a[:, read], gram[read][:, read]
        side = int(gram.shape[0])
        if is_definite(gram, self.largest, key, self.effort.dense):
            return side, True
        if side**3 > self.effort.dense:
            return side, False
        rank = counted(torch.from_numpy(gram.toarray()), self.largest)
        if rank is not None:
            return rank, True
        if sum(a.shape) ** 3 > self.effort.dense:
            return side, False
        return count_above(torch.from_numpy(a.toarray()), TOLERANCE * self.largest**0.5), True

    def _basis(self) -> Tensor | None:
        """Return a basis of the row space of ``K``'s block; None if that is too large."""
        rows = len(self.e) * self.windows.kernel[0] * self.windows.kernel[1]
        pixels = self.windows.area
        if min(rows, pixels) * rows * pixels > self.effort.dense:
            return None
        return row_space(gradient_block(self.windows, self.e))

    def _most(self, weight: int, gradient: int) -> int:
        """Return an upper bound of the joint rank, which generic systems reach."""
        tied = relations(self.e, self.known, self.filters)
        limit = self.e.shape[1]
        if gradient == self.generic:
            limit = min(limit, reach(self.windows, len(self.e)))
        left = sum(min(m - len(r), limit) for m, r in zip(self.equations, tied, strict=True))
        return min(self.full, gradient + left, gradient + weight - self._shared(tied, weight))

    def _shared(self, tied: list[np.ndarray], weight: int) -> int:
        """Return the dimension of the relations, as rows of both ``A`` and ``K``."""
        count = sum(map(len, tied))
        if weight == sum(self.equations) or self.a is None:
            return count
        if count**2 * self.a.shape[1] > self.effort.dense:
            return 0
        size = self.e.shape[1]
        rows = [self.all_rows[g * size : (g + 1) * size].T @ r.T for g, r in enumerate(tied)]
        return dense_rank(torch.from_numpy(np.concatenate(rows, 1)))

    def _rest_rank(self, a: csr_matrix, basis: Tensor) -> int | None:
        """Return the rank of ``A`` on the null space of ``K``; None if it takes too much."""
        if min(a.shape) ** 3 > self.effort.joint:
            return None
        if a.shape[0] <= a.shape[1]:
            q, pixels = basis.mT.numpy(), basis.shape[1]
            parts = [a[:, i : i + pixels] @ q for i in range(0, a.shape[1], pixels)]
            inside = torch.from_numpy(np.concatenate(parts, 1))
            gram = torch.from_numpy(self.gram.toarray()).addmm_(inside, inside.mT, alpha=-1)
        else:
            gram = torch.from_numpy(self.gram.toarray())
            for _ in range(2):  # from the right, then from the left
                gram = _without(gram, basis).mT
        rank = counted(gram, self.largest)
        if rank is None and sum(a.shape) ** 3 <= self.effort.joint:
            rest = _without(torch.from_numpy(a.toarray()), basis)
            rank = count_above(rest, TOLERANCE * self.largest**0.5)
        return rank


def _without(m: Tensor, basis: Tensor) -> Tensor:
    """Return the rows of ``m`` without their part in the row space of ``K``."""
    split = m.reshape(-1, basis.shape[1])
    return (split - (split @ basis.mT) @ basis).reshape(m.shape)


def _first(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the least value of each row of a sparse matrix without empty rows."""
    return np.minimum.reduceat(values, starts[:-1]) if len(starts) > 1 else values[:0]
