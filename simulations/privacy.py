"""Flower's own differential privacy around a strategy, with what its clients do for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedleak.defences import DefenceSpec, parse_defence
from fedleak.errors import InvalidInputError, UnknownNameError
from fedleak.spelling import pairs
from fedleak.strategies import clipping_told
from simulations.scenario import Scenario

#: Mods of the clients; none where the server clips.
_MODS: dict[str, Mod | None] = {
    "DifferentialPrivacyServerSideFixedClipping": None,
    "DifferentialPrivacyServerSideAdaptiveClipping": None,
    "DifferentialPrivacyClientSideFixedClipping": fixedclipping_mod,
    "DifferentialPrivacyClientSideAdaptiveClipping": adaptiveclipping_mod,
}


def private(strategy: Strategy, scenario: Scenario) -> Strategy:
    """Wrap a strategy as ``strategy.privacy`` says; by default not at all.

    Raises
    ------
    UnknownNameError, InvalidInputError
        If there is no such wrapper or option, or Flower does not take it.
    """
    if not scenario.strategy.privacy:
        return strategy
    name, options = _parse(scenario.strategy.privacy)
    kind = getattr(flower, name)
    keys = list(inspect.signature(kind).parameters)[1:]
    for key in options:
        if key not in keys:
            raise UnknownNameError(f"option of {name}", key, keys)
    federation = scenario.federation
    asked = max(1, round(federation.clients * federation.fraction))
    try:
        return kind(strategy, **{"num_sampled_clients": asked, **options})
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"strategy.privacy={scenario.strategy.privacy!r}: {error}; Flower takes "
            f"{', '.join(keys)}"
        ) from error


def _parse(text: str) -> tuple[str, dict[str, float]]:
    name, _, rest = text.strip().partition(":")
    if name not in _MODS:
        raise UnknownNameError("strategy.privacy", name, _MODS)
    options: dict[str, float] = {}
    form = f"{name}:KEY=NUMBER,..."
    for key, value in pairs(rest.split(","), "strategy.privacy", form).items():
        try:
            number = float(value)
        except ValueError:
            raise InvalidInputError(
                f"strategy.privacy: write {form}, not {f'{key}={value}'!r}"
            ) from None
        options[key] = int(number) if key == "num_sampled_clients" else number
    return name, options


def privacy_mod(scenario_of: Callable[[Context], Scenario]) -> Mod:
    """Return the clients' side: Flower's mod that clips, where the wrapper asks for it."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        text = scenario_of(context).strategy.privacy
        clips = _MODS[_parse(text)[0]] if text else None
        return call_next(message, context) if clips is None else clips(message, context, call_next)

    return mod


def known_defence(scenario: Scenario) -> Any:
    """Return what an informed attacker is told: the defence, and Flower's clipping after it."""
    spec = scenario.defence.spec
    if not scenario.strategy.clients_clip:
        return spec

    def told(server_round: int, node: int, config: Mapping[str, object]) -> DefenceSpec | None:
        clip = clipping_told(server_round, node, config)
        return parse_defence(f"{spec}+{clip}") if clip is not None and spec.parts else clip

    return told


@contextmanager
def seeded(scenario: Scenario) -> Iterator[None]:
    """Draw Flower's noise, which is numpy's, by the scenario's seed."""
    if not scenario.strategy.privacy:
        yield
        return
    before = np.random.get_state()
    np.random.seed(scenario.seed)
    try:
        yield
    finally:
        np.random.set_state(before)
