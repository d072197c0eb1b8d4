"""How clients turn gradients into steps, and what a step tells of a gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from fedleak import precision
from fedleak.errors import InvalidInputError
from fedleak.registry import Registry

#: Added to a norm by ``torch.nn.utils.clip_grad_norm_``.
_BESIDE_NORM = 1e-6


def clipped(gradients: Sequence[Tensor], max_norm: float, each: bool = False) -> list[Tensor]:
    """Scale gradients down to a Euclidean norm over all of them, where they are above it.

    Parameters
    ----------
    gradients : sequence of Tensor
    max_norm : float
        0 for none.
    each : bool
        Whether the first dimension counts clients, each with a norm of its own.
    """
    if not max_norm:
        return list(gradients)
    parts = [g.flatten(1 if each else 0).square().sum(-1) for g in gradients]
    # Where all is 0 the root has no derivative.
    norm = torch.stack(parts).sum(0).clamp_min(torch.finfo(parts[0].dtype).tiny)
    factor = (max_norm / (norm.sqrt() + _BESIDE_NORM)).clamp(max=1.0)
    return [g * factor.reshape(-1, *[1] * (g.ndim - 1)) if each else g * factor for g in gradients]


class Optimiser(ABC):
    """How a client moves its weights by gradients.

    One of your own is a frozen dataclass, whose fields are its options, with :meth:`step`; state
    that it keeps is ``slots`` tensors like each weight, zero at first.

    Attributes
    ----------
    slots : int
        Tensors of state for each weight.
    signs : bool
        Whether a step tells little more of a gradient than the signs of its entries.
    """

    signs: ClassVar[bool] = False

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

    def taken(self, gradient: Tensor, sent: Tensor) -> Tensor:
        """Return what a first step takes for the gradient of a parameter: with coupled decay."""
        return gradient

    def one_step_errors(
        self, change: Tensor, sent: Tensor, rate: float, gain: float
    ) -> Tensor | None:
        """Return how far each entry of :meth:`one_step_view` may be from the gradient's.

        As a standard deviation, infinite where it says no more than a sign; None where nothing is
        lost but rounding alike in all entries.
        """
        return None

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


#: What a step lacks to a whole one counts from so many times its rounding.
_RESOLVED = 4


@dataclass(frozen=True)
class _Adaptive(Optimiser):
    """What Adam and AdamW share; ``beta1``, ``beta2`` and ``eps`` as in torch."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    signs: ClassVar[bool] = True
    _decoupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _demand_numbers(self)
        if self.beta1 >= 1 or self.beta2 >= 1:
            raise InvalidInputError(
                f"beta1 ({self.beta1}) and beta2 ({self.beta2}) must be below 1"
            )

    @property
    def slots(self) -> int:
        return 2

    def taken(self, gradient: Tensor, sent: Tensor) -> Tensor:
        return gradient if self._decoupled else gradient + self.weight_decay * sent

    def step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        state: Sequence[Tensor],
        rate: float,
        number: int,
    ) -> tuple[list[Tensor], list[Tensor]]:
        count, decay = len(weights), self.weight_decay
        gradients = [self.taken(g, w) for g, w in zip(gradients, weights, strict=True)]
        first = [
            self.beta1 * m + (1 - self.beta1) * g
            for m, g in zip(state[:count], gradients, strict=True)
        ]
        second = [
            self.beta2 * v + (1 - self.beta2) * g.square()
            for v, g in zip(state[count:], gradients, strict=True)
        ]
        own, square = 1 - self.beta1**number, 1 - self.beta2**number
        kept = 1 - rate * decay if self._decoupled else 1.0
        # The smallest number under the root keeps its derivative finite where a gradient is zero.
        moved = [
            kept * w - rate * (m / own) / ((v / square + 1e-300).sqrt() + self.eps)
            for w, m, v in zip(weights, first, second, strict=True)
        ]
        return moved, [*first, *second]

    def _step(self, change: Tensor, sent: Tensor, rate: float, gain: float) -> Tensor:
        """Return the step in learning rates, without decoupled decay: about a sign."""
        decay = self.weight_decay if self._decoupled else 0.0
        return change / (rate * gain) - decay * sent

    def _missing(self, step: Tensor, sent: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Return what a first step lacks to a whole one, and the rounding of that.

        ``|g| / (|g| + eps)`` lacks ``eps / (|g| + eps)``: rounding of weights hides what is small.
        """
        rounding = torch.hypot(precision.ADAM_STEP * step, precision.WEIGHT * sent / rate)
        return 1 - step.abs(), rounding

    def one_step_view(self, change: Tensor, sent: Tensor, rate: float, gain: float) -> Tensor:
        step = self._step(change, sent, rate, gain)
        if gain != 1:
            return step
        lacks, rounding = self._missing(step, sent, rate)
        size = self.eps * (1 / lacks.maximum(_RESOLVED * rounding).clamp_min(1e-12) - 1)
        return step.sign() * size.clamp_min(0.0) - self.taken(torch.zeros_like(sent), sent)

    def one_step_errors(
        self, change: Tensor, sent: Tensor, rate: float, gain: float
    ) -> Tensor | None:
        if gain != 1:
            return None
        step = self._step(change, sent, rate, gain)
        lacks, rounding = self._missing(step, sent, rate)
        told = lacks > _RESOLVED * rounding
        error = self.eps * rounding / lacks.clamp_min(1e-12).square()
        return torch.where(told, error, torch.inf)

    def change(self, view: Tensor, sent: Tensor, rate: float, gain: float) -> Tensor:
        decay = self.weight_decay if self._decoupled else 0.0
        if gain == 1:
            g = self.taken(view, sent)
            view = g / (g.abs() + self.eps)
        return rate * gain * (view + decay * sent)


@OPTIMISERS.register("adam")
@dataclass(frozen=True)
class Adam(_Adaptive):
    """Adam (Kingma & Ba 2015), as ``torch.optim.Adam``: weight decay is part of the gradient.

    Its first step is ``rate * g / (|g| + eps)``: the one-step view is between -1 and 1, tells the
    sign of every entry, and of its size only where that is near ``eps``; nothing of how large a
    gradient is beside another. Of several steps it is a mean of such.

    Parameters
    ----------
    beta1, beta2 : float
        Of the two running means, in [0, 1).
    eps : float
    weight_decay : float
    """

    def torch(self, parameters: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
        betas = self.beta1, self.beta2
        return torch.optim.Adam(parameters, rate, betas, self.eps, self.weight_decay)


@OPTIMISERS.register("adamw")
@dataclass(frozen=True)
class AdamW(_Adaptive):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as ``torch.optim.AdamW``.

    Its one-step view is that of :class:`Adam`, the decay taken out.

    Parameters
    ----------
    beta1, beta2, eps : float
        As for :class:`Adam`.
    weight_decay : float
    """

    weight_decay: float = 0.01
    _decoupled: ClassVar[bool] = True

    def torch(self, parameters: Iterable[Tensor], rate: float) -> torch.optim.Optimizer:
        betas = self.beta1, self.beta2
        return torch.optim.AdamW(parameters, rate, betas, self.eps, self.weight_decay)


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
