"""The regularised inverse of a convolution's system, from its structure.

Let ``U = [a A; k K(e)]`` be a system with the weights of its rows. What ``A`` does is local:
neither ``A^T A``, over the pixels, nor ``A A^T``, over the outputs, reaches farther than a kernel,
so that either is block tridiagonal in strips of rows. The gradient rows reach everywhere, but they
are few, and ``K`` is the same small matrix for every input channel. So ``U^T U + d``, or
``U U^T + d`` where there are fewer rows than unknowns, is an arrow matrix
(:class:`fedleak.solvers.Arrow`), and ``(U^T U + d)^-1 U^T r = U^T (U U^T + d)^-1 r`` is little work
once that is factored. As ``d`` is small, :func:`fedleak.solvers.cgls` ends in a few steps with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak.solvers.arrow import Arrow
from fedleak.systems.windows import Windows
from fedleak.tensors import per_update

if TYPE_CHECKING:
    from fedleak.systems.conv import Conv

#: What is added to squares of singular values, relative to the largest diagonal entry.
REGULAR = 1e-7
#: A factorisation has to cost less than so many steps of conjugate gradients.
_STEPS = 1500

Rows = tuple[Tensor, ...]
#: ``(rows, U^T rows) -> (U^T U + d)^-1 U^T rows``.
Inverse = Callable[[Rows, Tensor], Tensor]


@dataclass
class Stencil:
    """A symmetric matrix over a grid, of entries near to each other.

    Attributes
    ----------
    values : Tensor, shape (M, down, across, C, C, H, W)
        Entry ``[i, j, c, d, y, x]`` is that of channel c at (y, x) and channel d at
        ``(y + down[i], x + across[j])``.
    down, across : list of int
        ``down`` is 0 and more: the rest follows from symmetry.
    """

    values: Tensor
    down: list[int]
    across: list[int]


def of_pixels(windows: Windows, weight: Tensor, squares: Tensor) -> Stencil:
    """Return ``A^T diag(squares) A``.

    Parameters
    ----------
    windows : Windows
    weight : Tensor, shape (F, C, kh, kw)
    squares : Tensor, shape (M, F, P)
    """
    filters, _, high, wide = weight.shape
    onward = F.pad(weight, (wide - 1, wide - 1, 0, high - 1)).unfold(2, high, 1).unfold(3, wide, 1)
    pairs = torch.einsum("fcij,fdyxij->yxcdijf", weight, onward)
    shape, size = pairs.shape[:4], windows.in_shape[1:]
    p = pairs.reshape(-1, filters) @ squares
    values = replace(windows, in_shape=(math.prod(shape), *size)).scatter(p)
    rows, columns = windows.dilation
    return Stencil(
        values.reshape(-1, *shape, *size),
        [rows * y for y in range(high)],
        [columns * x for x in range(1 - wide, wide)],
    )


def of_outputs(windows: Windows, weight: Tensor) -> Stencil:
    """Return ``A A^T``; arguments as of :func:`of_pixels`."""
    filters, _, *kernel = weight.shape
    # Outputs ``d`` apart see a pixel with kernel entries ``s d`` pixels apart.
    shifts = []
    for k, s, dilation in zip(kernel, windows.stride, windows.dilation, strict=True):
        apart = range(-(dilation * (k - 1) // s), dilation * (k - 1) // s + 1)
        shifts.append([(d, s * d // dilation) for d in apart if s * d % dilation == 0])
    down, across = [s for s in shifts[0] if s[0] >= 0], shifts[1]
    padded = F.pad(weight, (kernel[1] - 1, kernel[1] - 1, kernel[0] - 1, 0))
    back = torch.stack([
        padded[..., kernel[0] - 1 - i :, kernel[1] - 1 - j :][..., : kernel[0], : kernel[1]]
        for _, i in down for _, j in across
    ])  # fmt: skip
    pairs = torch.einsum("fcij,sgcij->sfgij", weight, back)
    one = replace(windows, in_shape=(1, *windows.in_shape[1:]))
    inside = one.patches(weight.new_ones(1, *one.in_shape))[0]
    values = pairs.reshape(-1, len(inside)) @ inside
    shape = (len(down), len(across), filters, filters, *windows.positions)
    return Stencil(values.reshape(1, *shape), [d for d, _ in down], [d for d, _ in across])


def strips_of(stencil: Stencil, border: int) -> tuple[Tensor, Tensor]:
    """Return a matrix as :class:`fedleak.solvers.Arrow` takes it, with room for a border.

    A strip is as many rows as entries reach; it is ordered by row, channel and column.

    Returns
    -------
    diagonal : Tensor, shape (M, k, b, b)
        Each strip with itself: the lower triangles.
    right : Tensor, shape (M, k, b, border + b)
        Each strip with the next, beside columns of zeros; these alone, if there is one strip.
    """
    values, high = stencil.values, max(max(stencil.down), 1)
    count, _, _, channels, _, height, width = values.shape
    strips = -(-height // high)
    values = F.pad(values, (0, 0, 0, strips * high - height)).unflatten(5, (strips, high))
    size, b = (high, channels, width), high * channels * width
    diagonal = values.new_zeros(count, strips, *size, *size)
    right = values.new_zeros(count, strips, b, border + b * (strips > 1))
    beside = right[..., border:].unflatten(3, size).unflatten(2, size) if strips > 1 else diagonal
    for i, dy in enumerate(stencil.down):
        for y in range(high):
            # Entries of this row of the strips, down to the last row of the grid.
            whole = max(0, -(-(height - y - dy) // high))
            if y + dy < high:
                block = diagonal[:, :whole, y + dy, :, :, y].transpose(2, 4).transpose(3, 5)
            else:
                block = beside[:, :whole, y, :, :, y + dy - high]
            for j, dx in enumerate(stencil.across):
                if abs(dx) < width:
                    part = values[:, i, j, :, :, :whole, y, max(0, -dx) : width - max(0, dx)]
                    block.diagonal(dx, 3, 5).copy_(part.permute(0, 3, 1, 2, 4))
    return diagonal.reshape(count, strips, b, b), right


def to_strips(x: Tensor, like: Tensor) -> Tensor:
    """Return (M, C, H, W) as (M, k, b), in the order of :func:`strips_of`."""
    (_, channels, height, width), strips = x.shape, like.shape[1]
    high = like.shape[2] // (channels * width)
    x = F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, strips * high - height))
    return x.reshape(len(x), strips, -1)


def from_strips(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the inverse of :func:`to_strips`, shape (M, *shape)."""
    channels, height, width = shape
    rows = x.reshape(len(x), -1, channels, width)[:, :height]
    return rows.transpose(1, 2)


@dataclass(frozen=True)
class Plan:
    """What is factored of one layer.

    Attributes
    ----------
    over : {"pixels", "outputs", ""}
        ``U^T U``, ``U U^T``, or nothing where that costs more than it saves.
    entries : int
        Of memory, for each image.
    """

    over: str
    entries: int = 0


def plan(layer: Conv) -> Plan:
    """Return what to factor of a layer."""
    filters, channels, *kernel = layer.weight_shape
    offsets, positions = math.prod(kernel), math.prod(layer.windows.positions)
    border, reach = channels * filters * offsets, layer.windows.dilation[0] * (kernel[0] - 1)
    if layer.unknowns <= filters * positions + border:
        over, size = "pixels", layer.in_shape
    else:
        over, size, reach = "outputs", layer.out_shape, reach // layer.windows.stride[0]
    strip, whole = size[0] * size[2] * max(reach, 1), math.prod(size)
    work = whole * (3.3 * strip**2 + 3 * strip * border + 2 * border**2) + border**3 / 3
    step = 8 * filters * positions * channels * offsets
    if layer.groups > 1 or work > _STEPS * step:
        return Plan("")
    return Plan(over, whole * (3 * strip + 2 * border) + border**2)


def inverse_of(
    layer: Conv, e: Tensor, a: Tensor, k: Tensor, adjoint: Callable[[Rows], Tensor]
) -> Inverse | None:
    """Return the regularised inverse of a layer's system; None where it does not pay.

    Parameters
    ----------
    layer : Conv
    e : Tensor, shape (N * B, *out_shape)
    a : Tensor, shape (N * B, *out_shape)
        Weights of the weight rows.
    k : Tensor, shape (N, B)
        Weights of the gradient rows, for each of the images that share them.
    adjoint : callable
        ``U^T`` with these weights: ((N, B, *out_shape), (N, *weight_shape)) -> (N, B, *in_shape).
    """
    over = plan(layer).over
    if not over:
        return None
    weight = layer.weight.reshape(layer.weight_shape)
    # K of one channel: the output's gradient, moved by each offset of the kernel.
    rows = _moved(layer, e * per_update(k.flatten(), e))
    if over == "pixels":
        return _over_pixels(layer, weight, rows, a, k.shape)
    return _over_outputs(layer, weight, rows, a, k.shape, adjoint)


def _over_pixels(
    layer: Conv, weight: Tensor, rows: Tensor, a: Tensor, shape: torch.Size
) -> Inverse:
    channels, border = layer.in_shape[0], layer.in_shape[0] * rows.shape[1]
    squares = a.square().flatten(2)
    diagonal, right = strips_of(of_pixels(layer.windows, weight, squares), border)
    _regularise(diagonal, shape)
    columns = _columns(right, border, layer.in_shape).unflatten(4, (channels, -1))
    columns.diagonal(dim1=2, dim2=4).copy_(rows.permute(0, 2, 3, 1).unsqueeze(4))
    corner = torch.eye(border).to(a).expand(shape[0], -1, -1)
    arrow = Arrow(diagonal, right, corner, -1.0)

    def inverse(_: Rows, back: Tensor) -> Tensor:
        found = arrow.solve(to_strips(back.flatten(0, 1), diagonal))[0]
        return from_strips(found, layer.in_shape).reshape(back.shape)

    return inverse


def _over_outputs(
    layer: Conv,
    weight: Tensor,
    rows: Tensor,
    a: Tensor,
    shape: torch.Size,
    adjoint: Callable[[Rows], Tensor],
) -> Inverse:
    filters, channels, offsets = *weight.shape[:2], weight[0, 0].numel()
    border = channels * rows.shape[1]
    diagonal, right = strips_of(of_outputs(layer.windows, weight), border)
    scale = to_strips(a, diagonal)
    diagonal = diagonal * scale.unsqueeze(3) * scale.unsqueeze(2)
    right = right.repeat(len(a), 1, 1, 1) if len(a) > 1 else right
    columns = _columns(right, border, layer.out_shape)
    seen = layer.windows.views(rows).permute(0, 4, 5, 2, 3, 1).reshape(len(a), offsets, -1)
    made = weight.reshape(-1, offsets) @ seen
    made = made.reshape(len(a), filters, channels, *layer.out_shape[1:], -1)
    columns.unflatten(4, (channels, -1)).copy_(made.permute(0, 3, 1, 4, 2, 5))
    right *= scale.unsqueeze(3)
    right[..., border:] *= scale.roll(-1, 1).unsqueeze(2)[..., : right.shape[3] - border]
    least = _regularise(diagonal, shape)
    gram = (rows.flatten(2) @ rows.flatten(2).mT).unflatten(0, shape).sum(1)
    gram.diagonal(dim1=1, dim2=2).add_(least)
    corner = torch.einsum("cd,nij->ncidj", torch.eye(channels).to(a), gram)
    arrow = Arrow(diagonal, right, corner.flatten(3).flatten(1, 2))

    def inverse(r: Rows, _: Tensor) -> Tensor:
        # Gradient rows are (filter, channel, offset) outside, (channel, filter, offset) here.
        given = r[1].reshape(-1, filters, channels, offsets).transpose(1, 2).flatten(1)
        found, shared = arrow.solve(to_strips(r[0].flatten(0, 1), diagonal), given)
        shared = shared.reshape(-1, channels, filters, offsets).transpose(1, 2)
        own = from_strips(found, layer.out_shape).reshape(r[0].shape)
        return adjoint((own, shared.reshape(r[1].shape)))

    return inverse


def _columns(right: Tensor, border: int, shape: tuple[int, ...]) -> Tensor:
    """Return the first columns by row, channel and column of the grid, a view of ``right``."""
    channels, height, width = shape
    columns = right[..., :border].unflatten(2, (-1, channels, width))
    # A view, as long as the last strip is full, and its last rows are left out elsewhere.
    return columns.flatten(1, 2)[:, :height]


def _moved(layer: Conv, e: Tensor) -> Tensor:
    """Return ``K(e)`` of one input channel, shape (M, filters * offsets, H, W).

    It is the output's gradient, moved by each offset of the kernel.
    """
    windows, (left, _, top, _) = layer.windows, layer.windows.padding
    (high, wide), (down, across) = windows.kernel, windows.dilation
    out = e.new_zeros(*e.shape[:2], high, wide, *windows.padded)
    (n, m), (s, t) = windows.positions, windows.stride
    rows, columns = s * (n - 1) + 1, t * (m - 1) + 1
    for i in range(high):
        for j in range(wide):
            part = out[:, :, i, j, down * i : down * i + rows, across * j : across * j + columns]
            part[..., ::s, ::t] = e
    _, height, width = windows.in_shape
    return out.flatten(1, 3)[..., top : top + height, left : left + width]


def _regularise(diagonal: Tensor, shape: torch.Size) -> Tensor:
    """Add to the diagonal, in place; return how much, shape (N, 1)."""
    entries = diagonal.diagonal(dim1=2, dim2=3)
    least = REGULAR * entries.reshape(shape[0], -1).amax(1, keepdim=True)
    entries.add_(least.repeat_interleave(shape[1], 0).unsqueeze(2))
    return least
