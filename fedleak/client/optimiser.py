"""How clients turn gradients into steps, and what a step tells of a gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.registry import Registry


class Optimiser(ABC):
    """How a client moves its weights by gradients.

    One of your own is a frozen dataclass, whose fields are its options, with :meth:`step`; state
    that it keeps is ``slots`` tensors like each weight, zero at first.

    Attributes
    ----------
    slots : int
        Tensors of state for each weight.
    """

    @property
    def slots(self) -> int:
        return 0

    @abstractmethod
    def step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        state: Sequence[Tensor],
        rate: float,
        number: int,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return weights and state after one step; pure and differentiable.

        Parameters
        ----------
        weights, gradients : sequence of Tensor
        state : sequence of Tensor
            From :meth:`init`, or from the step before.
        rate : float
            The learning rate.
        number : int
            Of the step, from 1.
        """

    def init(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the state before the first step: first one slot of all weights, then the next."""
        return [torch.zeros_like(w) for _ in range(self.slots) for w in weights]

    def moves(self, steps: int) -> list[float]:
        """Return how far each step moves for a constant gradient, in learning rates."""
        return [1.0] * steps

    def one_step_view(self, change: Tensor, sent: Tensor, rate: float, gain: float) -> Tensor:
        """Return the gradient of the one step that a change of weights is taken for.

        Parameters
        ----------
        change : Tensor
            ``sent - received`` of one parameter; any leading dimensions.
        sent : Tensor
            The parameter itself.
        rate, gain : float
            Learning rate, and the sum of :meth:`moves`.
        """
        return change / (rate * gain)

    def change(self, view: Tensor, sent: Tensor, rate: float, gain: float) -> Tensor:
        """Return the change of weights that a one-step view is of."""
        return rate * gain * view

    def torch(self, parameters: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
        """Return the optimiser as clients run it, in place."""
        return _InPlace(list(parameters), self, rate)


class _InPlace(torch.optim.Optimizer):
    """Any pure optimiser as one of torch."""

    def __init__(self, parameters: list[Tensor], optimiser: Optimiser, rate: float):
        super().__init__(parameters, {})
        self.optimiser, self.rate, self.number = optimiser, rate, 0
        self.kept = optimiser.init([p.detach() for p in parameters])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.number += 1
        parameters = self.param_groups[0]["params"]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        moved, self.kept = self.optimiser.step(
            parameters, gradients, self.kept, self.rate, self.number
        )
        for p, new in zip(parameters, moved, strict=True):
            p.copy_(new)


#: Classes of optimisers.
OPTIMISERS: Registry[type[Optimiser]] = Registry("optimiser", "fedleak.optimisers")


@OPTIMISERS.register("sgd")
@dataclass(frozen=True)
class SGD(Optimiser):
    """Stochastic gradient descent, as ``torch.optim.SGD``.

    Its one-step view is the gradient itself for one step, up to rounding, and the mean over the
    steps otherwise.

    Parameters
    ----------
    momentum : float
        In [0, 1).
    weight_decay : float
    nesterov : bool
        Whether momentum looks ahead (Sutskever et al. 2013).
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _demand_numbers(self)
        if self.momentum >= 1:
            raise InvalidInputError(f"momentum must be below 1, not {self.momentum}")
        if self.nesterov and not self.momentum:
            raise InvalidInputError("nesterov takes a momentum above 0")

    @property
    def slots(self) -> int:
        return 1 if self.momentum else 0

    def step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        state: Sequence[Tensor],
        rate: float,
        number: int,
    ) -> tuple[list[Tensor], list[Tensor]]:
        moves = [g + self.weight_decay * w for g, w in zip(gradients, weights, strict=True)]
        velocity: list[Tensor] = []
        if self.momentum:
            velocity = [self.momentum * v + g for v, g in zip(state, moves, strict=True)]
            if self.nesterov:
                moves = [g + self.momentum * v for g, v in zip(moves, velocity, strict=True)]
            else:
                moves = velocity
        return [w - rate * g for w, g in zip(weights, moves, strict=True)], velocity

    def moves(self, steps: int) -> list[float]:
        m = self.momentum
        ahead = 1 if self.nesterov else 0
        return [(1 - m ** (s + ahead)) / (1 - m) for s in range(1, steps + 1)]

    def one_step_view(self, change: Tensor, sent: Tensor, rate: float, gain: float) -> Tensor:
        return change / (rate * gain) - self.weight_decay * sent

    def change(self, view: Tensor, sent: Tensor, rate: float, gain: float) -> Tensor:
        return rate * gain * (view + self.weight_decay * sent)

    def torch(self, parameters: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, rate, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


def _demand_numbers(optimiser: Optimiser) -> None:
    """Refuse options that are no finite numbers from 0."""
    for field in fields(optimiser):  # type: ignore[arg-type]
        value = getattr(optimiser, field.name)
        if field.type in (bool, "bool"):
            if not isinstance(value, bool):
                raise InvalidInputError(f"{field.name} must be true or false, not {value!r}")
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise InvalidInputError(f"{field.name} must be a number from 0, not {value!r}")
