"""The command line."""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Annotated

import click
import typer

from fedleak import events, memory
from fedleak.commands.attack import attack
from fedleak.commands.audit import audit
from fedleak.commands.compare import compare
from fedleak.commands.console import PlainConsole, stoppable, stopped
from fedleak.commands.evaluate import evaluate
from fedleak.commands.listing import list_
from fedleak.commands.paper import paper
from fedleak.commands.reconstruct import reconstruct
from fedleak.commands.report import report
from fedleak.commands.simulate import simulate
from fedleak.errors import FedleakError, InvalidInputError

app = typer.Typer(
    name="fedleak",
    help="What does a federated-learning server learn about the training images?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
#: Packages of the extra of that name; without them, commands that need no federation work.
FEDERATION = {"flwr", "flwr_datasets", "datasets", "ray"}
#: Set to anything but 0 or nothing, it is as ``--log-json``.
LOG_JSON = "FEDLEAK_LOG_JSON"
#: The same: an error that nobody has foreseen shows where it was raised.
TRACEBACK = "FEDLEAK_TRACEBACK"


def _show_version(wanted: bool) -> None:
    if wanted:
        from fedleak import __version__

        PlainConsole().print(f"fedleak {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    log_json: Annotated[
        bool,
        typer.Option("--log-json", help=f"Events to standard error, as JSON lines [{LOG_JSON}]"),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress; warnings, errors and results only")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """What does a federated-learning server learn about the training images?"""
    events.set_up(log_json or _json_by_environment(), quiet)
    events.emit("start", command=context.invoked_subcommand)


for _name, _command in (
    ("simulate", simulate),
    ("evaluate", evaluate),
    ("compare", compare),
    ("report", report),
    ("audit", audit),
    ("reconstruct", reconstruct),
    ("attack", attack),
    ("paper", paper),
    ("list", list_),
):
    _kept = "finished rounds are kept" if _name == "simulate" else "the same command begins again"
    app.command(_name)(stoppable(_command, f"stopped; {_kept}"))


def _json_by_environment() -> bool:
    return os.environ.get(LOG_JSON, "").lower() not in ("", "0", "false", "no")


def main() -> None:
    """Run the command line; bad input ends with one message and exit code 2."""
    # Before anything is parsed: what cannot be parsed is an event as well.
    before = sys.argv[1 : 1 + next((n for n, a in enumerate(sys.argv[1:]) if a[:1] != "-"), 99)]
    events.set_up(_json_by_environment() or "--log-json" in before)
    begin = time.perf_counter()
    try:
        # A command that was stopped, or that failed in part, returns its exit code.
        code = app(standalone_mode=False)
    except Exception as error:
        code = _explain(error)
    except KeyboardInterrupt:
        code = _explain(click.Abort())
    seconds = round(time.perf_counter() - begin, 3)
    events.emit("end", exit_code=code if isinstance(code, int) else 0, seconds=seconds)
    if isinstance(code, int):
        sys.exit(code)


def _explain(error: Exception) -> int:
    """Say what went wrong, and return the exit code."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in FEDERATION:
        error = InvalidInputError(
            f"this command runs a federation, and {error.name!r} is not installed; "
            "pip install 'fedleak[federation]'"
        )
    code, reason = 1, f"{type(error).__name__}: {error}"
    if isinstance(error, click.Abort):
        stopped("stopped")
        return 130
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        code, reason = error.exit_code, error.format_message()
        if not events.as_json():
            error.show()
            return code
    if memory.exhausted(error):
        code, reason = 2, f"it does not fit into memory ({error}); use fewer or smaller images"
    elif isinstance(error, FedleakError):
        code, reason = 2, str(error)
    elif isinstance(error, OSError):  # a full disk, a folder that is not ours to write into
        code, reason = 2, f"a file cannot be used: {error}"
    ours = code == 2 or isinstance(error, click.ClickException)
    more = {} if ours else {"traceback": traceback.format_exc()}
    if not ours and not events.as_json():
        reason = (
            f"an error that fedleak does not know: {reason}. Please report it, with what "
            f"{TRACEBACK}=1 shows of the same command"
        )
        if os.environ.get(TRACEBACK, "") not in ("", "0"):
            traceback.print_exception(error)
    events.fail(reason, exit_code=code, kind=type(error).__name__, **more)
    return code
