"""What a client does, as the protocol says it: stated, never assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedleak.client.loss import CrossEntropy, Loss
from fedleak.client.optimiser import SGD, Optimiser
from fedleak.errors import InvalidInputError


@dataclass(frozen=True)
class LocalTraining:
    """What a client does before it shares weights: minibatch steps, as the protocol says.

    Each epoch draws a new order of the client's images and cuts it into batches; the last
    one may be smaller.

    Attributes
    ----------
    learning_rate : float
    batch_size : int
    epochs : int
        Passes over the client's images.
    momentum, weight_decay : float
        Of SGD, where no optimiser is named.
    """

    learning_rate: float
    batch_size: int = 1
    epochs: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("epochs", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInputError(
                    f"{name} must be a whole number from {least}, not {value!r}"
                )
        for name in ("learning_rate", "momentum", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidInputError(f"{name} must be a number, not {value!r}")
        rates = (self.learning_rate, self.momentum, self.weight_decay)
        if not all(math.isfinite(r) and r >= 0 for r in rates) or self.learning_rate == 0:
            raise InvalidInputError(
                f"learning_rate ({self.learning_rate}) must be above 0, momentum "
                f"({self.momentum}) and weight_decay ({self.weight_decay}) at least 0"
            )
        if self.momentum >= 1:
            raise InvalidInputError(f"momentum must be below 1, not {self.momentum}")

    @property
    def loss(self) -> Loss:
        """What clients minimise."""
        return CrossEntropy()

    @property
    def optimiser(self) -> Optimiser:
        """How clients step."""
        return SGD(self.momentum, self.weight_decay)

    def steps(self, images: int) -> int:
        """Return how many steps a client with ``images`` images takes."""
        return self.epochs * math.ceil(images / self.batch_size)

    def gain(self, images: int) -> float:
        """Return by how much the weights move for a constant gradient, in learning rates.

        The number of steps; more with momentum: step ``s`` moves by
        ``1 + momentum + ... + momentum^(s - 1)``.
        """
        return sum(self.optimiser.moves(self.steps(images)))

    def pace(self, images: int) -> list[tuple[float, float]]:
        """Return, for each step, its part of the update and how far the weights had come.

        Both are parts of one, for a constant gradient: with momentum early steps move more, and
        the weights are slow at first.
        """
        steps, gain = self.steps(images), self.gain(images)
        moves = self.optimiser.moves(steps)
        return [(moves[steps - 1 - s] / gain, sum(moves[:s]) / gain) for s in range(steps)]
