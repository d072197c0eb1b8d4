"""The server's own hygiene: replies that would break the average are left out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from logging import WARNING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from strategies.delegate import DelegatingStrategy


class RejectInvalid(DelegatingStrategy):
    """Leave out replies that are empty, misshapen or not finite, and log why.

    Flower's averaging strategies raise on the second and average NaN into the model on
    the third: one broken client would end the training of all.

    Parameters
    ----------
    strategy : Strategy
    required : collection of str, optional
        Names that every reply must hold; by default all that was sent.

    Attributes
    ----------
    accepted : int
        Number of replies of the last round that went into the average.
    """

    def __init__(self, strategy: Strategy, required: Collection[str] | None = None):
        super().__init__(strategy)
        self.required = required
        self.accepted = 0
        self._sent: dict[str, tuple[int, ...]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._sent = {name: tuple(array.shape) for name, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        kept, keys = [], None
        for reply in replies:
            problem = ""
            if not reply.has_error():
                try:
                    problem = self._problem(reply)
                except Exception as error:  # a client may send anything
                    problem = f"it cannot be read: {error!r}"
            if not problem and not reply.has_error():
                found = _keys(reply)
                keys = keys or found
                if found != keys:
                    problem = f"its records hold {found}, those of others {keys}"
            if problem:
                node = reply.metadata.src_node_id
                log(WARNING, "round %s: node %s is left out: %s", server_round, node, problem)
            else:
                kept.append(reply)
        self.accepted = sum(not reply.has_error() for reply in kept)
        return super().aggregate_train(server_round, kept)

    def _problem(self, reply: Message) -> str:
        records = list(reply.content.array_records.values())
        if len(records) != 1 or len(reply.content.metric_records) != 1:
            return "it does not hold one ArrayRecord and one MetricRecord"
        (metrics,) = reply.content.metric_records.values()
        weight = metrics.get("num-examples")
        if isinstance(weight, list) or weight is None or not (0 < weight < math.inf):
            return f"num-examples is {weight!r}, not a positive number"
        arrays = records[0]
        missing = [n for n in (self.required or self._sent) if n not in arrays]
        if missing:
            return f"{missing[0]!r} is missing"
        for name, array in arrays.items():
            value = array.numpy()
            shape = tuple(value.shape)
            if value.dtype.kind not in "fiub":
                return f"{name!r} has dtype {value.dtype}"
            if name not in self._sent or shape != self._sent[name]:
                return f"{name!r} has shape {shape}, sent was {self._sent.get(name)}"
            if not np.isfinite(value).all():
                return f"{name!r} holds NaN or infinite values"
        return ""


def _keys(reply: Message) -> list[list[str]]:
    """Return the names that Flower's averages want alike in all replies."""
    records = reply.content.array_records, reply.content.metric_records
    names = [sorted(r) for r in records]
    return [*names, *(sorted(r) for r in reply.content.metric_records.values())]
