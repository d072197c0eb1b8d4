"""What the output of an activation tells of its input and of its slope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: How many standard deviations a value must be off the place where an activation is flat.
_CLEAR = 5.0


@dataclass(frozen=True)
class Inverted:
    """What an activation's output tells.

    Attributes
    ----------
    value : Tensor
        The input, where it is known.
    known : Tensor of bool
    slope : Tensor
        The derivative, where it is known.
    slope_known : Tensor of bool
    """

    value: Tensor
    known: Tensor
    slope: Tensor
    slope_known: Tensor


def flat_outside(target: Any, args: tuple[Any, ...]) -> tuple[float, float] | None:
    """Return the bounds between which an activation is the identity, and flat outside."""
    if isinstance(target, nn.ReLU) or target in (F.relu, torch.relu, "relu"):
        return 0.0, torch.inf
    if isinstance(target, nn.ReLU6) or target is F.relu6:
        return 0.0, 6.0
    if isinstance(target, nn.Hardtanh):
        return float(target.min_val), float(target.max_val)
    return None


def invert(
    target: Any, args: tuple[Any, ...], out: Tensor, error: float | Tensor
) -> Inverted | None:
    """Return what the output ``out``, known up to ``error`` (of all or each), tells of the input.

    None where the activation is none that can be inverted.
    """
    bounds = flat_outside(target, args)
    everywhere = torch.ones_like(out, dtype=torch.bool)
    if bounds is not None:
        inside = (out > bounds[0] + _CLEAR * error) & (out < bounds[1] - _CLEAR * error)
        return Inverted(out, inside, inside.to(out), everywhere)
    if isinstance(target, nn.LeakyReLU):
        slope = torch.where(out > 0, 1.0, float(target.negative_slope))
        return Inverted(out / slope, everywhere, slope, everywhere)
    if isinstance(target, nn.Tanh) or target in (torch.tanh, F.tanh, "tanh"):
        slope = 1 - out.square()
        known = slope > 1e-6
        return Inverted(torch.atanh(out.clamp(-1 + 1e-12, 1 - 1e-12)), known, slope, everywhere)
    if isinstance(target, nn.Sigmoid) or target in (torch.sigmoid, F.sigmoid, "sigmoid"):
        slope = out * (1 - out)
        known = slope > 1e-6
        return Inverted(torch.logit(out.clamp(1e-12, 1 - 1e-12)), known, slope, everywhere)
    if isinstance(target, nn.Softplus) and target.beta == 1:
        value = out + torch.log(-torch.expm1(-out.clamp_min(1e-12)))
        return Inverted(value, out > 1e-6, -torch.expm1(-out), everywhere)
    if isinstance(target, (nn.ELU, nn.CELU)) and target.alpha == 1:
        below = out.clamp(-1 + 1e-12, 0)
        value = torch.where(out > 0, out, torch.log1p(below))
        return Inverted(value, out > -1 + 1e-6, torch.where(out > 0, 1.0, 1 + below), everywhere)
    return None
