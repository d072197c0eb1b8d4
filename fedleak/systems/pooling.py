"""Pooling: equations for windows of pixels, and no parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix, identity, kron
from torch import Tensor, nn

from fedleak.errors import UnsupportedModelError
from fedleak.systems.base import LAYERS, Above, Descent, Equations, Layer, Shape
from fedleak.systems.system import Rows, System
from fedleak.systems.windows import Pair, Windows


class Mean(nn.Module):
    """``x.mean(dim, keepdim)`` as a module, to be read like one."""

    def __init__(self, dim: Any = None, keepdim: bool = False):
        super().__init__()
        self.dim, self.keepdim = dim, keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim, self.keepdim)


class AvgPool(System):
    """The mean of each window: a linear system of weight rows alone.

    Attributes
    ----------
    divisor : Tensor, shape (positions,)
        What the sum of each window is divided by.
    """

    def __init__(
        self, name: str, windows: Windows, out_shape: Shape, divisor: Tensor | int | None = None
    ):
        super().__init__(name, windows.in_shape, out_shape)
        self.windows = windows
        size = windows.kernel[0] * windows.kernel[1] if divisor is None else divisor
        positions = windows.positions[0] * windows.positions[1]
        self.divisor = torch.as_tensor(size, dtype=torch.float64).expand(positions)

    @classmethod
    def read(cls, name: str, module: nn.AvgPool2d, in_shape: Shape, out_shape: Shape) -> AvgPool:
        windows = _windows(name, module, in_shape, out_shape)
        divisor: Tensor | int | None = module.divisor_override
        if divisor is None and not module.count_include_pad:
            pixels = windows.pixels(torch.device("cpu"))
            divisor = (pixels < in_shape[1] * in_shape[2]).sum(0)
        return cls(name, windows, out_shape, divisor)

    @classmethod
    def read_adaptive(cls, name: str, in_shape: Shape, out_shape: Shape) -> AvgPool:
        """Read ``nn.AdaptiveAvgPool2d`` where all its windows are of one size."""
        _demand_image(name, in_shape)
        (height, width), (rows, columns) = in_shape[1:], out_shape[1:]
        if height % rows or width % columns:
            raise UnsupportedModelError(
                f"layer {name!r}: adaptive pooling from {height}x{width} to {rows}x{columns} has "
                "windows of different sizes; only whole divisors have a linear system in fedleak"
            )
        kernel = (height // rows, width // columns)
        return cls(name, Windows(in_shape, kernel, kernel), out_shape)

    @classmethod
    def read_mean(cls, name: str, module: Mean, in_shape: Shape, out_shape: Shape) -> AvgPool:
        """Read a mean over all pixels, ``x.mean((2, 3))``."""
        dims = module.dim if isinstance(module.dim, Sequence) else [module.dim]
        if len(in_shape) != 3 or sorted(d % 4 if isinstance(d, int) else -1 for d in dims) != [
            2,
            3,
        ]:
            raise UnsupportedModelError(
                f"layer {name!r}: a mean over dimensions {module.dim} has no linear system in "
                "fedleak; one over (2, 3) has"
            )
        kernel = (in_shape[1], in_shape[2])
        return cls(name, Windows(in_shape, kernel, kernel), out_shape)

    def forward(self, x: Tensor) -> Tensor:
        p = self.windows.patches(x).reshape(x.shape[0], self.in_shape[0], -1, len(self.divisor))
        return (p.sum(2) / self.divisor).reshape(-1, *self.out_shape)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        share = e.reshape(e.shape[0], self.in_shape[0], 1, -1) / self.divisor
        size = self.windows.kernel[0] * self.windows.kernel[1]
        return self.windows.scatter(share.expand(-1, -1, size, -1).flatten(1, 2))

    def apply(self, x: Tensor, e: Tensor) -> Rows:
        return Rows(self.forward(x), x.new_zeros(x.shape[0], 0))

    def adjoint(self, rows: Rows, e: Tensor) -> Tensor:
        return self.backward(e, e, rows.weight)

    def target(self, z: Tensor, gradient: Tensor) -> Rows:
        return Rows(z, gradient)

    def jacobian(self, x: Tensor, z: Tensor) -> csr_matrix:
        pixels = self.windows.area
        index = self.windows.pixels(torch.device("cpu")).numpy()
        offset, position = (index < pixels).nonzero()
        share = 1 / self.divisor.cpu().numpy()[position]
        shape = (index.shape[1], pixels)
        one = csr_matrix((share, (position, index[offset, position])), shape)
        return kron(identity(self.in_shape[0]), one).tocsr()

    def ranks(self, e: Tensor, known: Tensor, batch: int = 1) -> tuple[Tensor, bool]:
        told = known.flatten(1).sum(1).cpu()
        whole = bool((told == known[0].numel()).all())
        return told.clamp(max=self.rank).reshape(-1, batch).sum(1), whole

    @property
    def rank(self) -> int:
        """Rank of ``A``: it is the Kronecker product of its rows' and columns' windows."""
        rank = self.in_shape[0]
        left, right, top, bottom = self.windows.padding
        for axis, before in ((0, top), (1, left)):
            size, positions = self.in_shape[1 + axis], self.windows.positions[axis]
            line = torch.zeros(positions, size + before + (bottom if axis == 0 else right))
            for i in range(positions):
                begin = i * self.windows.stride[axis]
                line[i, begin : begin + self.windows.kernel[axis]] = 1.0
            rank *= int(torch.linalg.matrix_rank(line[:, before : before + size].double()))
        return rank


class MaxPool(Layer):
    """The largest pixel of each window.

    An output bounds every pixel of its window and equals one of them, at an unknown place:
    no linear system, and no pixel follows.
    """

    def __init__(self, name: str, windows: Windows, out_shape: Shape):
        super().__init__(name, windows.in_shape, out_shape)
        self.windows = windows

    @classmethod
    def read(cls, name: str, module: nn.MaxPool2d, in_shape: Shape, out_shape: Shape) -> MaxPool:
        return cls(name, _windows(name, module, in_shape, out_shape), out_shape)

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w = self.windows
        padding = (w.padding[2], w.padding[0])
        z, index = F.max_pool2d(x, w.kernel, w.stride, padding, w.dilation, return_indices=True)
        return z, index

    def forward(self, x: Tensor) -> Tensor:
        return self._pool(x)[0]

    def route(self, x: Tensor, e: Tensor) -> Tensor:
        """Return ``e`` at the largest pixel of each window, summed, shape (N, *in_shape)."""
        index = self._pool(x)[1].flatten(2)
        return torch.zeros_like(x).flatten(2).scatter_add(2, index, e.flatten(2)).reshape(x.shape)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return self.route(x, e)

    def descend(self, above: Above, start: Tensor) -> Descent:
        x, _ = self.estimate(above.value, above.cotangent)
        rank = torch.full((len(above.noise),), self.rank) * above.batch
        return Descent(x, None, Equations(rank, False, torch.zeros_like(above.noise)))

    def pull_back(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return self.estimate(z, e)[1]

    def jacobian(self, x: Tensor, z: Tensor) -> csr_matrix:
        """Pick the largest pixel of each window; of equal ones the first, as torch does."""
        channels, pixels = self.in_shape[0], self.windows.area
        index = self.windows.pixels(x.device)
        padded = torch.cat([x.reshape(channels, -1), x.new_full((channels, 1), -torch.inf)], 1)
        first = padded[:, index].argmax(1)
        picked = index.gather(0, first) + pixels * torch.arange(channels, device=x.device)[:, None]
        column = picked.flatten().cpu().numpy()
        shape = (len(column), channels * pixels)
        return csr_matrix((np.ones(len(column)), (np.arange(len(column)), column)), shape)

    def estimate(self, z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return an input that gives ``z``, and ``dL/dx``, where the places are not known.

        Each pixel is as large as the windows over it allow, which is the input that says
        least, and each window's error is split evenly over its pixels.

        Parameters
        ----------
        z, e : Tensor, shape (N, *out_shape)

        Returns
        -------
        x, d : Tensor, shape (N, *in_shape)
        """
        channels, height, width = self.in_shape
        pixels = self.windows.pixels(z.device)
        shape = (z.shape[0], channels, *pixels.shape)
        index = pixels.expand(shape).flatten(2)

        def spread(value: Tensor) -> Tensor:
            return value.reshape(z.shape[0], channels, 1, -1).expand(shape).flatten(2)

        x = z.new_full((z.shape[0], channels, height * width + 1), torch.inf)
        x = x.scatter_reduce(2, index, spread(z), "amin")
        x = torch.where(x.isinf(), 0.0, x)  # pixels that no window covers
        inside = (pixels < height * width).sum(0)
        d = torch.zeros_like(x).scatter_add(2, index, spread(e.flatten(2) / inside))
        return x[..., :-1].reshape(-1, *self.in_shape), d[..., :-1].reshape(-1, *self.in_shape)

    @property
    def rank(self) -> int:
        """Equations for the input: one for each window, short of all unknowns.

        Windows of one pixel leave no doubt about the place.
        """
        outputs = self.in_shape[0] * self.windows.positions[0] * self.windows.positions[1]
        return min(outputs, self.unknowns - (self.windows.kernel != (1, 1)))


LAYERS.register(nn.AvgPool2d)(AvgPool.read)
LAYERS.register(nn.AdaptiveAvgPool2d)(lambda n, m, i, o: AvgPool.read_adaptive(n, i, o))
LAYERS.register(Mean)(AvgPool.read_mean)
LAYERS.register(nn.MaxPool2d)(MaxPool.read)


def _demand_image(name: str, in_shape: Shape) -> None:
    if len(in_shape) != 3:
        raise UnsupportedModelError(
            f"layer {name!r} pools inputs of shape {in_shape}; fedleak supports (C, H, W)"
        )


def _pair(value: Any) -> Pair:
    rows, columns = value if isinstance(value, Sequence) else (value, value)
    return int(rows), int(columns)


def _windows(name: str, module: Any, in_shape: Shape, out_shape: Shape) -> Windows:
    """Return the windows of a pooling module."""
    _demand_image(name, in_shape)
    rows, columns = _pair(module.padding)
    windows = Windows(
        in_shape,
        _pair(module.kernel_size),
        _pair(module.stride),
        (columns, columns, rows, rows),
        _pair(getattr(module, "dilation", 1)),
    )
    if windows.positions != out_shape[1:]:
        raise UnsupportedModelError(
            f"layer {name!r}: ceil_mode adds windows that hang over the edge "
            f"({out_shape[1]}x{out_shape[2]} in place of {windows.positions[0]}x"
            f"{windows.positions[1]}); set it to False"
        )
    return windows
