"""``fedleak paper``: every attack on every network of the paper, resumable."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedleak.commands.console import PlainConsole, resumable
from fedleak.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

    from fedleak.paper.cells import Images

#: The columns of the paper's figure, with steps that two CPU cores finish within the hour.
ATTACKS_OF_THE_PAPER = ("linear", "dlg", "cosine:steps=4000", "hybrid-paper", "hybrid")


def paper(
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Image file or folder; may be repeated. Default: installed photographs"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Images for the fast attacks")] = 10,
    slow_limit: Annotated[
        int, typer.Option(min=1, help="Images for dlg, idlg, cosine and hybrid-paper")
    ] = 2,
    attack: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:key=value,...; may be repeated")
    ] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="Name or factory; may be repeated")
    ] = None,
    public: Annotated[
        Path | None, typer.Option(help="Folder of public images, for a learned prior")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Draws what is random")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the results")] = Path("results/paper"),
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier comparison")] = False,
) -> None:
    """Compare the attacks on the paper's networks; a rerun goes on where one stopped."""
    # Imported here: the command line starts without what draws and tabulates.
    from fedleak.models import PAPER_NETWORKS
    from fedleak.paper.cells import parse_attack
    from fedleak.paper.comparison import compare

    networks = list(dict.fromkeys(network or PAPER_NETWORKS))
    specs = [parse_attack(a) for a in dict.fromkeys(attack or ATTACKS_OF_THE_PAPER)]
    chosen = _images(images, limit, seed)
    shared = None if public is None else _public(public, chosen.pixels)
    console = PlainConsole(soft_wrap=True)
    command = _command(images, limit, slow_limit, attack, network, public, seed, device, out)
    with resumable("comparing", "cells") as on_progress:
        compare(
            networks, specs, chosen, slow_limit, out, public=shared, seed=seed, device=device,
            command=command, overwrite=overwrite, on_progress=on_progress,
        )  # fmt: skip
    console.print((out / "paper.md").read_text(), highlight=False)
    console.print(f"In {out}: paper.md, paper.png, paper.csv, paper.json", highlight=False)


def _images(paths: Sequence[Path] | None, limit: int, seed: int) -> Images:
    from fedleak import laboratory
    from fedleak.paper.cells import CLASSES, Images
    from fedleak.paper.photographs import photographs

    if paths:
        files, pixels = laboratory.read_images(paths, 3, limit)
        return Images(_names(files), pixels, laboratory.labels_of(files, CLASSES, seed))
    names, pixels = photographs(limit)
    labels = laboratory.labels_of([Path(name) for name in names], CLASSES, seed)
    return Images(names, pixels, labels)


def _names(files: Sequence[Path]) -> list[str]:
    """Return the names of the files, as much of their paths as tells them apart."""
    for parts in (1, 2):
        names = ["/".join(f.parts[-parts:]) for f in files]
        if len(set(names)) == len(names):
            return names
    return [f"{n} {f.name}" for n, f in enumerate(files)]


def _public(folder: Path, like: Tensor) -> Tensor:
    """Read public images, and average them down to the size of the attacked ones."""
    import torch.nn.functional as F

    from fedleak import laboratory

    _, pixels = laboratory.read_images([folder], int(like.shape[1]))
    size = (int(like.shape[2]), int(like.shape[3]))
    if pixels.shape[2] < size[0] or pixels.shape[3] < size[1]:
        raise InvalidInputError(
            f"--public {str(folder)!r} has images of {pixels.shape[2]}x{pixels.shape[3]} pixels, "
            f"smaller than the {size[0]}x{size[1]} of those to attack"
        )
    return pixels if tuple(pixels.shape[2:]) == size else F.interpolate(pixels, size, mode="area")


def _command(
    images: Sequence[Path] | None,
    limit: int,
    slow_limit: int,
    attack: Sequence[str] | None,
    network: Sequence[str] | None,
    public: Path | None,
    seed: int,
    device: str,
    out: Path,
) -> str:
    """Return the command line that makes this comparison again."""
    words: list[object] = ["fedleak", "paper"]
    for flag, values in (("--images", images), ("--attack", attack), ("--network", network)):
        words += [w for value in values or () for w in (flag, value)]
    words += ["--limit", limit, "--slow-limit", slow_limit, "--seed", seed, "--device", device]
    words += ["--public", public] if public else []
    return shlex.join(str(w) for w in [*words, "--out", out])
