"""Sliding windows over an image: what convolutions and pooling have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """Where a kernel lies at each of its positions.

    Attributes
    ----------
    in_shape : tuple of int
        Shape (C, H, W) of one input.
    kernel, stride, dilation : tuple of int
        By rows and columns.
    padding : tuple of int
        (left, right, top, bottom), as ``F.pad`` takes it.
    """

    in_shape: tuple[int, ...]
    kernel: Pair
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)

    @property
    def area(self) -> int:
        """Pixels of one channel."""
        return self.in_shape[1] * self.in_shape[2]

    @property
    def padded(self) -> Pair:
        """Height and width of the padded input."""
        left, right, top, bottom = self.padding
        return self.in_shape[1] + top + bottom, self.in_shape[2] + left + right

    @property
    def positions(self) -> Pair:
        """Positions of the kernel along the rows and columns."""
        rows, columns = (
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(self.padded, self.kernel, self.stride, self.dilation, strict=True)
        )
        return rows, columns

    def patches(self, x: Tensor) -> Tensor:
        """Return what lies under the kernel, shape (N, C * kernel, positions)."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.unfold(F.pad(x, self.padding), self.kernel, self.dilation, 0, self.stride)
        # One copy through strides takes a third of the time, but its derivative is slow.
        rows, columns = self.positions
        return self.views(x).permute(0, 1, 4, 5, 2, 3).reshape(x.shape[0], -1, rows * columns)

    def views(self, x: Tensor) -> Tensor:
        """Return what lies under the kernel, shape (N, C, rows, columns, *kernel), uncopied."""
        x = F.pad(x, self.padding)
        for axis in (0, 1):
            span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            x = x.unfold(2 + axis, span, self.stride[axis])
        return x[..., :: self.dilation[0], :: self.dilation[1]]

    def scatter(self, p: Tensor) -> Tensor:
        """Return the adjoint of :meth:`patches`, shape (N, C, H, W)."""
        x = F.fold(p, self.padded, self.kernel, self.dilation, 0, self.stride)
        left, _, top, _ = self.padding
        return x[..., top : top + self.in_shape[1], left : left + self.in_shape[2]]

    def pixels(self, device: torch.device) -> Tensor:
        """Return which pixel each entry of a channel's patches reads, int64.

        Returns
        -------
        Tensor, shape (kernel, positions)
            Row-major, from 0; ``H * W`` stands for padding.
        """
        _, height, width = self.in_shape
        one = Windows((1, height, width), self.kernel, self.stride, self.padding, self.dilation)
        ordinal = torch.arange(1, height * width + 1, dtype=torch.float64, device=device)
        index = one.patches(ordinal.reshape(1, 1, height, width))[0].round().long() - 1
        return torch.where(index < 0, height * width, index)
