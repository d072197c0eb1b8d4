"""Fully connected layers: one patch, the whole input."""

from __future__ import annotations

from torch import Tensor, nn

from fedleak.systems.base import Affine, Shape


class Dense(Affine):
    """``nn.Linear`` on vectors."""

    @classmethod
    def read(cls, name: str, module: nn.Linear, in_shape: Shape) -> Dense:
        return cls(name, in_shape, (module.out_features,), module.weight, module.bias)

    def patches(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 1, -1, 1)

    def scatter(self, p: Tensor) -> Tensor:
        return p.reshape(-1, *self.in_shape)
