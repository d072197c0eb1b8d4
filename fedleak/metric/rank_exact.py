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
    count_above,
    counted,
    dense_rank,
    gram_matrix,
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
    """What the rank of one group of a layer may cost, in multiplications.

    Attributes
    ----------
    sparse : float
        Of the Gram matrix of ``A``; a sparse product takes about 10 ns for each.
    dense : float
        Of one factorisation.
    joint : float
        Of the factorisation of both blocks together. The blocks' own ranks bound the joint
        one, and often decide it.
    both : bool
        Whether to rank either block where the other one decides.
    """

    sparse: float = np.inf
    dense: float = np.inf
    joint: float = np.inf
    both: bool = True


#: Proofs in a fraction of a second, and the closed form where there are none.
FAST = Effort(2e8, 2e9, 2e8, both=False)
#: Seconds for a layer.
AFFORDABLE = Effort(3e8, 6e10, 6e10)
#: Whatever it takes.
EXACT = Effort()


@dataclass(frozen=True)
class Ranks:
    """Ranks of the weight rows ``A`` alone, of the gradient rows ``K(e)`` alone, and of both.

    Attributes
    ----------
    weight, gradient, joint : int
    exact : bool
        Whether ``joint`` is the numerical rank. If not, it is the least upper bound found.
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
        total += _Group(layer, own, known, effort).ranks(g)
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

    def __init__(self, layer: Conv, e: Tensor, known: csr_matrix | None, effort: Effort):
        self.layer, self.effort, self.known = layer, effort, known
        self.filters, self.e = len(e), e.flatten(1)[(e != 0).flatten(1).any(1)]
        self.classes = stride_classes(layer)
        self.channels = layer.in_shape[0] // layer.groups
        positions = self.e.shape[1]
        if known is None:
            self.equations = [positions] * self.filters
        else:
            place = known.indices[known.indptr[:-1]] // positions
            self.equations = np.bincount(place, minlength=self.filters).tolist()
        self.full = self.channels * sum(n for _, n in self.classes)
        self.a: csr_matrix | None = None
        self.generic = self.channels * generic_block(self.classes, len(self.e))

    def _build(self, group: int) -> None:
        """Set ``A`` and its Gram matrix, unless they take too much."""
        if sum(self.equations) * self.layer.weight.shape[2] ** 2 > self.effort.sparse:
            return
        self.all_rows = weight_rows(self.layer, group)
        a = self.all_rows if self.known is None else self.known @ self.all_rows
        self.a = a[np.diff(a.indptr) > 0]
        self.gram = gram_matrix(self.a)
        self.largest = largest_eigenvalue(self.gram)

    def ranks(self, group: int) -> Ranks:
        """Return the ranks: proven, factored or counted, as the effort allows."""
        basis = self._basis() if self.effort.both or self.generic == self.full else None
        gradient = self.generic if basis is None else self.channels * len(basis)
        told = basis is not None and gradient == self.full
        if told and not self.effort.both:
            return Ranks(min(sum(self.equations), self.full), gradient, gradient)
        self._build(group)
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
        return self.known is None and weight == sum(self.equations) and is_decoupled(self.layer)

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
        rows = len(self.e) * self.layer.windows.kernel[0] * self.layer.windows.kernel[1]
        pixels = self.layer.in_shape[1] * self.layer.in_shape[2]
        if min(rows, pixels) * rows * pixels > self.effort.dense:
            return None
        return row_space(gradient_block(self.layer, self.e))

    def _most(self, weight: int, gradient: int) -> int:
        """Return an upper bound of the joint rank, which generic systems reach."""
        tied = relations(self.e, self.known, self.filters)
        limit = self.e.shape[1]
        if gradient == self.generic:
            limit = min(limit, reach(self.layer, len(self.e)))
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
