"""Few bits for each entry: uniform quantisation, and signs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from fedleak.defences.base import DEFENCES, Defence, Tensors
from fedleak.errors import InvalidInputError


@DEFENCES.register("quantise")
@dataclass(frozen=True)
class Quantisation(Defence):
    """Round every entry to a symmetric uniform grid with 0 and the tensor's largest magnitude.

    Parameters
    ----------
    bits : int
        Bits for an entry, 2 to 24: the grid has ``2^bits - 1`` values. With 2 bits every
        entry is 0 or plus or minus the largest (TernGrad).
    rounding : {"nearest", "stochastic"}
        Stochastic rounding is unbiased (QSGD, Alistarh et al. 2017).
    """

    bits: int = 0
    rounding: Literal["nearest", "stochastic"] = "nearest"
    unit = "bits for an entry, 2 to 24; 0: not quantised"

    def __post_init__(self) -> None:
        self.demand("bits", maximum=24, included=True)
        if self.bits == 1:
            raise InvalidInputError(
                "defence 'quantise': strength 1 is not in [2, 24]; one bit for an entry is sign:1"
            )

    @property
    def _levels(self) -> int:
        """Steps from 0 to the largest magnitude."""
        return int(2 ** (self.bits - 1) - 1)

    def __call__(self, update: Tensors, generator: torch.Generator) -> Tensors:
        out = {}
        for name, value in update.items():
            step = _largest(value) / self._levels
            position = value.double() / step.clamp_min(1e-300)
            if self.rounding == "stochastic":
                drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                position = (position + drawn.to(value.device)).floor()
            out[name] = (position.round() * step).to(value.dtype)
        return out

    def errors(self, received: Tensors) -> Tensors:
        # The largest entry is on the grid, and so tells the step. Rounding is uniform over
        # one step; the variance of stochastic rounding is twice that, on average.
        share = math.sqrt(12 if self.rounding == "nearest" else 6) * self._levels
        return {name: _largest(value) / share for name, value in received.items()}


@DEFENCES.register("sign")
@dataclass(frozen=True)
class Sign(Defence):
    """Send the sign of every entry (signSGD, Bernstein et al. 2018).

    Parameters
    ----------
    size : float
        With which magnitude, see ``scale``.
    scale : {"mean", "fixed"}
        ``mean``: ``size`` times the mean magnitude of the tensor; 1 keeps it (Karimireddy
        et al. 2019). ``fixed``: ``size`` itself, the same for all tensors, whose own sizes
        are then lost.
    """

    size: float = 0.0
    scale: Literal["mean", "fixed"] = "mean"
    signs = True
    unit = "magnitude, relative to each tensor's mean magnitude"

    def __post_init__(self) -> None:
        self.demand("size")

    @property
    def rescales(self) -> Literal["", "update", "tensor"]:
        return "tensor" if self.scale == "fixed" else ""

    def __call__(self, update: Tensors, generator: torch.Generator) -> Tensors:
        return {
            k: v.sign() * (self.size if self.scale == "fixed" else self.size * _mean(v))
            for k, v in update.items()
        }

    def errors(self, received: Tensors) -> Tensors:
        """Return how far a normally distributed entry of this sign is from what is sent.

        With mean magnitude ``m`` its mean square is ``m^2 pi / 2``. A fixed size tells no
        ``m``: then the deviation is relative to it.
        """
        size = 1.0 if self.scale == "fixed" else self.size
        share = math.sqrt(math.pi / 2 - 2 * size + size**2) / size
        return {name: share * value.abs() for name, value in received.items()}


def _largest(value: torch.Tensor) -> torch.Tensor:
    return value.double().abs().amax() if value.numel() else value.double().sum()


def _mean(value: torch.Tensor) -> torch.Tensor:
    return value.abs().mean() if value.numel() else value.sum()
