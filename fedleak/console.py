"""What several commands share: reading options, showing numbers."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedleak.errors import InvalidInputError

if TYPE_CHECKING:
    from fedleak.workers import OnProgress


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
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InvalidInputError(f"--option {pair!r} is not KEY=VALUE, as steps=300")
        try:
            out[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    flags = {"prior": prior, "public": public}
    return out | {key: value for key, value in flags.items() if value is not None}


def number(value: float | None) -> str:
    """Return a PSNR in dB; ``exact`` where it is infinite."""
    if value is None:
        return "-"
    return "exact" if value == float("inf") else f"{value:.1f}"


def near(path: Path) -> Path:
    """Return a path as seen from here, where it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@contextmanager
def resumable(doing: str, unit: str, console: Console, quiet: bool = False) -> Iterator[OnProgress]:
    """Show a bar for work that keeps what is done; when stopped, say how much that is.

    Parameters
    ----------
    doing, unit : str
        As ``attacking``, ``updates``.
    console : Console
        Where it is not a terminal, nothing is shown.
    quiet : bool
    """
    done = [0, 0]
    bar = Progress(
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )
    task = bar.add_task("")

    def on_progress(finished: int, total: int) -> None:
        if done[1] != total:
            bar.reset(task, total=total, completed=finished)  # what was kept says nothing of speed
        done[:] = finished, total
        bar.update(task, completed=finished)

    try:
        with bar:
            yield on_progress
    except KeyboardInterrupt:
        typer.echo(
            f"fedleak: stopped; {done[0]} of {done[1]} {unit} are done and kept, and the same "
            "command goes on from there",
            err=True,
        )
        raise typer.Exit(130) from None
