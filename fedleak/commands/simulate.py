"""``fedleak simulate``: a federation with an attacking server, and what it learned."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from fedleak.commands.console import PlainConsole, display, near, number, say_report
from fedleak.events import emit
from fedleak.results.format import COVERAGE, LEAKAGE, ROUNDS
from fedleak.status import most_frequent, most_frequent_note, reconstructed
from fedleak.wording import coverage_words, more_rounds_words

if TYPE_CHECKING:
    from simulations.engines import Arm
    from simulations.scenario import Scenario

_console = PlainConsole()


def simulate(
    scenario: Annotated[
        str | None,
        typer.Argument(help="A scenario file, or the name of a shipped one: demo, cifar10, ..."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override, as training.share=weights"),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="inline (this process) or ray (Flower's simulation on Ray)")
    ] = "inline",
    out: Annotated[
        Path | None, typer.Option(help="Output folder [default: results/runs/NAME]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Replaces the scenario's seed")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder")
    ] = False,
    capture: Annotated[
        bool, typer.Option("--capture", help="Keep the updates, for fedleak attack")
    ] = False,
    log_to: Annotated[
        list[str] | None,
        typer.Option("--log-to", metavar="TRACKER", help="tensorboard or mlflow; may be repeated"),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Defences run at once, each in a process, inline")
    ] = 1,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show Flower's own log, and Ray's")
    ] = False,
) -> None:
    """Run a federation with an attacking server, and record what leaks in every round.

    SCENARIO is a file, or one of: cifar10, demo, fedavg, femnist, femnist-5-epochs, tampered,
    rounds.
    """
    from simulations.engines import quiet_flower
    from simulations.engines import simulate as run
    from simulations.scenario import load_scenario

    loaded = load_scenario(scenario, set_ or (), seed)
    quiet_flower(verbose)
    with _progress(loaded) as on_progress:
        arms = run(
            loaded, out, engine, overwrite, on_progress,  # type: ignore[arg-type]
            capture=capture, log_to=log_to or (), jobs=jobs,
        )  # fmt: skip
    _closing_table(loaded, arms)


@contextmanager
def _progress(scenario: Scenario) -> Iterator[Any]:
    """Show a bar for each defence, from the start on."""
    rounds = scenario.federation.rounds

    def tell(label: str, done: int, event: str = "progress", **fields: Any) -> None:
        emit(event, doing=f"defence {label}", done=done, total=rounds, unit="rounds", **fields)

    def on_progress(arm: Arm, progress: Any) -> None:
        scores, label = progress.scores, arm.label
        leak = f"median {number(scores.psnr_db_median)} dB, " if scores.reconstructed else ""
        tell(
            label, progress.server_round, "round",
            note=f"{leak}accuracy {progress.accuracy:.2f}", defence=label,
            round=progress.server_round, accuracy=progress.accuracy, loss=progress.loss,
            **vars(scores),
        )  # fmt: skip

    with display():
        tell(scenario.variants()[0].label, 0)
        yield on_progress


def _tampered(arm: Arm) -> str:
    """Say what the changed model gave, and who saw it."""
    from fedleak.results.format import TAMPERING
    from fedleak.results.reading import read_table
    from fedleak.results.tampering import tamper_figures

    found = tamper_figures(read_table(arm.out / TAMPERING.file))
    said = f"{arm.label}: {found.sent} times a client was sent another model; "
    if found.recovered == found.recovered:
        said += f"{found.recovered:.0%} of these images came back at 60 dB, "
        said += f"{found.certified:.0%} proved by the attack; "
    if found.detected == found.detected:
        said += f"the client suspected it in {found.detected:.0%}, and "
        said += f"{found.false_alarms:.1%} of {found.honest} honest models; "
    return f"{said}trained on what was recovered in {found.restored:.0%}."


def _closing_table(scenario: Scenario, arms: list[Arm]) -> None:
    import pandas as pd

    from fedleak.defences.accountant import epsilon

    title = f"{scenario.name} (simulated): PSNR in dB of what the server reconstructed"
    table = Table(
        title=title, box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0), show_edge=False
    )
    told = sorted({1, scenario.federation.rounds})
    columns = ["defence", "failed", *(f"round {n}" for n in told), "predicted", "best", "labels",
               "accuracy", "c(M)"]  # fmt: skip
    for column in columns:
        side, narrow = "left" if column == "defence" else "right", column.startswith("round")
        table.add_column(column, justify=side, no_wrap=not narrow)  # type: ignore[arg-type]
    doubts: dict[str, str] = {}
    seen: dict[str, str] = {}
    for arm in arms:
        leakage = pd.read_csv(arm.out / LEAKAGE.file)
        rounds = pd.read_csv(arm.out / ROUNDS.file)
        ok = leakage[reconstructed(leakage)]
        median = ok.groupby("round")["psnr_db"].median()
        labelled = ok.dropna(subset="label_true")
        right = (labelled["label_true"] == labelled["label_inferred"]).mean()
        last = rounds.iloc[-1]
        table.add_row(
            arm.label,
            f"{len(leakage) - len(ok)}/{len(leakage)}",
            *(number(median[n]) if n in median.index else "-" for n in told),
            number(last["predicted_psnr_db"]),
            number(ok["psnr_db"].max()) if len(ok) else "-",
            f"{right:.0%}" if len(labelled) else "-",
            f"{last['accuracy']:.2f}",
            "-" if pd.isna(last["c_metric"]) else f"{last['c_metric']:.0f}",
        )
        if len(ok) < len(leakage):
            reason = most_frequent(leakage, "failed")
            table.caption = f"most frequent reason for a failure: {reason}"
        if doubt := most_frequent(leakage, "doubtful"):
            doubts[arm.label] = doubt
        if note := most_frequent_note(leakage):
            seen[arm.label] = note
    _console.print(table)
    for arm in arms:
        if arm.tamper.made is not None:
            _console.print(_tampered(arm), highlight=False, soft_wrap=True, markup=False)
    for label, doubt in doubts.items():
        _console.print(f"doubtful ({label}): {doubt}", highlight=False, markup=False)
    for arm in arms:
        if (arm.out / COVERAGE.file).is_file():
            said = coverage_words(pd.read_csv(arm.out / COVERAGE.file))
            _console.print(f"{arm.label}: {said}", highlight=False, soft_wrap=True)
            private = epsilon(arm.defence.spec, scenario.federation.rounds)
            if more := more_rounds_words(pd.read_csv(arm.out / LEAKAGE.file), private):
                _console.print(f"{arm.label}: {more}", highlight=False, soft_wrap=True)
    for label, note in seen.items():
        what = f"seen, and taken into account ({label}), in {note}"
        _console.print(what, highlight=False, markup=False)
    if not scenario.threat.defence and any(arm.defence.spec.parts for arm in arms):
        _console.print(
            "The server did not know of the defence; --set threat.defence=true for one that does.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    folder = arms[0].out if len(arms) == 1 else arms[0].out.parent
    shown = near(folder)
    _console.print(
        "\nfailed: of all images. Rounds: median over clients. predicted: by the metric, for\n"
        "the last round and an attacker who knows the defence. best: the best image.\n"
        f"labels: inferred rightly. accuracy: at the end. Look next at, in {shown}:",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for name, what in (
        ("leakage_vs_rounds.png", "leakage and accuracy over the rounds"),
        ("coverage_vs_rounds.png", "the share of a client's images that the server holds"),
        ("reconstructions.png", "true images beside their reconstructions"),
        ("leakage.csv, rounds.csv", "every number"),
        ("run.json" if len(arms) == 1 else "*/run.json", "scenario, seed and versions"),
    ):
        if "," in name or any(folder.glob(name)):
            _console.print(f"  {name:<26}{what}", highlight=False)
    say_report(_console, folder)
    if (captures := arms[0].out / "captures").is_dir():
        # A capture names no code: whoever attacks it does.
        model = scenario.model.name
        named = f" --model {shlex.quote(model)}" if ":" in model else ""
        _console.print(
            f"Captured. Attack it, here or elsewhere: fedleak attack "
            f"{shlex.quote(str(near(captures)))}{named}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
