"""The command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedleak.capture.command import attack as attack_command
from fedleak.console import near, number, read_options
from fedleak.errors import FedleakError, InvalidInputError
from fedleak.evaluation import evaluate
from fedleak.metric.command import audit
from fedleak.paper import paper
from fedleak.report.command import report

if TYPE_CHECKING:
    from fedleak.attacks import Reconstruction
    from simulations.engines import Arm
    from simulations.scenario import Scenario

app = typer.Typer(
    name="fedleak",
    help="What does a federated-learning server learn about the training images?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_console = Console()


def _show_version(wanted: bool) -> None:
    if wanted:
        from fedleak import __version__

        _console.print(f"fedleak {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """What does a federated-learning server learn about the training images?"""


app.command()(paper)
app.command()(audit)
app.command("attack")(attack_command)
app.command()(evaluate)
app.command()(report)


@app.command()
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
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Flower's own log")] = False,
) -> None:
    """Run a federation with an attacking server, and record what leaks in every round.

    SCENARIO is a file, or one of: cifar10, demo, fedavg, femnist, femnist-5-epochs.
    """
    from simulations.engines import quiet_flower
    from simulations.engines import simulate as run
    from simulations.scenario import load_scenario

    loaded = load_scenario(scenario, set_ or (), seed)
    quiet_flower(verbose)
    with _display() as on_progress:
        arms = run(loaded, out, engine, overwrite, on_progress, capture=capture)  # type: ignore[arg-type]
    _closing_table(loaded, arms)


@app.command()
def reconstruct(
    model: Annotated[str, typer.Option(help="Name, FILE.py:FACTORY or module:FACTORY")],
    images: Annotated[list[Path], typer.Option(help="Image file or folder; may be repeated")],
    attack: Annotated[str, typer.Option(help="The attack's name")] = "hybrid",
    prior: Annotated[
        str | None, typer.Option(help="gaussian, gaussian:learned, patches, patches:learned or tv")
    ] = None,
    public: Annotated[
        Path | None, typer.Option(help="Folder of public images, for a learned prior")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="The attack's own, as steps=300")
    ] = None,
    defence: Annotated[
        str, typer.Option(help="NAME:STRENGTH, as noise:0.1; several: clip:1+noise:0.1")
    ] = "none",
    informed: Annotated[
        bool, typer.Option("--informed", help="The attacker knows the defence and its strength")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images behind each gradient")] = 1,
    label: Annotated[str, typer.Option(help="infer, or known to the attacker")] = "infer",
    classes: Annotated[int, typer.Option(min=2, help="Classes of the model")] = 10,
    channels: Annotated[int, typer.Option(min=1, max=3, help="1 reads grey, 3 colour")] = 3,
    limit: Annotated[int, typer.Option(min=0, help="Use the first images only; 0: all")] = 0,
    weights: Annotated[Path | None, typer.Option(help="Checkpoint of the model")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Draws what is random")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for a picture of the result")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Reconstruct images from the gradients that clients would share for them."""
    from fedleak import laboratory
    from fedleak.attacks import make_attack
    from fedleak.models import build_model

    if channels not in (1, 3):
        raise InvalidInputError(f"--channels must be 1 (grey) or 3 (colour), not {channels}")
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInputError(f"--out {str(out)!r} cannot be used: {error}") from error
    if label not in ("infer", "known"):
        raise InvalidInputError(f"--label must be 'infer' or 'known', not {label!r}")
    files, pixels = laboratory.read_images(images, channels, limit)
    labels = laboratory.labels_of(files, classes, seed)
    channel, height, width = pixels.shape[1:]
    network = build_model(model, (channel, height, width), classes, seed, weights).eval()
    options = read_options(option or (), prior, public)
    run = make_attack(attack, device=device, **options)
    trials = laboratory.reconstruct(
        network, pixels, labels, run, defence, label == "known", seed, batch_size, informed
    )
    result = laboratory.summary(trials, files, attack, getattr(run, "prior", None))
    if out is not None:
        from fedleak.plots import image_grid

        made = [t.image.float().numpy() for t in trials.trials]
        row = (f"{attack}, {defence}", made, trials.psnr_db)
        image_grid(list(pixels.numpy()), [row], out / "reconstructions.png")
    if json_:
        print(json.dumps(result, indent=2))  # noqa: T201
        return
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    says = any(t.trusted is not None for t in trials.trials)
    for column in ("image", "PSNR (dB)", "SSIM", "fit", "label", "inferred", "trusted")[: 6 + says]:
        table.add_column(column, justify="left" if column == "image" else "right")
    for file, trial in zip(files, trials.trials, strict=True):
        quality, inferred = trial.quality, trial.label_inferred
        table.add_row(
            f"{file.parent.name}/{file.name}", number(quality.psnr_db), f"{quality.ssim:.3f}",
            f"{trial.reconstruction.fit:.1e}", str(trial.label), str(inferred),
            *(["-" if trial.trusted is None else "yes" if trial.trusted else "no"] if says else []),
        )  # fmt: skip
    _console.print(table)
    mean = sum(trials.psnr_db) / len(trials.psnr_db)
    _console.print(f"mean {number(mean)} dB in {trials.seconds:.1f} s", highlight=False)
    for note in _notes(trials.trials[0].reconstruction):
        _console.print(note, highlight=False, soft_wrap=True)


def _notes(result: Reconstruction) -> Iterator[str]:
    """Say what limits a reconstruction, as far as the attacker knows it."""
    if result.details.get("why_not_linear"):
        yield f"Matched as a whole: {result.details['why_not_linear']}."
    if head := result.details.get("head"):
        yield (
            f"Told apart at the head: singular values of its gradient fall to "
            f"{head['singular_value_ratio']:.1e} of the largest; its inputs are known to "
            f"{min(head['relative_error']):.0e} ... {max(head['relative_error']):.0e}."
        )
    for layer in result.details.get("layers", ()):
        if layer["rank"] < layer["unknowns"]:
            by = "the prior" if result.details.get("by") == "matching" else "least squares"
            yield (
                f"Layer {layer['name']!r}: {layer['unknowns'] - layer['rank']} of its "
                f"{layer['unknowns']} unknowns are not determined, and filled in by {by}."
            )
    for name, share in result.details.get("lost", {}).items():
        yield f"Layer {name!r}: {share:.0%} of its inputs are unknown (saturated or inactive)."
    if result.fit > 0.5:
        yield (
            f"fit {result.fit:.2g}: the reconstruction explains little of the update. More "
            "--option steps=, another --prior, or the protocol may not be as declared."
        )


@contextmanager
def _display() -> Iterator[Any]:
    """Show a bar for each arm; nothing where the output is not a terminal."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rounds"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=_console,
        disable=not _console.is_terminal,
    )
    tasks: dict[Path, Any] = {}

    def on_progress(arm: Arm, progress: Any) -> None:
        if arm.out not in tasks:
            label = f"defence {arm.defence.spec.label}"
            tasks[arm.out] = bars.add_task(label, total=progress.rounds, note="")
        psnr = sorted(progress.psnr_db)
        leak = f"median {psnr[len(psnr) // 2]:.1f} dB, " if psnr else ""
        note = f"{leak}accuracy {progress.accuracy:.2f}"
        bars.update(tasks[arm.out], completed=progress.server_round, note=note)

    with bars:
        yield on_progress


def _closing_table(scenario: Scenario, arms: list[Arm]) -> None:
    import pandas as pd

    title = f"{scenario.name} (simulated): PSNR in dB of what the server reconstructed"
    table = Table(
        title=title, box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0), show_edge=False
    )
    rounds_last = scenario.federation.rounds
    rounds_run = f"round {rounds_last}"
    columns = ["defence", "failed", "round 1", rounds_run, "predicted", "best", "labels",
               "accuracy", "c(M)"]  # fmt: skip
    for column in columns:
        side, narrow = "left" if column == "defence" else "right", column.startswith("round")
        table.add_column(column, justify=side, no_wrap=not narrow)  # type: ignore[arg-type]
    for arm in arms:
        leakage = pd.read_csv(arm.out / "leakage.csv")
        rounds = pd.read_csv(arm.out / "rounds.csv")
        ok = leakage[leakage["status"] == "ok"]
        median = ok.groupby("round")["psnr_db"].median()
        right = (ok["label_true"] == ok["label_inferred"]).mean()
        last = rounds.iloc[-1]
        table.add_row(
            arm.defence.spec.label,
            f"{len(leakage) - len(ok)}/{len(leakage)}",
            number(median[1]) if 1 in median.index else "-",
            number(median[rounds_last]) if rounds_last in median.index else "-",
            "-" if pd.isna(last["predicted_psnr_db"]) else number(last["predicted_psnr_db"]),
            number(ok["psnr_db"].max()) if len(ok) else "-",
            f"{right:.0%}" if len(ok) else "-",
            f"{last['accuracy']:.2f}",
            "-" if pd.isna(last["c_metric"]) else f"{last['c_metric']:.0f}",
        )
        if len(ok) < len(leakage):
            reasons = leakage.loc[leakage["status"] != "ok", "reason"].value_counts()
            table.caption = f"most frequent reason for a failure: {reasons.index[0]}"
    _console.print(table)
    folder = arms[0].out if len(arms) == 1 else arms[0].out.parent
    shown = near(folder)
    _console.print(
        "\nfailed: of all images. Rounds: median over clients. predicted: by the metric, for\n"
        "the last round and an attacker who knows the defence. best: the best image.\n"
        f"labels: inferred rightly. accuracy: at the end. Look next at, in {shown}:",
        highlight=False,
        soft_wrap=True,
    )
    for name, what in (
        ("leakage_vs_rounds.png", "leakage and accuracy over the rounds"),
        ("reconstructions.png", "true images beside their reconstructions"),
        ("leakage.csv, rounds.csv", "every number"),
        ("run.json" if len(arms) == 1 else "*/run.json", "scenario, seed and versions"),
    ):
        if "," in name or any(folder.glob(name)):
            _console.print(f"  {name:<26}{what}", highlight=False)
    _console.print(
        f"For others, as one page: fedleak report {shown}", highlight=False, soft_wrap=True
    )
    if (captures := arms[0].out / "captures").is_dir():
        _console.print(
            f"Captured. Attack it, here or elsewhere: fedleak attack {near(captures)}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def main() -> None:
    """Run the command line; bad input ends with one message and exit code 2."""
    try:
        code = app(standalone_mode=False)
        if isinstance(code, int):  # a command that was stopped
            sys.exit(code)
    except (click.ClickException, click.exceptions.Exit) as error:
        if isinstance(error, click.ClickException):
            error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        print("fedleak: stopped; finished rounds are kept", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except FedleakError as error:
        print(f"fedleak: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        print("fedleak: stopped; finished rounds are kept", file=sys.stderr)  # noqa: T201
        sys.exit(130)
