"""``fedleak audit``: what a server learns from one update of a model, without an attack."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fedleak.commands.console import PlainConsole, display, number
from fedleak.errors import InvalidInputError
from fedleak.files import make_private, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from fedleak.metric.audit import Audit
    from fedleak.priors import Prior


def audit(
    model: Annotated[str, typer.Option(help="Name, FILE.py:FACTORY or module:FACTORY")],
    input_shape: Annotated[
        str, typer.Option(metavar="C,H,W", help="Channels, height and width of one image")
    ] = "3,32,32",
    classes: Annotated[int, typer.Option(min=2, help="Classes of the model")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Images behind each update")] = 1,
    defence: Annotated[
        str, typer.Option(help="NAME:STRENGTH, as noise:0.1; several: clip:1+noise:0.1")
    ] = "none",
    weights: Annotated[Path | None, typer.Option(help="Checkpoint of the model")] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="natural (default), gaussian, or gaussian:learned from --public"),
    ] = None,
    public: Annotated[
        Path | None, typer.Option(help="Folder of public images, for the learned prior")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images to linearise around [default: synthetic ones]")
    ] = None,
    references: Annotated[
        int | None,
        typer.Option(min=1, help="Batches to linearise around [default: 2; 1 of large images]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Draws what is random")] = 0,
    target: Annotated[
        str | None, typer.Option(metavar="DB", help="Say what brings the prediction under it")
    ] = None,
    matrix_free: Annotated[
        bool,
        typer.Option("--matrix-free", help="For networks too large: bounds, and no attribution"),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for audit.json and pictures")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Predict what a server can recover from one update, and say which layers leak it."""
    from fedleak.metric.audit import audit as run
    from fedleak.models import build_model

    shape = read_shape(input_shape)
    target_db = None if target is None else read_target(target)
    if out is not None:
        try:
            make_private(out)
        except OSError as error:
            raise InvalidInputError(f"--out {str(out)!r} cannot be used: {error}") from error
    chosen = choose_prior(prior, public, shape)
    pixels = None if images is None else _read(images, shape)
    network = build_model(model, shape, classes, seed, weights).eval()
    with display(f"auditing {model}", inner=True):
        result = run(
            network, shape, batch_size, defence, chosen, pixels, references, seed, target_db,
            matrix_free,
        )  # fmt: skip
    found = {"model": model, **result.to_dict()}
    if out is not None:
        from fedleak.metric.figure import draw

        write_atomically(out / "audit.json", (json.dumps(found, indent=2) + "\n").encode())
        drawn = draw(result, out)
    if json_:
        print(json.dumps(found, indent=2))  # noqa: T201
        return
    console = PlainConsole(soft_wrap=True)
    show(result, model, console)
    if out is not None:
        names = ", ".join(["audit.json", *(p.name for p in drawn)])
        console.print(f"In {out}: {names}", highlight=False)


def read_shape(text: str) -> tuple[int, int, int]:
    """Read ``"3,32,32"``."""
    parts = [p.strip() for p in text.split(",")]
    if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise InvalidInputError(
            f"--input-shape {text!r} is not channels,height,width: three whole numbers above 0 "
            "with commas between, as 3,32,32"
        )
    return int(parts[0]), int(parts[1]), int(parts[2])


def read_target(text: str) -> float:
    """Read a number of dB."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidInputError(f"--target {text!r} is not a number of dB, as 15")
    return value


def choose_prior(name: str | None, public: Path | None, shape: tuple[int, int, int]) -> Prior:
    """Return the prior of the images: ``natural`` by default, or learned from public ones."""
    from fedleak.metric.prediction import natural_prior
    from fedleak.priors import make_prior

    name = name or ("natural" if public is None else "gaussian:learned")
    if name == "natural":
        if public is not None:
            raise InvalidInputError(
                "--prior natural learns nothing from --public; leave one of the two out"
            )
        return natural_prior(shape)
    seen = None if public is None else _read(public, shape)
    return make_prior(name, shape, public=seen)


def _read(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Read images, scaled to the model's."""
    from fedleak.images import read_images

    if shape[0] not in (1, 3):
        raise InvalidInputError(f"image files have 1 or 3 channels, the model takes {shape[0]}")
    return read_images([path], shape[0], size=shape[1:])[1]


def show(result: Audit, model: str, console: Console) -> None:
    """Print the tables and the verdict."""
    from fedleak.metric.verdict import verdict

    if result.metric is not None:
        console.print(_ranks(result, model))
    else:
        console.print(f"No c(M): {result.why_no_c}", highlight=False)
    if result.attribution is not None:
        console.print(_attribution(result))
    if result.advice:
        console.print(_advice(result))
    console.print(verdict(result), highlight=False)
    prediction = result.prediction
    known = "-" if math.isnan(prediction.effective_dimensions) else (
        f"{prediction.effective_dimensions:.0f}"
    )  # fmt: skip
    console.print(
        f"\nPredicted {prediction.psnr_db:.1f} dB (peak 1); directions known: {known} of "
        f"{prediction.unknowns}. Bounds: {_db(prediction.floor_db)} for any attack, averaged over "
        f"images of this prior (Cramer-Rao, estimated at {result.references} reference(s)); "
        f"{_db(result.i2f.psnr_db)} for attacks without a prior (inversion influence function). "
        f"{result.prior}, {result.seconds:.0f} s",
        highlight=False,
    )


def _db(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "- (not known)"


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0))
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left")
    return table


def _ranks(result: Audit, model: str) -> Table:
    assert result.metric is not None
    metric = result.metric
    table = _table(
        f"{model}: c(M) = {metric.c}, normalised {metric.c_normalised:.3f}",
        ("layer", "kind", "unknowns", "by weights", "by gradients", "rank", "deficiency", "weight"),
    )
    for x in (*metric.layers, *metric.dense):
        counts = (x.unknowns, x.weight_rank, x.gradient_rank, x.rank, x.deficiency)
        table.add_row(x.name, x.kind, *map(str, counts), f"{x.weight:.2f}")
    return table


def _attribution(result: Audit) -> Table:
    assert result.attribution is not None
    found = result.attribution
    sketched = any(x.sketched for x in found.layers)
    table = _table(
        f"What each layer tells, in dB: {found.psnr_db:.1f} together, {found.nothing_db:.1f} "
        f"without any (gradients known to {found.level:g})"
        + ("; ~: of random combinations of its entries" if sketched else ""),
        ("layer", "entries", "alone", "lost if withheld", "pruned 0.9", "noised 0.1"),
    )
    for x in found.layers:
        lost = (x.withheld_db, x.pruned_db, x.noised_db)
        alone = f"{'~' if x.sketched else ''}{x.alone_db:.1f}"
        table.add_row(x.name, str(x.entries), alone, *map(number, lost))
    return table


def _advice(result: Audit) -> Table:
    table = _table(
        f"To come under {result.target_db:g} dB", ("change", "dB after", "enough", "cost")
    )
    table.columns[-1].justify = "left"
    for a in result.advice:
        enough = "yes" if a.reached else "no"
        table.add_row(a.what, f"{a.predicted_psnr_db:.1f}", enough, a.cost)
    return table
