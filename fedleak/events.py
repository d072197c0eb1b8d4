"""What happens while something runs, as events of the standard ``logging``.

The library emits; whoever listens decides. Without a listener nothing is written and next to
nothing is spent. The command line listens with bars or, with
``--log-json``, writes one JSON object for each event to standard error.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from fedleak import deadline
from fedleak.wording import clean_lines, json_ready

#: Everything is logged here or below; set its level to INFO to be told of progress.
LOGGER = logging.getLogger("fedleak")
#: Seconds between two events of one loop.
PAUSE = 1.0
#: Steps that what follows a loop takes as long as: judging and packing what it found.
_CLOSING = 2.0

Listener = Callable[[str, Mapping[str, Any]], None]
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


def emit(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event.

    Parameters
    ----------
    event : str
        What happened, in a word: ``round``, ``progress``, ``warning``.
    level : int
        Of :mod:`logging`.
    **fields
        Plain values. ``reason`` is what a person is shown of a warning.
    """
    tell(event, **fields)
    LOGGER.log(level, event, extra={"fields": fields})


def tell(event: str, **fields: Any) -> None:
    """Tell an event to who listens in this very place (:func:`heard_by`), and log nothing."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(event, fields)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Tell a function of every event in this block, as ``(event, fields)``, beside the log."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def warn(reason: str, **fields: Any) -> None:
    """Log a warning: something is missing from the result, and the work goes on."""
    emit("warning", logging.WARNING, reason=reason, **fields)


def fail(reason: str, **fields: Any) -> None:
    """Log the error that ends a command."""
    emit("error", logging.ERROR, reason=reason, **fields)


def stage(what: str) -> None:
    """Log which part of its work a command comes to."""
    emit("stage", stage=what)


def steps(count: int, doing: str) -> Iterator[int]:
    """Yield 0 ... count - 1, and tell how far that is, at most once a second.

    It ends early, in time for what comes after, where the time that is allowed
    (:mod:`fedleak.deadline`) is used up.

    Parameters
    ----------
    count : int
    doing : str
        What the loop does, as ``cosine``.
    """
    heard = LOGGER.isEnabledFor(logging.INFO) or _LISTENER.get() is not None
    before = last = time.monotonic()
    longest, told = 0.0, False
    try:
        for n in range(count):
            if deadline.passed(_CLOSING * longest):
                return
            if heard and before - last >= PAUSE:
                last, told = before, True
                emit("step", doing=doing, done=n, total=count)
            yield n
            now = time.monotonic()
            longest, before = max(longest, now - before), now
    finally:  # also of a loop that is left early
        if told:
            emit("step", doing=doing, done=count, total=count)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields of an event; of any other log record, what it says."""
    found = getattr(record, "fields", None)
    if isinstance(found, dict):
        return found
    return {"logger": record.name, "reason": record.getMessage()}


class JsonFormatter(logging.Formatter):
    """One JSON object on one line: ``event``, ``time`` (UTC, ISO 8601), ``level``, the fields."""

    def format(self, record: logging.LogRecord) -> str:
        own = hasattr(record, "fields")
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        whole = {
            "event": record.getMessage() if own else "log",
            "time": when,
            "level": record.levelname.lower(),
            **fields_of(record),
        }
        return json.dumps(json_ready(whole), default=str)


class _Words(logging.Formatter):
    """For people: ``fedleak: `` and the reason."""

    def format(self, record: logging.LogRecord) -> str:
        reason = fields_of(record).get("reason") or record.getMessage()
        return f"fedleak: {clean_lines(str(reason))}"


class _StandardError(logging.Handler):
    """Writes to what standard error is at the time: a bar on a terminal replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


_HANDLER = _StandardError()
_JSON = JsonFormatter()


def set_up(as_json: bool = False, quiet: bool = False) -> None:
    """Choose what standard error shows; for the command line, and again for each command.

    Parameters
    ----------
    as_json : bool
        One JSON object for each event, also for the warnings of other packages.
    quiet : bool
        Warnings and errors only.
    """
    root = logging.getLogger()
    for logger in (LOGGER, root):
        logger.removeHandler(_HANDLER)
    _HANDLER.setFormatter(_JSON if as_json else _Words())
    _HANDLER.setLevel(logging.INFO if as_json and not quiet else logging.WARNING)
    (root if as_json else LOGGER).addHandler(_HANDLER)
    LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.captureWarnings(as_json)


def as_json() -> bool:
    """Return whether standard error is for machines."""
    return _HANDLER in logging.getLogger().handlers


def take_over(logger: logging.Logger) -> None:
    """Let a logger that writes by itself write as we do, where that is JSON."""
    if as_json():
        logger.handlers.clear()
        logger.propagate = True
