"""Fully connected layers: one patch, the whole input."""

from __future__ import annotations

import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from fedleak.errors import UnsupportedModelError
from fedleak.systems.base import LAYERS, Shape
from fedleak.systems.ranks.blocks import EXACT, Effort, Ranks
from fedleak.systems.ranks.linalg import dense_rank
from fedleak.systems.system import Affine


class Dense(Affine):
    """``nn.Linear`` on vectors."""

    kind = "linear"
    #: ``K(e) x = e x^T`` alone gives ``x``: nothing that is open could add to c(M).
    counts = False

    @classmethod
    def read(cls, name: str, module: nn.Linear, in_shape: Shape) -> Dense:
        if len(in_shape) != 1:
            raise UnsupportedModelError(
                f"layer {name!r} (Linear) acts on inputs of shape {in_shape}; only flat ones have "
                "a linear system in fedleak: put a Flatten before it"
            )
        return cls(name, in_shape, (module.out_features,), module.weight, module.bias)

    def patches(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 1, -1, 1)

    def scatter(self, p: Tensor) -> Tensor:
        return p.reshape(-1, *self.in_shape)

    def block_ranks(
        self, e: Tensor, rows: csr_matrix | None = None, effort: Effort = EXACT
    ) -> Ranks:
        weight = self.weight[0].cpu()
        if rows is not None:
            weight = torch.from_numpy(rows @ weight.numpy())
        gradient = self.unknowns if bool((e != 0).any()) else 0
        rank = dense_rank(weight)
        return Ranks(rank, gradient, max(rank, gradient))

    def counted_rank(self, e: Tensor | None = None, known: Tensor | None = None) -> int:
        if e is None or bool((e != 0).any()):
            return self.unknowns
        rows = self.weight.shape[1] if known is None else int(known.sum())
        return min(self.unknowns, rows)

    def batch_rank(self, e: Tensor, known: Tensor) -> int:
        # The gradient rows E^T X tell min(B, outputs) images apart.
        used = int((e != 0).any(0).sum())
        told = min(len(e), used, int(torch.linalg.matrix_rank(e.flatten(1))))
        rows = known.flatten(1).sum(1).clamp(max=self.unknowns).sort(descending=True).values
        return told * self.unknowns + int(rows[: len(e) - told].sum())


LAYERS.register(nn.Linear)(lambda name, module, i, o: Dense.read(name, module, i))
