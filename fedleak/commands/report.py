"""``fedleak report``: a run or an evaluation as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedleak.commands.console import PlainConsole, near


def report(
    folder: Annotated[
        Path,
        typer.Argument(help="What simulate, evaluate, attack or audit (--out) has written"),
    ],
    out: Annotated[Path | None, typer.Option(help="File [default: FOLDER/report.html]")] = None,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Show it in the browser")] = False,
) -> None:
    """Write what leaked, from whom, and what would help, as one HTML page for others.

    It needs no network: send it, print it, keep it beside the results.
    """
    from fedleak.report.page import write_report  # draws: seconds to import

    path, headline = write_report(folder, out)
    console = PlainConsole(soft_wrap=True)
    console.print(headline, highlight=False)
    console.print(f"In {near(path.absolute())}", highlight=False)
    if open_:
        typer.launch(path.absolute().as_uri())
