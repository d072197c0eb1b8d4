"""What kind each operation is: what the rules may ask of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Kind(Enum):
    """What is known of an operation beforehand."""

    IMAGE = "image"
    PARAMETER = "parameter"
    CONSTANT = "constant"
    CONVOLUTION = "convolution"
    DENSE = "dense"
    #: ``out = scale * in + shift``, entry by entry: batch normalisation by running statistics.
    SCALE = "scale"
    #: By the statistics of its own input: batch normalisation in training mode, and of groups.
    NORMALISATION = "normalisation"
    #: The same entries in another shape or order.
    RESHAPE = "reshape"
    ADD = "add"
    CAT = "cat"
    #: Linear in its one input, up to a constant.
    LINEAR = "linear"
    #: One and the same function of every entry.
    POINTWISE = "pointwise"
    MAX_POOL = "max pool"
    OTHER = "other"

    @property
    def affine(self) -> bool:
        """Whether derivatives do not depend on the inputs."""
        return self in _AFFINE

    @property
    def entrywise(self) -> bool:
        """Whether every entry of the output is an invertible function of one of the input."""
        return self in (Kind.SCALE, Kind.RESHAPE)


_AFFINE = {
    Kind.CONVOLUTION, Kind.DENSE, Kind.SCALE, Kind.RESHAPE, Kind.ADD, Kind.CAT, Kind.LINEAR,
}  # fmt: skip

_MODULES: dict[type[nn.Module], Kind] = {
    nn.Conv2d: Kind.CONVOLUTION,
    nn.Linear: Kind.DENSE,
    nn.Flatten: Kind.RESHAPE,
    nn.Unflatten: Kind.RESHAPE,
    nn.Identity: Kind.RESHAPE,
    nn.AvgPool2d: Kind.LINEAR,
    nn.AdaptiveAvgPool2d: Kind.LINEAR,
    nn.ZeroPad2d: Kind.LINEAR,
    nn.MaxPool2d: Kind.MAX_POOL,
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.ELU, nn.SELU, nn.CELU, nn.Tanh,
         nn.Sigmoid, nn.Softplus, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Mish),
        Kind.POINTWISE,
    ),
}  # fmt: skip

_POINTWISE = (
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.hardtanh, F.elu, F.selu, F.celu, torch.tanh,
    F.tanh, torch.sigmoid, F.sigmoid, F.softplus, F.silu, F.gelu, F.hardswish, F.hardsigmoid,
    F.mish, "relu", "tanh", "sigmoid",
)  # fmt: skip

_RESHAPES = (
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
    "flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze",
    "unflatten",
)  # fmt: skip

_LINEARS = (
    F.avg_pool2d, F.adaptive_avg_pool2d, F.pad, torch.mean, "mean", torch.sum, "sum",
    operator.getitem, operator.neg, "expand",
)  # fmt: skip

_FUNCTIONS: dict[Any, Kind] = {
    **dict.fromkeys(_POINTWISE, Kind.POINTWISE),
    **dict.fromkeys(_RESHAPES, Kind.RESHAPE),
    **dict.fromkeys(_LINEARS, Kind.LINEAR),
    F.max_pool2d: Kind.MAX_POOL,
    torch.max_pool2d: Kind.MAX_POOL,
    torch.cat: Kind.CAT,
    torch.concat: Kind.CAT,
    operator.add: Kind.ADD,
    operator.iadd: Kind.ADD,
    torch.add: Kind.ADD,
    "add": Kind.ADD,
}


def kind_of(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Kind:
    """Return the kind of an operation; ``OTHER`` where nothing is known beforehand.

    Parameters
    ----------
    target : object
        A module, a function, or the name of a method.
    args, kwargs
        Its arguments.
    """
    if isinstance(target, nn.Module):
        return _module_kind(target)
    kind = _FUNCTIONS.get(target, Kind.OTHER) if _hashable(target) else Kind.OTHER
    if kind is Kind.ADD and (kwargs or len(args) != 2):
        return Kind.OTHER
    return kind


def _module_kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return Kind.OTHER if module.training and module.p > 0 else Kind.RESHAPE
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        own = module.training or module.running_mean is None
        return Kind.NORMALISATION if own and module.affine else Kind.OTHER if own else Kind.SCALE
    if isinstance(module, nn.GroupNorm):
        return Kind.NORMALISATION if module.affine else Kind.OTHER
    kind = _MODULES.get(type(module), Kind.OTHER)
    if isinstance(module, nn.Conv2d) and (
        module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        return Kind.OTHER
    if isinstance(module, (nn.MaxPool2d,)) and module.return_indices:
        return Kind.OTHER
    return kind


def _hashable(target: Callable[..., Any] | str) -> bool:
    try:
        hash(target)
    except TypeError:
        return False
    return True
