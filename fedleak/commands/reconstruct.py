"""``fedleak reconstruct``: images from the gradients that clients would share for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from fedleak.commands.console import PlainConsole, display, number, read_options
from fedleak.errors import InvalidInputError
from fedleak.files import make_private

if TYPE_CHECKING:
    from fedleak.attacks import Reconstruction

_console = PlainConsole()


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
    seconds: Annotated[
        float, typer.Option(min=0, help="Time for each update; then the best so far. 0: no limit")
    ] = 600.0,
    out: Annotated[Path | None, typer.Option(help="Folder for a picture of the result")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Reconstruct images from the gradients that clients would share for them."""
    from fedleak import laboratory
    from fedleak.attacks import attack_for
    from fedleak.models import build_model

    if channels not in (1, 3):
        raise InvalidInputError(f"--channels must be 1 (grey) or 3 (colour), not {channels}")
    if out is not None:
        try:
            make_private(out)
        except OSError as error:
            raise InvalidInputError(f"--out {str(out)!r} cannot be used: {error}") from error
    if label not in ("infer", "known"):
        raise InvalidInputError(f"--label must be 'infer' or 'known', not {label!r}")
    files, pixels = laboratory.read_images(images, channels, limit)
    labels = laboratory.labels_of(files, classes, seed)
    channel, height, width = pixels.shape[1:]
    network = build_model(model, (channel, height, width), classes, seed, weights).eval()
    options = read_options(option or (), prior, public)
    run = attack_for(attack, options, device, seed)
    with display(f"attacking with {attack}", inner=True):
        trials = laboratory.reconstruct(
            network, pixels, labels, run, defence, label == "known", seed, batch_size, informed,
            seconds=seconds,
        )  # fmt: skip
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
    # Each batch has one reconstruction, and what is said of several is said once.
    results = {id(t.reconstruction): t.reconstruction for t in trials.trials}.values()
    said = [note for result in results for note in _seen(result)]
    for note in dict.fromkeys([*said, *_notes(trials.trials[0].reconstruction)]):
        _console.print(note, highlight=False, soft_wrap=True)


def _seen(result: Reconstruction) -> Iterator[str]:
    """Say what the update shows that is not as declared: doubted, or taken into account."""
    for doubt in result.doubts:
        yield f"Doubtful: {doubt}."
    for note in result.notes:
        yield f"Seen, and taken into account: {note}."


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
            "--option steps=, or another --prior, may do better; else the client is another than "
            "was declared."
        )
