"""What several commands share: reading options, showing numbers and progress."""

from __future__ import annotations

import functools
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fedleak import spelling
from fedleak.events import LOGGER, as_json, emit, fields_of
from fedleak.stopping import EXIT_CODE, Terminated, terminable
from fedleak.wording import clean_lines


class PlainConsole(Console):
    """Prints text as it is: no markup, and nothing that steers a terminal.

    Names of files, of layers, and what clients sent come from strangers. Whatever is printed or
    put into a table goes through here.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        plain = {**options, "markup": False, "emoji": False}
        return super().render_str(clean_lines(text, len(text)), **plain)


class OnNotedProgress(Protocol):
    """``(finished, all)``, and what comes next."""

    def __call__(self, finished: int, total: int, note: str = "", /) -> None: ...


#: Seconds between two lines of progress, where standard error is no terminal.
_PAUSE = 2.0
#: The same for work whose end is not known.
_PAUSE_OF_UNKNOWN = 10.0


def read_options(
    pairs: Sequence[str], prior: str | None = None, public: Path | None = None
) -> dict[str, Any]:
    """Read KEY=VALUE; values are Python literals where they can be.

    ``prior`` and ``public`` have flags of their own, and are added where they are given.

    Raises
    ------
    InvalidInputError
        If one is not KEY=VALUE.
    """
    read = spelling.pairs(pairs, "--option", "KEY=VALUE, as steps=300")
    out = {key: spelling.literal(value) for key, value in read.items()}
    flags = {"prior": prior, "public": public}
    return out | {key: value for key, value in flags.items() if value is not None}


def number(value: float | None) -> str:
    """Return a PSNR in dB; ``exact`` where it is infinite, a dash where it is not known."""
    if value is None or value != value:
        return "-"
    return "exact" if value == float("inf") else f"{value:.1f}"


def near(path: Path) -> Path:
    """Return a path as seen from here, where it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def say_report(console: Console, folder: Path) -> None:
    """Say how what is in a folder becomes a page for others."""
    console.print(
        f"For others, as one page: fedleak report {shlex.quote(str(near(folder)))}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


class _Display(logging.Handler):
    """Shows events that say how much is done: a bar for each kind of work, or lines.

    Parameters
    ----------
    bars : Progress
        Disabled where standard error is no terminal.
    lines : bool
        Print a line now and then instead.
    inner : bool
        Whether the steps within a piece of work get lines as well.
    """

    def __init__(self, bars: Progress, lines: bool, inner: bool):
        super().__init__(logging.INFO)
        self.bars, self.lines, self.inner = bars, lines, inner
        self.tasks: dict[str, TaskID] = {}
        self.paces: dict[str, _Pace] = {}
        self.told = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        fields = fields_of(record)
        if "stage" in fields:
            self.stage(fields["stage"])
        if "done" not in fields or "doing" not in fields:
            return
        doing, done, total = str(fields["doing"]), int(fields["done"]), fields.get("total")
        note, unit = str(fields.get("note", "")), str(fields.get("unit", "steps"))
        step = record.getMessage() == "step"
        of = f"{done} {unit}" if total is None else f"{done}/{total} {unit}"
        if self.lines and (self.inner or not step):
            self.line(doing, done, total, of, note)
        if doing not in self.tasks:
            self.tasks[doing] = self.bars.add_task(doing, total=total, of=of, note="")
        task = self.tasks[doing]
        shown = next((t for t in self.bars.tasks if t.id == task), None)
        if shown is not None and (shown.total != total or shown.completed > done):
            # Another round of the same work, or what was kept: it says nothing of the speed.
            self.bars.reset(task, total=total, completed=done)
        # A loop within goes when it is over: there may be thousands of them.
        over = step and done == total
        self.bars.update(task, completed=done, of=of, note=note, visible=not over)

    def stage(self, what: str) -> None:
        for task in self.bars.tasks[:1]:
            self.bars.update(task.id, note=what)
        now = time.monotonic()
        if self.lines and now - self.told >= _PAUSE:
            self.told = now
            print(f"fedleak: {what}", file=sys.stderr, flush=True)  # noqa: T201

    def line(self, doing: str, done: int, total: int | None, of: str, note: str) -> None:
        pace = self.paces.get(doing)
        if pace is None or pace.total != total or pace.done > done:
            pace = self.paces[doing] = _Pace(done, total)
        left = pace.says(done)
        if left is not None:
            words = ", ".join(filter(None, (of, note, left)))
            print(f"fedleak: {doing}: {words}", file=sys.stderr, flush=True)  # noqa: T201


class _Pace:
    """When to print a line: at each tenth, not too often, and at the end."""

    def __init__(self, done: int, total: int | None):
        self.first, self.done, self.total = done, done, total
        self.begin = self.last = time.monotonic()
        self.tenth = 0 if not total else 10 * done // total
        self.over = False

    def says(self, done: int) -> str | None:
        """Return what is left, ``""`` if that is nothing, or None where no line is due."""
        self.done, now = done, time.monotonic()
        if not self.total:
            due = now - self.last >= _PAUSE_OF_UNKNOWN
            self.last = now if due else self.last
            return "" if due else None
        if done >= self.total:
            due, self.over = not self.over, True
            return "" if due else None
        if 10 * done // self.total <= self.tenth or now - self.last < _PAUSE:
            return None
        self.tenth, self.last = 10 * done // self.total, now
        left = (self.total - done) * (now - self.begin) / max(done - self.first, 1)
        return f"about {_duration(left)} left"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def display(doing: str = "", quiet: bool = False, inner: bool = False) -> Iterator[None]:
    """Show how far what runs inside has come, from the events it emits, on standard error.

    On a terminal: bars with the time left. Elsewhere a line for each tenth, and not more than
    one in some seconds. With ``--log-json`` or ``--quiet``: nothing here.

    Parameters
    ----------
    doing : str
        Shown from the start, with the time that has passed, where the end is not known.
    quiet : bool
    inner : bool
        Whether lines tell of the steps within a piece of work, where that is all there is.
    """
    if quiet or as_json() or not LOGGER.isEnabledFor(logging.INFO):
        yield
        return
    console = PlainConsole(stderr=True)
    bars = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(),
        TextColumn("{task.fields[of]}", markup=False), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console, disable=not console.is_terminal, transient=bool(doing),
    )  # fmt: skip
    if doing:
        bars.add_task(doing, total=None, of="", note="")
    listener = _Display(bars, not console.is_terminal, inner)
    LOGGER.addHandler(listener)
    try:
        with bars:
            yield
    finally:
        LOGGER.removeHandler(listener)


@contextmanager
def resumable(doing: str, unit: str, quiet: bool = False) -> Iterator[OnNotedProgress]:
    """Show how far work is that keeps what is done; when stopped, say how much that is.

    Parameters
    ----------
    doing, unit : str
        As ``attacking``, ``updates``.
    quiet : bool
    """
    done = [0, 0]

    def on_progress(finished: int, total: int, note: str = "") -> None:
        done[:] = finished, total
        emit("progress", doing=doing, done=finished, total=total, unit=unit, note=note)

    try:
        with display(quiet=quiet):
            yield on_progress
    except KeyboardInterrupt as how:
        raise stopped(
            f"stopped; {done[0]} of {done[1]} {unit} are done and kept, and the same "
            "command goes on from there",
            how,
        ) from None


def stoppable(command: Callable[..., None], reason: str) -> Callable[..., None]:
    """Return a command that says something when it is stopped: by Ctrl-C, or by SIGTERM.

    Parameters
    ----------
    command : callable
        One that knows more of what is kept says so itself, as :func:`resumable` does.
    reason : str
        What is left of it.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            with terminable():
                command(*arguments, **options)
        except KeyboardInterrupt as how:  # typer itself would end without a word
            raise stopped(reason, how) from None

    return run


def stopped(reason: str, how: BaseException | None = None) -> typer.Exit:
    """Say that the command was stopped, and what is left of it; return what ends it."""
    code = EXIT_CODE if isinstance(how, Terminated) else 130
    emit("stopped", logging.WARNING, reason=reason, exit_code=code)
    return typer.Exit(code)
