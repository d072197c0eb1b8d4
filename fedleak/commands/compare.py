"""``fedleak compare``: runs beside each other, in one table and one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from fedleak.commands.console import PlainConsole, display, near, number
from fedleak.errors import InvalidInputError
from fedleak.files import make_private, write_atomically
from fedleak.status import reconstructed
from fedleak.wording import clean, json_ready

if TYPE_CHECKING:
    import pandas as pd

    from fedleak.results.runs import Run

_console = PlainConsole()
#: More lines than this cannot be told apart; letters of a name in the picture.
_MANY, _LABEL = 10, 60


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of fedleak simulate, or of fedleak evaluate")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the picture and the table")] = Path(
        "results/runs/compare"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Put runs beside each other: leakage, accuracy, and what differs between their scenarios."""
    from fedleak.results.runs import differences, read_runs

    with display("comparing"):
        found = read_runs(runs)
        rows = [summary(r, d) for r, d in zip(found, differences(found), strict=True)]
        notes = list(_notes(found, rows))
        whole = {"simulated": True, "runs": rows, "notes": notes}
        try:
            make_private(out)
            picture = draw(found, out / "compare.png")
            text = json.dumps({**whole, "picture": picture and str(picture)}, indent=2)
            write_atomically(out / "compare.json", (text + "\n").encode())
        except OSError as error:
            raise InvalidInputError(f"--out {str(out)!r} cannot be used: {error}") from error
    if json_:
        print(text)  # noqa: T201
        return
    _console.print(_table(rows))
    if (differs := _differences(rows)) is not None:
        _console.print("", differs)
    for note in notes:
        _console.print(note, highlight=False, soft_wrap=True)
    _console.print(
        "\nPSNR in dB over clients and images, in the first and the last attacked round: the\n"
        "median, and the worst case (the best image). labels: inferred rightly. predicted:\n"
        "by the metric, in the last round. accuracy: on test images, at the end. All values\n"
        f"are of simulated clients. Look next at, in {near(out.resolve())}:",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if picture is not None:
        _console.print("  compare.png     leakage and accuracy over the rounds", highlight=False)
    _console.print("  compare.json    the table, with what differs", highlight=False)


def summary(run: Run, differs: dict[str, Any]) -> dict[str, Any]:
    """Return a run in numbers, as plain types for JSON.

    Returns
    -------
    dict
        ``first`` and ``last`` hold the round's number and the median and worst (best image's)
        PSNR in dB: null where nothing was reconstructed, the image is exact, which ``exact``
        counts, or no true image is known, which leaves ``scored`` at 0.
    """
    ok = run.leakage[reconstructed(run.leakage)]
    attacked = sorted(ok["round"].unique())
    told = ["label_true", "label_inferred"]
    labelled = ok.reindex(columns=told).dropna()
    right = (labelled["label_true"] == labelled["label_inferred"]).mean()
    # Of several seeds: the mean of each one's last round.
    last = run.rounds[run.rounds["round"] == run.rounds["round"].max()]
    found = {
        "run": run.name,
        "folder": str(near(run.folder)),
        "defence": run.defence,
        "differs": differs,
        "rounds": int(run.rounds["round"].max()) if len(run.rounds) else 0,
        "first": _leakage(ok, attacked[0]) if attacked else None,
        "last": _leakage(ok, attacked[-1]) if attacked else None,
        "images": len(run.leakage),
        "failed": len(run.leakage) - len(ok),
        "labels_right": float(right),
        "accuracy": float(last["accuracy"].mean()),
        "predicted_psnr_db": float(last["predicted_psnr_db"].median()),
        "commit": run.commit,
    }
    return dict(json_ready(found))


def _leakage(ok: pd.DataFrame, which: int) -> dict[str, Any]:
    psnr = ok.loc[ok["round"] == which, "psnr_db"].astype(float)
    return {
        "round": int(which),
        "psnr_db_median": json_ready(float(psnr.median())),
        "psnr_db_worst": json_ready(float(psnr.max())),
        "images": len(psnr),
        "scored": int(psnr.notna().sum()),
        "exact": int((psnr == math.inf).sum()),
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        title="runs (simulated): PSNR in dB of what the server reconstructed", box=box.SIMPLE,
        title_justify="left", padding=(0, 1, 0, 0), show_edge=False,
    )  # fmt: skip
    for column in ("run", "defence", "first", "worst", "last", "worst", "labels", "accuracy",
                   "predicted"):  # fmt: skip
        text = column in ("run", "defence")
        table.add_column(
            column, justify="left" if text else "right", no_wrap=not text, overflow="fold"
        )
    for row in rows:
        right, accuracy = row["labels_right"], row["accuracy"]
        table.add_row(
            row["run"], row["defence"],
            *_cells(row["first"]), *_cells(row["last"]),
            "-" if right is None else f"{right:.0%}",
            "-" if accuracy is None else f"{accuracy:.2f}",
            number(row["predicted_psnr_db"]),
        )  # fmt: skip
    return table


def _differences(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Return the settings in which the runs differ; None where they differ in none."""
    columns: list[tuple[str, dict[str, Any]]] = []
    for row in rows:  # the arms of one run share its settings
        if (row["run"], row["differs"]) not in columns:
            columns.append((row["run"], row["differs"]))
    if not rows[0]["differs"]:
        return None
    table = Table(
        title="what differs", box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0),
        show_edge=False,
    )  # fmt: skip
    for name in ("", *(name for name, _ in columns)):
        table.add_column(name, overflow="fold")
    for key in rows[0]["differs"]:
        values = [differs[key] for _, differs in columns]
        table.add_row(key, *("-" if v is None else str(v) for v in values))
    return table


def _cells(leak: dict[str, Any] | None) -> tuple[str, str]:
    if leak is None:
        return "-", "-"
    if not leak["scored"]:
        return "not known", "not known"
    # Null is infinite here: something is known.
    median, worst = (leak[k] for k in ("psnr_db_median", "psnr_db_worst"))
    return tuple("exact" if v is None else number(v) for v in (median, worst))  # type: ignore[return-value]


def _notes(runs: Sequence[Run], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Say what is missing, or makes runs hard to compare."""
    yield from (gap for run in runs for gap in run.gaps)
    for run, row in zip(runs, rows, strict=True):
        if unknown := int(run.leakage["psnr_db"][reconstructed(run.leakage)].isna().sum()):
            yield (
                f"{run.name}, {run.defence}: of {unknown} of {row['images']} images the true one "
                "is not known, nor how close it was come to"
            )
        if row["failed"]:
            failed = run.leakage[run.leakage["status"] == "failed"]
            reasons = list(failed["reason"].value_counts().index) if "reason" in failed else []
            why = f", most often: {reasons[0]}" if reasons else ""
            yield (
                f"{run.name}, {run.defence}: {row['failed']} of {row['images']} images were not "
                f"reconstructed{why}"
            )
    commits = {r.commit for r in runs}
    if len(commits) > 1:
        short = sorted("unknown" if c is None else _short(c) for c in commits)
        yield f"The runs were made by different code: commits {', '.join(short)}"
    if len(runs) > _MANY:
        yield f"{len(runs)} lines are hard to tell apart in the picture; compare fewer at once"


def _short(commit: str) -> str:
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def draw(runs: Sequence[Run], path: Path) -> Path | None:
    """Draw leakage and accuracy of all runs over the rounds.

    Returns
    -------
    Path or None
        None where no run has a finished round; an older picture is removed then.
    """
    import pandas as pd

    from fedleak.plots import leakage_vs_rounds

    several = len({r.name for r in runs}) > 1
    labels = [clean(f"{r.name}, {r.defence}" if several else r.defence, _LABEL) for r in runs]
    for n, label in enumerate(labels):  # the same defence twice in an evaluation
        if labels.count(label) > 1:
            labels[n] = f"{label} ({n + 1})"
    if all(r.rounds.empty for r in runs):
        path.unlink(missing_ok=True)
        return None
    pairs = list(zip(runs, labels, strict=True))
    leakage = pd.concat([r.leakage.assign(run=label) for r, label in pairs], ignore_index=True)
    rounds = pd.concat([r.rounds.assign(run=label) for r, label in pairs], ignore_index=True)
    title = "Compared (simulated): median of clients and images, quartiles"
    return leakage_vs_rounds(leakage, rounds, path, by="run", title=title)
