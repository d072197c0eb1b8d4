"""A strategy that forwards everything to another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

_HOOKS = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")


class DelegatingStrategy(Strategy):
    """Wraps a strategy by delegation; a base to override single methods of.

    Unknown attributes are read from the wrapped strategy. A wrapped strategy with a
    ``start`` of its own keeps it: while it runs, its four hooks are routed through the
    wrapper.

    Parameters
    ----------
    strategy : Strategy
        The strategy to wrap, in any state; its settings are not touched.
    """

    def __init__(self, strategy: Strategy):
        self.strategy = strategy
        self._hooks: dict[str, Callable[..., Any]] = {n: getattr(strategy, n) for n in _HOOKS}

    def __getattr__(self, name: str) -> Any:
        if name in ("strategy", "_hooks"):  # not set yet: copying, unpickling
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._hooks["configure_train"](server_round, arrays, config, grid)

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
