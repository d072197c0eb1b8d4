"""Entries that are not sent: the smallest ones, or random ones (gradient compression)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.defences.base import DEFENCES, Defence, Tensors
from fedleak.defences.quantisation import Sign


def smallest(value: Tensor, share: float, by_size: bool = True) -> Tensor:
    """Return where the smallest magnitudes are, ``share`` of them but never all; a mask.

    Without ``by_size``, where the smallest values are.
    """
    drop = max(min(int(share * value.numel()), value.numel() - 1), 0)
    order = (value.abs() if by_size else value).flatten().argsort(stable=True)
    mask = torch.zeros(value.numel(), dtype=torch.bool, device=value.device)
    mask[order[:drop]] = True
    return mask.reshape(value.shape)


@DEFENCES.register("prune")
@dataclass(frozen=True)
class MagnitudePruning(Defence):
    """Set the smallest entries of every tensor to zero.

    Parameters
    ----------
    share : float
        Fraction of each tensor's entries that is set to zero, in [0, 1). At least one
        entry of each tensor stays.

    Notes
    -----
    Per tensor, as in Deep Gradient Compression (Lin et al. 2018) and the defence of Zhu
    et al. 2019.
    """

    share: float = 0.0
    unit = "fraction of each tensor's entries set to zero"

    def __post_init__(self) -> None:
        self.demand("share", maximum=1.0)

    def contradiction(self, before: Sequence[Defence]) -> str:
        if any(isinstance(d, Sign) for d in before):
            return "drops the smallest entries, but signs are all of one size; put it first"
        return ""

    def __call__(self, update: Tensors, generator: torch.Generator) -> Tensors:
        return {k: v.masked_fill(smallest(v, self.share), 0.0) for k, v in update.items()}

    def errors(self, received: Tensors) -> Tensors:
        """Return 0 for what was kept; what was dropped is not zero, but below all that was kept.

        Somewhere between minus and plus the smallest magnitude that is left: as uniform, a
        standard deviation of that over the root of three.
        """
        out = {}
        for name, value in received.items():
            dropped = smallest(value, self.share)
            bound = value.abs().masked_fill(dropped, torch.inf).flatten().amin()
            out[name] = dropped.to(value) * bound / math.sqrt(3)
        return out


@DEFENCES.register("sparsify")
@dataclass(frozen=True)
class RandomSparsification(Defence):
    """Set random entries of every tensor to zero; the others are sent as they are.

    Parameters
    ----------
    share : float
        Fraction of each tensor's entries that is set to zero, in [0, 1). At least one
        entry of each tensor stays.

    Notes
    -----
    The random masks of Konecny et al. 2016, "Strategies for improving communication
    efficiency", section 2, drawn anew for each update.
    """

    share: float = 0.0
    unit = "fraction of each tensor's entries set to zero, at random"

    def __post_init__(self) -> None:
        self.demand("share", maximum=1.0)

    def __call__(self, update: Tensors, generator: torch.Generator) -> Tensors:
        out = {}
        for name, value in update.items():
            drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            out[name] = value.masked_fill(smallest(drawn, self.share).to(value.device), 0.0)
        return out

    def errors(self, received: Tensors) -> Tensors:
        """Return infinity for what was dropped: the smallest entries, also under noise."""
        return {
            k: torch.zeros_like(v).masked_fill(smallest(v, self.share), torch.inf)
            for k, v in received.items()
        }
