"""Noise in proportion to the update, Gaussian and Laplace."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.defences.base import DEFENCES, Defence, Tensors, rms


@dataclass(frozen=True)
class RelativeNoise(Defence):
    """Noise in proportion to each tensor.

    Parameters
    ----------
    relative : float
        Standard deviation of the noise relative to the root mean square of the entry's
        own tensor: 0.1 is noise at a tenth of the signal, at every layer alike.

    Notes
    -----
    Noise in proportion to the signal is how the gradient-inversion literature reports it;
    it carries no differential-privacy guarantee. :class:`fedleak.defences.clipping.DP` does.
    """

    relative: float = 0.0
    unit = "standard deviation relative to each tensor's root mean square"

    def __post_init__(self) -> None:
        self.demand("relative")

    @abstractmethod
    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return noise of mean 0 and variance 1, float64."""

    def contradiction(self, before: Sequence[Defence]) -> str:
        if any(d.rescales == "tensor" for d in before):
            return (
                "is relative to the size of each tensor, which is lost before it; put it first, "
                "or keep the scale (sign:1+noise:0.1)"
            )
        return ""

    def __call__(self, update: Tensors, generator: torch.Generator) -> Tensors:
        noisy = {}
        for name, value in update.items():
            noise = self.draw(value.shape, generator).to(value.device)
            noisy[name] = (value.double() + self.relative * rms(value) * noise).to(value.dtype)
        return noisy

    def errors(self, received: Tensors) -> Tensors:
        # The noise is in the received root mean square, too: rms^2 (1 + relative^2).
        share = self.relative / math.hypot(1.0, self.relative)
        return {name: share * rms(value) for name, value in received.items()}


@DEFENCES.register("noise")
@dataclass(frozen=True)
class GaussianNoise(RelativeNoise):
    """Gaussian noise, independent in every entry.

    Parameters
    ----------
    relative : float
        As for :class:`RelativeNoise`.
    """

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)


@DEFENCES.register("laplace")
@dataclass(frozen=True)
class LaplaceNoise(RelativeNoise):
    """Laplace noise, independent in every entry.

    Equal strengths of ``laplace`` and ``noise`` have equal variance: the scale ``b`` of the
    distribution is the standard deviation over the root of two.

    Parameters
    ----------
    relative : float
        As for :class:`RelativeNoise`.
    """

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        first, second = (
            torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)
            for _ in range(2)
        )
        return (first - second) / math.sqrt(2)
