"""FedSGD: clients share gradients, the server takes the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg


class FedSGD(FedAvg):
    """Average the clients' gradients and step: ``w <- w - learning_rate * mean(g)``.

    A reply's ArrayRecord holds a gradient for each trainable parameter, under the
    parameter's name; entries of the model that have none (buffers) stay as they are.
    McMahan et al. 2017, section 2.

    Parameters
    ----------
    learning_rate : float
        The server's step size.
    **kwargs
        As for ``flwr.serverapp.strategy.FedAvg``.
    """

    def __init__(self, learning_rate: float = 0.1, **kwargs: Any):
        super().__init__(**kwargs)
        self.learning_rate = learning_rate
        self.current: ArrayRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.current = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        mean, metrics = super().aggregate_train(server_round, replies)
        if mean is None or self.current is None:
            return None, metrics
        gradient = {name: array.numpy() for name, array in mean.items()}
        stepped = {}
        for name, array in self.current.items():
            value = array.numpy()
            if name in gradient:
                step = self.learning_rate * gradient[name].astype(np.float64)
                value = (value - step).astype(value.dtype)
            stepped[name] = Array(np.asarray(value))  # a 0-d result is a scalar
        return ArrayRecord(stepped), metrics
