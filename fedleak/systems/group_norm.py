"""Normalisation by an image's own statistics: groups of channels, single ones, whole images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fedleak.errors import UnsupportedModelError
from fedleak.systems.base import LAYERS, Above, Descent, Gradients, Layer, Shape


class GroupNorm(Layer):
    """``z = weight * (x - mean) / std + bias``, with the mean and deviation of groups of ``x``.

    Wu & He 2018. The output tells the input up to two numbers of each group, and without them
    neither the scale of ``dL/dx``: what lies below is known only together with it.

    Attributes
    ----------
    groups : int
    weight, bias : Tensor or None, float64, broadcastable to an input
        None without ``affine``.
    """

    def __init__(
        self, name: str, module: Any, in_shape: Shape, out_shape: Shape, groups: int, shape: Shape
    ):
        super().__init__(name, in_shape, out_shape)
        prefix = f"{name}." if name else ""
        self.weight_name, self.bias_name = f"{prefix}weight", f"{prefix}bias"
        self.groups, self.eps = groups, float(module.eps)
        self.parameter_shape = () if module.weight is None else tuple(module.weight.shape)
        self.weight, self.bias = (
            None if p is None else p.detach().double().reshape(shape)
            for p in (module.weight, module.bias)
        )

    @classmethod
    def read(cls, name: str, module: nn.GroupNorm, i: Shape, o: Shape) -> GroupNorm:
        return cls(name, module, i, o, module.num_groups, (i[0], *[1] * (len(i) - 1)))

    @classmethod
    def read_instance(cls, name: str, module: Any, i: Shape, o: Shape) -> GroupNorm:
        """Read ``nn.InstanceNorm2d``: each channel is a group."""
        if module.track_running_stats:
            raise UnsupportedModelError(
                f"layer {name!r} (InstanceNorm) keeps running statistics, which clients do not use "
                "when they train; set track_running_stats=False"
            )
        return cls(name, module, i, o, i[0], (i[0], *[1] * (len(i) - 1)))

    @classmethod
    def read_layer(cls, name: str, module: nn.LayerNorm, i: Shape, o: Shape) -> GroupNorm:
        """Read ``nn.LayerNorm``: a group is all of the dimensions it normalises."""
        own = tuple(module.normalized_shape)
        return cls(name, module, i, o, math.prod(i[: len(i) - len(own)]), own)

    def _grouped(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.groups, -1)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised input and what it was multiplied by, (N, groups, ...)."""
        rest = self._grouped(x)
        rest = rest - rest.mean(2, keepdim=True)
        scale = (rest.square().mean(2, keepdim=True) + self.eps).rsqrt()
        return rest * scale, scale

    def forward(self, x: Tensor) -> Tensor:
        z = self._normalised(x)[0].reshape(x.shape)
        z = z if self.weight is None else z * self.weight
        return z if self.bias is None else z + self.bias

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        normalised, scale = self._normalised(x)
        d = self._grouped(e if self.weight is None else e * self.weight)
        along = (d * normalised).mean(2, keepdim=True)
        return ((d - d.mean(2, keepdim=True) - normalised * along) * scale).reshape(x.shape)

    def gradients(self, x: Tensor, e: Tensor) -> Gradients:
        out = {}
        if self.weight is not None:
            out[self.weight_name] = self._summed(e * self._normalised(x)[0].reshape(x.shape))
        if self.bias is not None:
            out[self.bias_name] = self._summed(e)
        return out

    def _summed(self, e: Tensor) -> Tensor:
        """Return the sum over all entries that share a parameter, (N, *parameter)."""
        shape = next(p.shape for p in (self.weight, self.bias) if p is not None)
        return e.sum_to_size(len(e), *[1] * (e.dim() - 1 - len(shape)), *shape).reshape(
            len(e), *self.parameter_shape
        )

    def descend(self, above: Above, start: Tensor) -> Descent:
        """Return the input with groups of mean 0 and deviation 1: as likely as any other."""
        z = above.value if self.bias is None else above.value - self.bias
        if self.weight is not None:
            z = torch.where(
                self.weight == 0, 0.0, z / torch.where(self.weight == 0, 1.0, self.weight)
            )
        return Descent(z, torch.full_like(z, torch.inf))


LAYERS.register(nn.GroupNorm)(GroupNorm.read)
LAYERS.register(nn.InstanceNorm1d, nn.InstanceNorm2d)(GroupNorm.read_instance)
LAYERS.register(nn.LayerNorm)(GroupNorm.read_layer)
