"""Normalisation by known numbers: batch normalisation in evaluation mode, and that of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedleak.client.training import LocalTraining
from fedleak.errors import UnsupportedModelError
from fedleak.systems.base import LAYERS, Gradients, Pointwise, Shape


class BatchNorm(Pointwise):
    """``z = weight * (x - mean) / std + bias`` with running statistics.

    Attributes
    ----------
    mean, inverse_std : Tensor, float64, shape (channels,)
    weight, bias : Tensor or None, float64, shape (channels,)
        None without ``affine``.
    """

    def __init__(self, name: str, module: Any, in_shape: Shape, out_shape: Shape):
        super().__init__(name, in_shape, out_shape)
        prefix = f"{name}." if name else ""
        self.weight_name, self.bias_name = f"{prefix}weight", f"{prefix}bias"
        self.mean = module.running_mean.detach().double()
        self.inverse_std = (module.running_var.detach().double() + module.eps).rsqrt()
        self.weight = None if module.weight is None else module.weight.detach().double()
        self.bias = None if module.bias is None else module.bias.detach().double()

    @classmethod
    def read(cls, name: str, module: Any, in_shape: Shape, out_shape: Shape) -> BatchNorm:
        if module.running_mean is None or module.running_var is None:
            raise UnsupportedModelError(
                f"layer {name!r} uses batch statistics (track_running_stats=False), which are not "
                "known before its input is"
            )
        return cls(name, module, in_shape, out_shape)

    def _spread(self, value: Tensor) -> Tensor:
        return value.reshape(-1, *[1] * (len(self.in_shape) - 1))

    @property
    def _scale(self) -> Tensor:
        scale = self.inverse_std if self.weight is None else self.inverse_std * self.weight
        return self._spread(scale)

    def _normalised(self, x: Tensor) -> Tensor:
        return (x - self._spread(self.mean)) * self._spread(self.inverse_std)

    def forward(self, x: Tensor) -> Tensor:
        z = (x - self._spread(self.mean)) * self._scale
        return z if self.bias is None else z + self._spread(self.bias)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return e * self._scale

    def gradients(self, x: Tensor, e: Tensor) -> Gradients:
        out = {}
        if self.weight is not None:
            product = (e * self._normalised(x)).reshape(*x.shape[:2], -1)
            out[self.weight_name] = product.sum(2)
        if self.bias is not None:
            out[self.bias_name] = e.reshape(*e.shape[:2], -1).sum(2)
        return out

    def inverse(self, z: Tensor) -> Tensor:
        shifted = z if self.bias is None else z - self._spread(self.bias)
        scale = torch.where(self._scale == 0, 1.0, self._scale)
        return torch.where(self._scale == 0, 0.0, shifted / scale) + self._spread(self.mean)

    def lost(self, z: Tensor) -> Tensor | None:
        # A channel with weight 0 gives its bias, whatever goes in.
        return (self._scale == 0).expand_as(z)


LAYERS.register(nn.BatchNorm1d, nn.BatchNorm2d)(BatchNorm.read)


class Standardise(Pointwise):
    """``z = (x - mean) / std`` of each channel: how clients normalise images before the model.

    It has no name of a module, and no parameters.
    """

    rounding = 6e-8

    def __init__(self, in_shape: Shape, client: LocalTraining):
        super().__init__("normalisation of images", in_shape, in_shape)
        self.mean, self.std = (
            torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1)
            for v in (client.mean, client.std)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return e / self.std

    def inverse(self, z: Tensor) -> Tensor:
        return z * self.std + self.mean
