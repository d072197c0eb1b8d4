"""A time limit that loops consult, so that an attack ends in time with the best it has.

A strategy, a command or a script sets the limit; whatever runs below asks for it, however deep:

    with deadline.limit(60) as allowed:
        attack(observations)
    allowed.hit  # whether anything was cut short

A loop that has something to show leaves when :func:`passed`; one that has nothing yet calls
:func:`check`, which raises. :func:`fedleak.events.steps` leaves by itself. Whoever asks is also
told, by an error, that more memory was taken than is allowed (:mod:`fedleak.memory`). Without a
limit all of it costs next to nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from fedleak import memory
from fedleak.errors import InvalidInputError, TimeLimitError

#: Seconds for one update, where nothing else is said.
DEFAULT_SECONDS = 60.0


@dataclass
class Deadline:
    """A limit that is in force.

    Attributes
    ----------
    seconds : float
        How much was allowed.
    end : float
        When it ends, by the clock of :func:`time.monotonic`.
    hit : bool
        Whether somebody asked when nothing was left, and so stopped early.
    """

    seconds: float
    end: float
    hit: bool = False


_CURRENT: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def _now() -> float:
    return time.monotonic()


@contextmanager
def limit(seconds: float) -> Iterator[Deadline]:
    """Allow what is done in this block so many seconds; 0 and infinity: no limit of its own.

    Within another limit, the earlier of the two counts.

    Raises
    ------
    InvalidInputError
        If it is negative or no number.
    """
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not number or not seconds >= 0:
        raise InvalidInputError(
            f"a time limit must be a number of seconds from 0 (none), not {seconds!r}"
        )
    outer, now = _CURRENT.get(), _now()
    end = now + (seconds or math.inf)
    end = end if outer is None else min(end, outer.end)
    own = Deadline(max(end - now, 0.0), end)
    token = _CURRENT.set(own)
    try:
        yield own
    finally:
        _CURRENT.reset(token)
        if outer is not None and own.hit and own.end >= outer.end:
            outer.hit = True


@contextmanager
def part(share: float) -> Iterator[Deadline]:
    """Allow what is done in this block a share of what is left, from 0 to 1."""
    rest = left()
    with limit(rest if rest in (0, math.inf) else share * rest) as own:
        yield own


def left() -> float:
    """Return the seconds that are left, at least 0; infinity without a limit."""
    current = _CURRENT.get()
    if current is None or current.end == math.inf:
        return math.inf
    rest = current.end - _now()
    if rest <= 0:
        current.hit = True
    return max(rest, 0.0)


def passed(margin: float = 0.0) -> bool:
    """Return whether no more than ``margin`` seconds are left.

    A loop that has something to show leaves then; the margin is for what comes after it.

    Raises
    ------
    MemoryError
        By :func:`fedleak.memory.check`.
    """
    memory.check()
    current = _CURRENT.get()
    if current is None or left() > margin:
        return False
    current.hit = True
    return True


def check() -> None:
    """Go on, or raise: for work that has nothing to show before it is done.

    Raises
    ------
    TimeLimitError
        If nothing is left.
    MemoryError
        By :func:`fedleak.memory.check`.
    """
    if passed():
        current = _CURRENT.get()
        assert current is not None
        raise TimeLimitError(current.seconds)
