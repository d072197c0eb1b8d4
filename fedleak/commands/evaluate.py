"""``fedleak evaluate``: what defences cost, and what they really buy; resumable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from fedleak.commands.console import PlainConsole, near, number, resumable, say_report

if TYPE_CHECKING:
    import pandas as pd

    from simulations.evaluation.run import Evaluated
    from simulations.evaluation.sweep import Sweep

_console = PlainConsole()


def evaluate(
    sweep: Annotated[
        str,
        typer.Argument(help="A sweep file, or a shipped one: noise-pruning, all-defences, tampers"),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Output folder [default: results/runs/NAME]")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine")] = 1,
    engine: Annotated[str, typer.Option(help="local, or ray (the cluster at RAY_ADDRESS)")] = (
        "local"
    ),
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="As data.name=CIFAR10; or the sweep's: seeds=[0]"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Run more cells than max_cells")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Flower's own log")] = False,
) -> None:
    """Judge defences: a federation for each, attacked by one that knows it and one that does not.

    Finished cells are kept: the same command again goes on where it stopped.
    """
    from simulations.engines import quiet_flower
    from simulations.evaluation.run import evaluate as run
    from simulations.evaluation.sweep import load_sweep

    loaded = load_sweep(sweep, set_ or ())
    quiet_flower(verbose)
    with resumable("evaluating", "cells") as on_progress:
        evaluated = run(
            loaded, out, jobs=jobs, engine=engine, confirmed=yes,  # type: ignore[arg-type]
            on_progress=on_progress,
        )  # fmt: skip
    _report(evaluated, loaded)
    if (evaluated.table["status"] != "ok").any():
        raise typer.Exit(1)


def _report(evaluated: Evaluated, sweep: Sweep) -> None:
    seeds = f"mean of {len(sweep.seeds)} seeds" if len(sweep.seeds) > 1 else "one seed"
    table = Table(
        title=f"{sweep.name} (simulated): {seeds}; PSNR in dB", box=box.SIMPLE,
        title_justify="left", padding=(0, 1, 0, 0), show_edge=False,
    )  # fmt: skip
    finished = evaluated.table[evaluated.table["status"] == "ok"]
    ok = finished[finished["tamper"] == "none"]
    groups = [c for c in ("scenario", "data", "model") if ok[c].nunique() > 1]
    for column in (*groups, "defence", "accuracy", "unaware", "informed", "worst", "predicted",
                   "identified"):  # fmt: skip
        text = column in (*groups, "defence")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    for key, rows in ok.groupby([*groups, "defence", "strength"], sort=False, dropna=False):
        names = [str(part) for part in key[:-2]]
        table.add_row(*names, _label(key[-2], key[-1]), *_figures(rows))
    if len(ok):
        _console.print(table)
    if sweep.tampers:
        _console.print(_tampers(finished))
        _console.print(_TAMPERS_NOTE, highlight=False, soft_wrap=True)
    for line in _notes(evaluated, sweep):
        _console.print(line, highlight=False, soft_wrap=True)
    for name, what in (
        ("frontier.png", "accuracy against what an informed attacker recovers"),
        ("pictures.png", "one image under every defence"),
        ("leakage_vs_rounds.png", "leakage over the rounds"),
        ("predicted_vs_attained.png", "the metric against the attack"),
        ("evaluation.csv", "every cell and seed"),
        ("rounds.csv", "every attacked round"),
        ("cells", "all that each run left behind"),
    ):
        if any(evaluated.folder.glob(name.replace(".png", "*.png"))):
            _console.print(f"  {name:<28}{what}", highlight=False)
    say_report(_console, evaluated.folder)


def _tampers(finished: pd.DataFrame) -> Table:
    """Return what each tamper gives, what it costs, and who sees it."""
    table = Table(
        title="A server that changes the model", box=box.SIMPLE, title_justify="left",
        padding=(0, 1, 0, 0), show_edge=False,
    )  # fmt: skip
    for name in ("tamper", "accuracy", "lost", "recovered", "certified", "seen", "alarms"):
        table.add_column(name, justify="left" if name == "tamper" else "right", no_wrap=True)
    keys = ["tamper", "scenario", "data", "model", "defence", "strength"]
    for key, rows in finished.groupby(keys, sort=False, dropna=False):
        mean, defence = rows.mean(numeric_only=True), _label(key[-2], key[-1])
        table.add_row(
            str(key[0]) if defence == "none" else f"{key[0]}, {defence}",
            f"{mean['accuracy']:.2f}",
            *(_share(mean.get(c)) for c in ("accuracy_lost", "recovered", "certified", "detected",
                                            "false_alarms")),
        )  # fmt: skip
    return table


_TAMPERS_NOTE = (
    "\nlost: accuracy beside the honest server's training. recovered, certified: share of the\n"
    "images of clients that were sent the changed model, at 60 dB, and proved by the attack.\n"
    "seen, alarms: share of the changed, and of honest models that the clients' guard suspected."
)


def _share(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.1%}"


def _label(defence: object, strength: object) -> str:
    from fedleak.defences import DefenceSpec

    return DefenceSpec(str(defence), str(strength)).label


def _figures(rows: pd.DataFrame) -> list[str]:
    mean = rows.mean(numeric_only=True)
    return [
        f"{mean['accuracy']:.2f}",
        number(mean["psnr_db_median_unaware"]),
        number(mean["psnr_db_median_informed"]),
        number(mean["psnr_db_worst_informed"]),
        "-" if mean.isna()["predicted_psnr_db"] else number(mean["predicted_psnr_db"]),
        f"{mean['identified_informed']:.0%}",
    ]


def _notes(evaluated: Evaluated, sweep: Sweep) -> Iterator[str]:
    bad = evaluated.table[evaluated.table["status"] != "ok"]
    if len(bad):
        yield (
            f"\n{len(bad)} of {len(evaluated.table)} cells failed, and are repeated by the same "
            f"command. Most frequent reason: {bad['reason'].value_counts().index[0]}"
        )
    yield (
        "\nunaware, informed: median image, for an attacker who does not know the defence and one\n"
        "who does. worst, predicted, identified (at least "
        f"{sweep.threshold_db:g} dB): informed."
    )
    if evaluated.skipped:
        yield f"{evaluated.skipped} cells had been finished before and were not run again."
    yield f"Look next at, in {near(evaluated.folder)}:"
