"""Flower's own client mods as defences, by their names and the arguments of their constructors."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from fedleak.defences.base import DEFENCES, Defence, Tensors
from fedleak.defences.clipping import DP, Clipping
from fedleak.errors import InvalidInputError


class _OfOurs(Defence):
    """A defence that is one of ours, told in Flower's words."""

    @property
    @abstractmethod
    def ours(self) -> Defence:
        """The same, in ours."""

    @property
    def rescales(self) -> Literal["", "update", "tensor"]:
        return self.ours.rescales

    @property
    def noise_multiplier(self) -> float | None:
        return self.ours.noise_multiplier

    def __call__(self, update: Tensors, generator: torch.Generator) -> Tensors:
        return self.ours(update, generator)

    def errors(self, received: Tensors) -> Tensors:
        return self.ours.errors(received)


@DEFENCES.register("fixedclipping_mod")
@dataclass(frozen=True)
class FixedClippingMod(_OfOurs):
    """``flwr.clientapp.mod.fixedclipping_mod``: ``clip`` of the change of weights.

    Parameters
    ----------
    clipping_norm : float
        That of ``DifferentialPrivacyClientSideFixedClipping``, which sends it to the clients.
    """

    clipping_norm: float = 0.0
    unit = "bound on the Euclidean norm of the whole update; 0: none"

    def __post_init__(self) -> None:
        self.demand("clipping_norm")

    @property
    def ours(self) -> Defence:
        return Clipping(self.clipping_norm)


@DEFENCES.register("LocalDpMod")
@dataclass(frozen=True)
class LocalDpMod(_OfOurs):
    """``flwr.clientapp.mod.LocalDpMod``: ``dp`` of the change of weights.

    The standard deviation in every entry is ``sensitivity sqrt(2 ln(1.25 / delta)) / epsilon``
    (Dwork & Roth 2014, theorem A.1), once for each round. What it guarantees hangs on the
    sensitivity being true: it is ``2 clipping_norm`` for clients that may be any other.

    Parameters
    ----------
    clipping_norm, sensitivity, epsilon, delta : float
        As Flower takes them.
    """

    clipping_norm: float = 0.0
    sensitivity: float = 0.0
    epsilon: float = 0.0
    delta: float = 0.0
    unit = "bound on the Euclidean norm; sensitivity, epsilon, delta: as Flower takes them"

    def __post_init__(self) -> None:
        for key in ("clipping_norm", "sensitivity", "epsilon"):
            self.demand(key)
        self.demand("delta", maximum=1.0)
        if self.clipping_norm and not (self.sensitivity and self.epsilon and self.delta):
            raise InvalidInputError(
                "defence 'LocalDpMod' needs all that Flower's takes: write LocalDpMod:"
                "clipping_norm=1,sensitivity=1,epsilon=10,delta=1e-5; clipping alone is "
                "fixedclipping_mod:1"
            )

    @property
    def ours(self) -> Defence:
        if not self.clipping_norm:
            return DP()
        std = self.sensitivity * math.sqrt(2 * math.log(1.25 / self.delta)) / self.epsilon
        return DP(self.clipping_norm, std / self.clipping_norm)
