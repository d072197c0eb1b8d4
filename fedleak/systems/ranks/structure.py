"""The matrices of a convolution's system, sparse, and what can be counted in them."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix, identity
from scipy.sparse.linalg import splu
from torch import Tensor

from fedleak.systems.ranks.linalg import row_space
from fedleak.systems.windows import Windows

# Part of a vector that may be left when it is said to lie in a space.
_OUTSIDE = 1e-6


def weight_rows(windows: Windows, weight: Tensor) -> csr_matrix:
    """Return ``A`` of one group as a sparse matrix, shape (filters * positions, inputs).

    Parameters
    ----------
    windows : Windows
    weight : Tensor, shape (filters, fan_in)
    """
    values = weight.cpu().numpy()
    filters = len(values)
    index = windows.pixels(torch.device("cpu")).numpy()
    channels, pixels = values.shape[1] // len(index), windows.area
    offset, position = (index < pixels).nonzero()
    f, c = np.arange(filters)[:, None, None], np.arange(channels)[None, :, None]
    values = values.reshape(filters, channels, -1)[:, :, offset]
    row = np.broadcast_to(f * index.shape[1] + position, values.shape)
    column = np.broadcast_to(c * pixels + index[offset, position], values.shape)
    shape = (filters * index.shape[1], channels * pixels)
    return csr_matrix((values.ravel(), (row.ravel(), column.ravel())), shape)


def gradient_block(windows: Windows, e: Tensor) -> Tensor:
    """Return one input channel's block of ``K(e)``, shape (filters * offsets, pixels).

    Parameters
    ----------
    windows : Windows
    e : Tensor, shape (filters, positions)
        Of filters that have a gradient.
    """
    pixels = windows.area
    index = windows.pixels(e.device)
    block = e.new_zeros(len(e), len(index), pixels + 1)
    block.scatter_(2, index.expand(len(e), -1, -1), e.unsqueeze(1).expand(-1, len(index), -1))
    return block[..., :pixels].flatten(0, 1)


def is_decoupled(windows: Windows) -> bool:
    """Return whether no two patches share a pixel, and none is cut off by padding."""
    index = windows.pixels(torch.device("cpu"))
    pixels = windows.area
    return bool((index < pixels).all()) and len(index.unique()) == index.numel()


def stride_classes(windows: Windows) -> list[tuple[int, int]]:
    """Return, per stride class, the kernel's offsets and the pixels that they reach.

    An offset reads the pixels whose place, modulo the stride, is its own: the blocks of
    ``K`` fall apart by class.
    """
    return [(oi * oj, pi * pj) for (oi, pi), (oj, pj) in map(_sizes, _classes(windows))]


def generic_block(classes: list[tuple[int, int]], filters: int) -> int:
    """Return the rank of a channel's block of ``K`` where the errors are generic."""
    return sum(min(filters * o, n) for o, n in classes)


def reach(windows: Windows, filters: int) -> int:
    """Return how many outputs of a filter the null space of a generic ``K`` can move.

    They lie in the span of that null space's shifts by the kernel's offsets. Stride classes
    of one shape have the same block of ``K``, and so the same shifts.
    """
    sizes = map(_sizes, set(_classes(windows)))
    shapes = [(oi * oj, pi * pj) for (oi, pi), (oj, pj) in sizes]
    return sum(o * (n - min(filters * o, n)) for o, n in shapes)


# Along one axis: the shift of each offset, and the pixels reached, in steps of the stride.
_Line = tuple[tuple[int, ...], tuple[int, ...]]


def _sizes(pair: tuple[_Line, _Line]) -> tuple[tuple[int, int], ...]:
    return tuple((len(shifts), len(pixels)) for shifts, pixels in pair)


def _classes(windows: Windows) -> list[tuple[_Line, _Line]]:
    rows, columns = (_lines(windows, axis) for axis in (0, 1))
    return [(row, column) for row in rows for column in columns]


def _lines(windows: Windows, axis: int) -> list[_Line]:
    """Return the stride classes along one axis."""
    size, out = windows.in_shape[1 + axis], windows.positions[axis]
    stride, before = windows.stride[axis], windows.padding[2 - 2 * axis]
    found: dict[int, tuple[list[int], set[int]]] = {}
    for k in range(windows.kernel[axis]):
        begin = k * windows.dilation[axis] - before
        reached = {p for o in range(out) if 0 <= (p := o * stride + begin) < size}
        if reached:
            begins, pixels = found.setdefault(begin % stride, ([], set()))
            begins.append(begin)
            pixels |= reached
    return [
        (
            tuple((begin - min(pixels)) // stride for begin in begins),
            tuple(sorted((p - min(pixels)) // stride for p in pixels)),
        )
        for begins, pixels in found.values()
    ]


def relations(e: Tensor, known: csr_matrix | None, filters: int) -> list[np.ndarray]:
    """Return the relations that tie each filter's weight rows to the gradient rows.

    ``<e_f, A x|_g> = <W_g, K(e_f) x>`` for all ``f`` and ``g``: a combination of the ``e_f``
    counts for ``g`` where it is one of the known equations of ``g``'s outputs.

    Parameters
    ----------
    e : Tensor, shape (live filters, positions)
    known : csr_matrix, shape (equations, filters * positions), optional
        Default: all outputs are known.
    filters : int
        All filters of the group.

    Returns
    -------
    list of array, shape (relations, positions)
        One for each filter ``g``: independent combinations of the ``e_f``.
    """
    basis = row_space(e).numpy()
    if known is None:
        return [basis] * filters
    size = e.shape[1]
    return [_within(basis, known[:, g * size : (g + 1) * size]) for g in range(filters)]


def _within(basis: np.ndarray, rows: csr_matrix) -> np.ndarray:
    """Return the part of a space, given by an orthonormal basis, in the row space of ``rows``."""
    rows = rows[np.diff(rows.indptr) > 0]
    if rows.shape[0] == 0 or len(basis) == 0:
        return basis[:0]
    gram = (rows @ rows.T + 1e-13 * identity(rows.shape[0])).tocsc()
    outside = basis.T - rows.T @ splu(gram).solve(rows @ basis.T)
    _, values, vectors = torch.linalg.svd(torch.from_numpy(outside), full_matrices=False)
    return vectors[values < _OUTSIDE].numpy() @ basis
