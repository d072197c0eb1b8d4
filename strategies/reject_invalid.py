"""The server's own hygiene: replies that would break the average are left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from logging import WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedleak.errors import InvalidInputError, InvalidUpdateError

from .delegate import DelegatingStrategy

#: Examples that a client may say it has: beyond, it would be the average alone.
_MOST_EXAMPLES = 10**9
#: Characters of a client's own words that are logged.
_SHOWN = 200

#: What Flower's averages want alike in all replies: names and types of the arrays, names of
#: the metrics with the length of those that are lists, and names of the two records.
_Form = tuple[tuple[tuple[str, str], ...], tuple[tuple[str, int], ...], tuple[str, ...]]


class RejectInvalid(DelegatingStrategy):
    """Leave out replies that would break the average, and log why.

    Flower's averaging strategies raise on a misshapen reply, and average NaN into the model:
    one broken client would end the training of all. Left out is what is empty, misshapen, of
    another type than was sent, not finite or out of bounds; what comes from a node that was
    not asked, or a second time; and where replies differ in their types and metrics, those of
    the minority. No reply is a measure for others because it came first.

    Parameters
    ----------
    strategy : Strategy
    required : collection of str, optional
        Names that every reply must hold; by default all that was sent.
    bound : float
        Largest entry allowed, in units of the largest that was sent (of 1, where that is less).

    Attributes
    ----------
    accepted : int
        Number of replies of the last round that went into the average.

    Raises
    ------
    InvalidInputError
        If ``bound`` is not positive.
    """

    def __init__(
        self, strategy: Strategy, required: Collection[str] | None = None, bound: float = 1e6
    ):
        super().__init__(strategy)
        if not bound > 0:
            raise InvalidInputError(f"bound must be above 0, not {bound!r}")
        self.required, self.bound = required, bound
        self.accepted = 0
        self._sent: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self._largest = bound
        self._asked: set[int] = set()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        sent = {name: np.asarray(array.numpy()) for name, array in arrays.items()}
        self._sent = {name: (value.shape, value.dtype) for name, value in sent.items()}
        largest = [float(np.abs(v).max()) for v in sent.values() if v.size and v.dtype.kind == "f"]
        self._largest = self.bound * max([1.0, *(v for v in largest if math.isfinite(v))])
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._asked = {message.metadata.dst_node_id for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        forms: list[_Form | None] = []  # None: left out, or an error, which the strategy counts
        problems: list[str] = []
        heard: set[int] = set()
        replies = list(replies)
        for reply in replies:
            form, problem, node = None, "", reply.metadata.src_node_id
            if not reply.has_error():
                try:
                    self._expect(node, heard)
                    form = self._form(reply)
                except InvalidUpdateError as error:
                    problem = str(error)
                except Exception as error:  # a client may send anything
                    problem = f"it cannot be read: {error!r}"
                heard.add(node)
            forms.append(form)
            problems.append(problem)
        usual = self._usual([form for form in forms if form is not None])
        kept = []
        for reply, form, problem in zip(replies, forms, problems, strict=True):
            if form is not None and form != usual:
                problem = f"its types and metrics are {form}, unlike those of most"
            if problem:
                node = reply.metadata.src_node_id
                log(WARNING, "round %s: node %s is left out: %s", server_round, node,
                    problem[:_SHOWN])  # fmt: skip
            else:
                kept.append(reply)
        self.accepted = sum(not reply.has_error() for reply in kept)
        return super().aggregate_train(server_round, kept)

    def _usual(self, forms: list[_Form]) -> _Form | None:
        """Return the form of most replies; of equally many, the one nearest to what was sent."""
        counts = Counter(forms)
        sent = {name: dtype.str for name, (_, dtype) in self._sent.items()}

        def rank(form: _Form) -> tuple[int, bool, int, _Form]:
            as_sent = all(sent[name] == dtype for name, dtype in form[0])
            return -counts[form], not as_sent, len(form[1]), form

        return min(counts, key=rank, default=None)

    def _expect(self, node: int, heard: set[int]) -> None:
        if self._asked and node not in self._asked:
            raise InvalidUpdateError("it was not asked")
        if node in heard:
            raise InvalidUpdateError("it has replied already")

    def _form(self, reply: Message) -> _Form:
        """Return a reply's form.

        Raises
        ------
        InvalidUpdateError
            If it is none that can be averaged with others, of whatever form these are.
        """
        records = list(reply.content.array_records.values())
        if len(records) != 1 or len(reply.content.metric_records) != 1:
            raise InvalidUpdateError("it does not hold one ArrayRecord and one MetricRecord")
        (metrics,) = reply.content.metric_records.values()
        weight = metrics.get("num-examples")
        if isinstance(weight, list) or weight is None or not 0 < weight <= _MOST_EXAMPLES:
            raise InvalidUpdateError(
                f"num-examples is {weight!r}, not a positive number up to {_MOST_EXAMPLES}"
            )
        missing = [n for n in (self.required or self._sent) if n not in records[0]]
        if missing:
            raise InvalidUpdateError(f"{missing[0]!r} is missing")
        types = []
        for name, array in records[0].items():
            if name not in self._sent:
                raise InvalidUpdateError(f"{name!r} was not sent")
            value = array.numpy()
            self._check(name, value)
            types.append((name, value.dtype.str))
        lengths = [(n, len(v) if isinstance(v, list) else -1) for n, v in metrics.items()]
        names = [*reply.content.array_records, *reply.content.metric_records]
        return tuple(sorted(types)), tuple(sorted(lengths)), tuple(names)

    def _check(self, name: str, value: np.ndarray) -> None:
        shape, dtype = self._sent[name]
        if value.dtype.kind != dtype.kind or not _plain(value.dtype):
            raise InvalidUpdateError(f"{name!r} has dtype {value.dtype}, sent was {dtype}")
        if tuple(value.shape) != shape:
            raise InvalidUpdateError(f"{name!r} has shape {tuple(value.shape)}, sent was {shape}")
        if not np.isfinite(value).all():
            raise InvalidUpdateError(f"{name!r} holds NaN or infinite values")
        if value.dtype.kind == "f" and float(np.abs(value).max(initial=0)) > self._largest:
            raise InvalidUpdateError(f"{name!r} has entries above {self._largest:.3g}")


def _plain(dtype: np.dtype[Any]) -> bool:
    """Whether torch has such a type: no long double, no foreign byte order."""
    try:
        torch.from_numpy(np.empty(0, dtype))
    except (TypeError, ValueError):
        return False
    return True
