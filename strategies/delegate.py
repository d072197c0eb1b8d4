"""A strategy that forwards everything to another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedleak.errors import InvalidInputError

from .sent import Sent

_HOOKS = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")


def _counted(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor, with those of its subclasses, tell when it is done."""

    @wraps(init)
    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__dict__["_making"] = self.__dict__.get("_making", 0) + 1
        try:
            init(self, *args, **kwargs)
        finally:
            self.__dict__["_making"] -= 1

    return counting


class DelegatingStrategy(Strategy):
    """Wraps a strategy by delegation; a base to override single methods of.

    Attributes that are not the wrapper's own are read from the wrapped strategy, and, once
    the wrapper is made, written to it. A wrapped strategy with a ``start`` of its own keeps
    it: while it runs, its four hooks are routed through the wrapper.

    Parameters
    ----------
    strategy : Strategy
        The strategy to wrap, in any state; its settings are not touched.

    Attributes
    ----------
    sent : Sent
        What each node was sent in the last round, as far as this wrapper has seen it.

    Raises
    ------
    InvalidInputError
        If it is no strategy of Flower's message API (``flwr.serverapp.strategy``).
    """

    @_counted
    def __init__(self, strategy: Strategy):
        if not isinstance(strategy, Strategy):
            raise InvalidInputError(_refusal(type(self).__name__, strategy))
        self.strategy = strategy
        self._hooks: dict[str, Callable[..., Any]] = {n: getattr(strategy, n) for n in _HOOKS}
        self.sent = Sent()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _counted(cls.__init__)  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        if name in ("strategy", "_hooks"):  # not set yet: copying, unpickling
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        making = self.__dict__.get("_making", 1)
        if making or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self.strategy, name, value)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(self._hooks["configure_train"](server_round, arrays, config, grid))
        self.sent = Sent(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return self._hooks["aggregate_train"](server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._hooks["configure_evaluate"](server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return self._hooks["aggregate_evaluate"](server_round, replies)

    def summary(self) -> None:
        self.strategy.summary()

    def start(self, *args: Any, **kwargs: Any) -> Result:
        if type(self.strategy).start is Strategy.start:
            return super().start(*args, **kwargs)
        for name in _HOOKS:
            setattr(self.strategy, name, getattr(self, name))
        try:
            return self.strategy.start(*args, **kwargs)
        finally:
            for name in _HOOKS:
                delattr(self.strategy, name)


def _refusal(wrapper: str, strategy: object) -> str:
    """Say why this cannot be wrapped, and what can be done."""
    kind = type(strategy).__name__
    if isinstance(strategy, type):
        return f"{wrapper} wraps a strategy, not a class: write {strategy.__name__}(...)"
    if hasattr(strategy, "aggregate_fit"):
        return (
            f"{kind} is a strategy of Flower's old API (flwr.server.strategy), which {wrapper} "
            "cannot wrap; capture what its clients send, and attack that with `fedleak attack`: "
            "strategy = fedleak.strategies.capture_fit(strategy, Net, (3, 32, 32), "
            "LocalTraining(0.1), 'captures')"
        )
    return f"{wrapper} wraps a strategy of flwr.serverapp.strategy, not {strategy!r:.100}"
