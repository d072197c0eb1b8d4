"""Fully connected layers: one patch, the whole input."""

from __future__ import annotations

from torch import Tensor, nn

from fedleak.errors import UnsupportedModelError
from fedleak.systems.base import Affine, Shape


class Dense(Affine):
    """``nn.Linear`` on vectors."""

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
