"""Convolutions, through their patches: any stride, padding, dilation and groups."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from fedleak.errors import UnsupportedModelError
from fedleak.solvers.least_squares import Inverse
from fedleak.systems.base import LAYERS, Shape
from fedleak.systems.direct import inverse_of, plan
from fedleak.systems.ranks.blocks import EXACT, Effort, Ranks
from fedleak.systems.ranks.convolution import convolution_ranks
from fedleak.systems.ranks.counted import counted_batch_rank, counted_rank
from fedleak.systems.system import Affine
from fedleak.systems.windows import Windows


class Conv(Affine):
    """``nn.Conv2d`` with zero padding."""

    kind = "conv2d"

    def __init__(self, name: str, module: nn.Conv2d, in_shape: Shape, out_shape: Shape):
        kernel, stride, dilation = (
            (int(a), int(b)) for a, b in (module.kernel_size, module.stride, module.dilation)
        )
        self.groups = module.groups
        self.windows = Windows(in_shape, kernel, stride, _padding(module), dilation)
        super().__init__(name, in_shape, out_shape, module.weight, module.bias)

    @classmethod
    def read(cls, name: str, module: nn.Conv2d, in_shape: Shape, out_shape: Shape) -> Conv:
        if module.padding_mode != "zeros":
            raise UnsupportedModelError(
                f"layer {name!r}: padding_mode {module.padding_mode!r} is not supported; "
                "only zero padding is"
            )
        return cls(name, module, in_shape, out_shape)

    def group(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def patches(self, x: Tensor) -> Tensor:
        p = self.windows.patches(x)
        return p.reshape(p.shape[0], self.groups, -1, p.shape[2])

    def scatter(self, p: Tensor) -> Tensor:
        return self.windows.scatter(p.reshape(p.shape[0], -1, p.shape[-1]))

    @property
    def solver_entries(self) -> int:
        return plan(self).entries

    def regularised_inverse(
        self, e: Tensor, a: Tensor, k: Tensor, adjoint: Callable[[tuple[Tensor, ...]], Tensor]
    ) -> Inverse | None:
        return inverse_of(self, e, a, k, adjoint)

    def block_ranks(
        self, e: Tensor, rows: csr_matrix | None = None, effort: Effort = EXACT
    ) -> Ranks:
        if rows is not None and _mixes(rows, e[0].numel()):
            return super().block_ranks(e, rows, effort)  # no structure: dense, or refused
        own = e.detach().double().cpu()
        return convolution_ranks(self.windows, self.weight, own, rows, effort)

    def counted_rank(self, e: Tensor | None = None, known: Tensor | None = None) -> int:
        shape = (*self.weight.shape[:2], -1)
        ones = torch.ones(self.out_shape, dtype=torch.bool, device=self.weight.device)
        used, told = ones if e is None else e != 0, ones if known is None else known
        return counted_rank(self.windows, used.reshape(shape), told.reshape(shape))

    def batch_rank(self, e: Tensor, known: Tensor) -> int:
        shape = (len(e), *self.weight.shape[:2], -1)
        return counted_batch_rank(self.windows, (e != 0).reshape(shape), known.reshape(shape))

    def ranks(self, e: Tensor, known: Tensor, batch: int = 1) -> tuple[Tensor, bool]:
        ranks, exact = super().ranks(e, known, batch)
        if batch == 1 and not exact:
            # Outputs that are unknown, or without an error of their own, are not generic: a
            # full count is put to the test.
            generic = (known & (e != 0)).flatten(1).all(1)
            own = e.flatten(2)
            generic &= torch.linalg.matrix_rank(own) == min(own.shape[1:])
            doubtful = ~generic.cpu() & (ranks == self.unknowns)
            if bool(doubtful.any()):
                ranks[doubtful] = self.probed_rank(e[doubtful], known[doubtful])
        return ranks, exact


LAYERS.register(nn.Conv2d)(Conv.read)


def _mixes(rows: csr_matrix, positions: int) -> bool:
    """Return whether an equation involves outputs of more than one filter."""
    starts = rows.indptr[:-1][np.diff(rows.indptr) > 0]
    if len(starts) == 0:
        return False
    filters = rows.indices // positions
    least, most = (f.reduceat(filters, starts) for f in (np.minimum, np.maximum))
    return bool((least != most).any())


def _padding(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return zero padding as (left, right, top, bottom), as ``F.pad`` takes it."""
    if module.padding == "valid":
        return (0, 0, 0, 0)
    if module.padding == "same":
        # As torch does it: an odd total puts the extra zero behind.
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        (top, left) = (t // 2 for t in total)
        return (left, total[1] - left, top, total[0] - top)
    rows, columns = (int(p) for p in module.padding)
    return (columns, columns, rows, rows)
