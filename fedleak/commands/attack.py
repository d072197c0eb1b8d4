"""``fedleak attack``: reconstruct images from captured updates, resumable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from fedleak.commands.console import PlainConsole, near, number, read_options, resumable
from fedleak.wording import json_ready

if TYPE_CHECKING:
    from fedleak.capture.run import Attacked

_console = PlainConsole()


def attack(
    capture: Annotated[Path, typer.Argument(help="Folder that --capture or capture= wrote")],
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
    model: Annotated[
        str | None,
        typer.Option(help="Name, FILE.py:FACTORY or module:FACTORY [default: as captured]"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine")] = 1,
    engine: Annotated[str, typer.Option(help="local, or ray (the cluster at RAY_ADDRESS)")] = (
        "local"
    ),
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process")] = 1,
    together: Annotated[
        int, typer.Option(min=1, help="Updates attacked at once; more is faster on a GPU")
    ] = 8,
    limit: Annotated[int, typer.Option(min=0, help="The first updates only; 0: all")] = 0,
    seconds: Annotated[
        float, typer.Option(min=0, help="Time for each update; then the best so far. 0: no limit")
    ] = 600.0,
    memory: Annotated[
        bool, typer.Option("--memory", help="All rounds of each client together: a gallery")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Output folder [default: CAPTURE/attacks/ATTACK-...]")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again, also with what is done")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Attack captured updates; what is done is kept, and a rerun goes on where one stopped.

    CAPTURE is a folder that `fedleak simulate --capture` or MaliciousServer(capture=...) wrote.
    """
    from fedleak.capture.run import attack_capture

    options = read_options(option or (), prior, public)
    with resumable("attacking", "updates") as on_progress:
        attacked = attack_capture(
            capture, attack, options, out, model=model, device=device, jobs=jobs,
            engine=engine, threads=threads, together=together,  # type: ignore[arg-type]
            limit=limit, seconds=seconds, memory=memory, overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip
    _report(attacked, attack, json_)


def _report(attacked: Attacked, attack: str, json_: bool) -> None:
    from fedleak.capture.table import summary

    found = summary(attacked.table)
    if json_:
        rows = json.loads(attacked.table.to_json(orient="records", double_precision=15))
        whole = {"attack": attack, "out": str(attacked.folder), **found, "rows": rows}
        print(json.dumps(json_ready(whole), indent=2))  # noqa: T201
        return
    title = "captured updates" + (" (simulated)" if attacked.simulated else "")
    table = Table(title=title, box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0))
    for column in ("attack", "images", "failed", "mean", "median", "best", "labels", "fit"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    right, fit = found["labels_right"], found["fit_median"]
    table.add_row(
        attack, str(found["images"]), str(found["failed"]), number(found["psnr_db_mean"]),
        number(found["psnr_db_median"]), number(found["psnr_db_best"]),
        "-" if right is None else f"{right:.0%}", "-" if fit is None else f"{fit:.1e}",
    )  # fmt: skip
    _console.print(table)
    for line in _notes(attacked, found):
        _console.print(line, highlight=False, soft_wrap=True)
    for name, what in (
        ("gallery.csv", "distinct images of each client, drawn in gallery"),
        ("attacks.csv", "every image: scores, labels, fit, status"),
        ("reconstructions.png", "the first images"),
        ("pictures", "every update's images"),
    ):
        if (attacked.folder / name).exists():
            _console.print(f"  {name:<22}{what}", highlight=False)


def _notes(attacked: Attacked, found: dict[str, Any]) -> Iterator[str]:
    if found["doubtful"]:
        yield f"{found['doubtful']} images are doubtful: {found['doubt']}"
    if found["note"]:
        yield f"Seen, and taken into account, in {found['note']}"
    if found["failed"]:
        yield f"Most frequent reason for a failure: {found['reason']}"
    if found["psnr_db_mean"] is not None:
        yield "mean, median, best: PSNR in dB. labels: inferred rightly."
    elif found["images"]:
        yield (
            "The true images are not known here, so neither is how close these come. fit is the "
            "part of an update that they do not explain (0: none, 1: all); look at the pictures."
        )
    if attacked.gallery is not None:
        held, clients = attacked.gallery, attacked.gallery["client"].nunique()
        more = int((held["together"] > 1).sum())
        yield (
            f"Together: {len(held)} distinct images of {clients} clients, {more} of them from "
            "several rounds as one estimate."
        )
    if attacked.skipped:
        yield f"{attacked.skipped} updates had been done before and were not attacked again."
    yield f"Look next at, in {near(attacked.folder)}:"
