"""Activations, inverted as far as they can be, and reshapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedleak.errors import UnsupportedModelError
from fedleak.precision import HALF, SPACING
from fedleak.systems.base import LAYERS, Pointwise, Shape
from fedleak.tensors import per_update

# float64 resolves tanh and sigmoid this close to saturation; the published code
# clips tanh at 0.9999 and loses what lies beyond.
_EDGE = 1e-12
# Larger errors, relative to an output's size, are those of an estimate: no margin covers them.
_WRONG = 1e-3
# Standard deviations from the bound within which a unit counts as at it. Of thousands of
# units none may cross: one that does brings a wrong equation, one too many loses only its own.
_MARGIN = 5


def _at_bound(distance: Tensor) -> Tensor:
    # A float32 output this close to a bound may as well lie on it: the input is lost. Far
    # outside the range is noise, not saturation.
    return distance.abs() <= SPACING


class Tanh(Pointwise):
    rounding = HALF

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return e * (1 - z**2)

    def inverse(self, z: Tensor) -> Tensor:
        return torch.atanh(z.clamp(-1 + _EDGE, 1 - _EDGE))

    def lost(self, z: Tensor) -> Tensor:
        return _at_bound(1 - z.abs())


class Sigmoid(Pointwise):
    rounding = HALF

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return e * z * (1 - z)

    def inverse(self, z: Tensor) -> Tensor:
        return torch.logit(z.clamp(_EDGE, 1 - _EDGE))

    def lost(self, z: Tensor) -> Tensor:
        return _at_bound(1 - z)  # float32 resolves the neighbourhood of 0


class Clamp(Pointwise):
    """``clamp(x, low, high)``: ReLU, ReLU6, Hardtanh.

    Between the bounds the input is the output; at a bound it lies anywhere beyond.
    """

    def __init__(self, name: str, in_shape: Shape, out_shape: Shape, low: float, high: float):
        super().__init__(name, in_shape, out_shape)
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return e * ((x > self.low) & (x < self.high)).to(e)

    def inverse(self, z: Tensor) -> Tensor:
        return z.clamp(self.low, self.high)

    def lost(self, z: Tensor) -> Tensor:
        return (z <= self.low) | (z >= self.high)

    def settle(self, z: Tensor, deviation: Tensor) -> Tensor:
        flat = z.flatten(1)
        # What lies outside the range can only be error: it shows how large errors are.
        outside = torch.maximum(self.low - flat, flat - self.high).amax(1).clamp_min(0)
        size = flat.square().mean(1).sqrt()
        error = torch.minimum(3 * outside, _WRONG * size).maximum(1e-9 * size)
        margin = per_update(error, z) + _MARGIN * deviation
        z = torch.where(z <= self.low + margin, self.low, z)
        return torch.where(z >= self.high - margin, self.high, z)


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
        return torch.where(x > 0, x.new_ones(()), x.new_tensor(self.slope))

    def forward(self, x: Tensor) -> Tensor:
        return x * self._slope(x)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return e * self._slope(x)

    def inverse(self, z: Tensor) -> Tensor:
        return z / self._slope(z)


class Reshape(Pointwise):
    """Flatten, view, identity and dropout in evaluation mode."""

    reshapes = True

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.out_shape)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return e.reshape(-1, *self.in_shape)

    def inverse(self, z: Tensor) -> Tensor:
        return z.reshape(-1, *self.in_shape)


@LAYERS.register(nn.Tanh)
def _tanh(name: str, module: nn.Tanh, i: Shape, o: Shape) -> Tanh:
    return Tanh(name, i, o)


@LAYERS.register(nn.Sigmoid)
def _sigmoid(name: str, module: nn.Sigmoid, i: Shape, o: Shape) -> Sigmoid:
    return Sigmoid(name, i, o)


@LAYERS.register(nn.ReLU, nn.ReLU6, nn.Hardtanh)
def _clamp(name: str, module: Any, i: Shape, o: Shape) -> Clamp:
    bounds = (0.0, torch.inf) if isinstance(module, nn.ReLU) else (module.min_val, module.max_val)
    return Clamp(name, i, o, *map(float, bounds))


@LAYERS.register(nn.LeakyReLU)
def _leaky(name: str, module: nn.LeakyReLU, i: Shape, o: Shape) -> LeakyReLU:
    return LeakyReLU(name, i, o, module.negative_slope)


@LAYERS.register(nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout2d)
def _reshape(name: str, module: nn.Module, i: Shape, o: Shape) -> Reshape:
    return Reshape(name, i, o)
