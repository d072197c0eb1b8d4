"""A bound on the update's norm, and differential privacy: the bound plus noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedleak.defences.base import DEFENCES, Defence, Tensors
from fedleak.errors import InvalidInputError


@DEFENCES.register("clip")
@dataclass(frozen=True)
class Clipping(Defence):
    """Scale the whole update down to a Euclidean norm, if it is above it.

    Parameters
    ----------
    norm : float
        The bound, in the unit of the update: of a gradient, or of a change of weights.
    """

    norm: float = 0.0
    unit = "bound on the Euclidean norm of the whole update; 0: none"

    def __post_init__(self) -> None:
        self.demand("norm")

    @property
    def rescales(self) -> Literal["", "update", "tensor"]:
        return "update"

    def __call__(self, update: Tensors, generator: torch.Generator) -> Tensors:
        factor = _factor(update, self.norm)
        return {k: (v.double() * factor).to(v.dtype) for k, v in update.items()}

    def errors(self, received: Tensors) -> Tensors:
        return {k: v.new_zeros((), dtype=torch.float64) for k, v in received.items()}


@DEFENCES.register("dp")
@dataclass(frozen=True)
class DP(Defence):
    """Clip and add Gaussian noise: the Gaussian mechanism of DP-SGD (Abadi et al. 2016).

    :func:`fedleak.defences.accountant.epsilon` says what it guarantees.

    Parameters
    ----------
    clip : float
        Bound on the Euclidean norm, as of ``clip``.
    noise : float
        Noise multiplier: the standard deviation in every entry, in clips.
    examples : int
        0: the update is clipped as a whole, which protects a client. Else the gradient of each
        of this many images is clipped and the noise is added to their sum before it is
        divided by their number, which protects one image.
        :func:`fedleak.defences.defend_examples` applies it.
    """

    clip: float = 0.0
    noise: float = 0.0
    examples: int = 0
    unit = "bound on the Euclidean norm; noise: its standard deviation in clips"

    def __post_init__(self) -> None:
        for key in ("clip", "noise", "examples"):
            self.demand(key)
        if self.clip and not self.noise:
            raise InvalidInputError(
                "defence 'dp' needs noise, the multiplier: write dp:clip=1,noise=1.1; clipping "
                "alone is clip:1"
            )
        if self.noise and not self.clip:
            raise InvalidInputError(
                "defence 'dp': noise is counted in clips, and clip is 0; write dp:clip=1,noise=1.1"
            )

    @property
    def rescales(self) -> Literal["", "update", "tensor"]:
        return "update"

    @property
    def noise_multiplier(self) -> float | None:
        return self.noise

    def contradiction(self, before: Sequence[Defence]) -> str:
        if before and self.examples:
            return "is applied to the gradients of single images, and so must come first"
        return ""

    def __call__(self, update: Tensors, generator: torch.Generator) -> Tensors:
        if self.examples > 1:
            raise InvalidInputError(
                f"defence 'dp' with examples={self.examples} needs the gradient of every image, "
                "and this update is their mean; leave examples out to clip the update as a whole"
            )
        return self.mean_of({k: v.unsqueeze(0) for k, v in update.items()}, generator)

    def mean_of(self, examples: Tensors, generator: torch.Generator) -> Tensors:
        """Return the noisy mean of clipped gradients.

        Parameters
        ----------
        examples : dict of str to Tensor, shape (B, *parameter)

        Raises
        ------
        InvalidInputError
            If B is not the number of examples that noise and accounting count on.
        """
        count = len(next(iter(examples.values()))) if examples else 1
        if count != max(self.examples, 1):
            raise InvalidInputError(
                f"defence 'dp' with examples={self.examples} was given the gradients of {count} "
                "images; set examples to the batch size"
            )
        each = [{k: v[i] for k, v in examples.items()} for i in range(count)]
        factors = [_factor(one, self.clip) for one in each]
        out = {}
        for name, value in examples.items():
            total = sum(
                (f * one[name].double() for f, one in zip(factors, each, strict=True)),
                torch.zeros(value.shape[1:], dtype=torch.float64, device=value.device),
            )
            drawn = torch.randn(value.shape[1:], generator=generator, dtype=torch.float64)
            noisy = total + self.noise * self.clip * drawn.to(value.device)
            out[name] = (noisy / count).to(value.dtype)
        return out

    def errors(self, received: Tensors) -> Tensors:
        std = self.noise * self.clip / max(self.examples, 1)
        return {k: v.new_tensor(std, dtype=torch.float64) for k, v in received.items()}


def _factor(update: Tensors, norm: float) -> Tensor:
    """Return what clipping multiplies the update by, at most 1."""
    total = torch.stack([v.double().square().sum() for v in update.values()]).sum().sqrt()
    return (norm / total.clamp_min(1e-300)).clamp(max=1.0)
