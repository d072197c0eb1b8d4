"""Noise in proportion to the update, Gaussian and Laplace."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.defences.base import DEFENCES, Defence, Update, rms


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

    def __call__(self, update: Update, generator: torch.Generator) -> Update:
        noisy = {}
        for name, value in update.items():
            noise = self.draw(value.shape, generator).to(value.device)
            noisy[name] = (value.double() + self.relative * rms(value) * noise).to(value.dtype)
        return noisy

    def errors(self, received: Update) -> Update:
        # The noise is in the received root mean square, too: rms^2 (1 + relative^2).
        share = self.relative / math.hypot(1.0, self.relative)
        return {name: share * rms(value) for name, value in received.items()}


@DEFENCES.register("noise")
@dataclass(frozen=True)
class GaussianNoise(RelativeNoise):
    """Gaussian noise, independent in every entry."""

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
