"""Activations whose input follows from their output, and reshapes."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.errors import UnsupportedModelError
from fedleak.systems.base import Pointwise, Shape

# float64 resolves tanh and sigmoid this close to saturation; the published code
# clips tanh at 0.9999 and loses what lies beyond.
_EDGE = 1e-12


class Tanh(Pointwise):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return e * (1 - z**2)

    def inverse(self, z: Tensor) -> Tensor:
        return torch.atanh(z.clamp(-1 + _EDGE, 1 - _EDGE))


class Sigmoid(Pointwise):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return e * z * (1 - z)

    def inverse(self, z: Tensor) -> Tensor:
        return torch.logit(z.clamp(_EDGE, 1 - _EDGE))


class LeakyReLU(Pointwise):
    def __init__(self, name: str, in_shape: Shape, out_shape: Shape, slope: float):
        if slope <= 0:
            raise UnsupportedModelError(
                f"layer {name!r}: LeakyReLU with slope {slope} cannot be inverted; "
                "the linear systems need a slope above 0"
            )
        super().__init__(name, in_shape, out_shape)
        self.slope = slope

    def _slope(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, 1.0, self.slope).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x * self._slope(x)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return e * self._slope(x)

    def inverse(self, z: Tensor) -> Tensor:
        return z / self._slope(z)


class Reshape(Pointwise):
    """Flatten, view, identity and dropout in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.out_shape)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return e.reshape(-1, *self.in_shape)

    def inverse(self, z: Tensor) -> Tensor:
        return z.reshape(-1, *self.in_shape)
