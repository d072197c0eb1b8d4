"""True images beside what was made of them, as PNG inside the page."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedleak.errors import InvalidInputError
from fedleak.images import png, read_image
from fedleak.report.sources import Arm
from fedleak.results.pictures import Key, Picture, files_by_round, read_round
from fedleak.results.reading import try_json
from fedleak.untrusted import finite
from fedleak.wording import ENOUGH_DB, fit_text

#: Images beside each other in one round.
COLUMNS = 6
#: Rounds of the slider, and bytes of all its pictures.
ROUNDS, BUDGET = 24, 2_500_000
#: Larger images are averaged down to about this height and width, in pixels.
_SIDE = 96
#: The same of pictures that ``fedleak attack`` drew: several images in a row.
_WIDE = 1200


@dataclass(frozen=True)
class Tile:
    """An image as the page has it; no ``src`` where it was not reconstructed."""

    src: str
    psnr_db: float = math.nan


@dataclass(frozen=True)
class Panel:
    """The images of one round, of ``total``: a row of true ones, and one for each defence."""

    number: int
    total: int
    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Tile, ...]], ...]


@dataclass(frozen=True)
class Gallery:
    """Panels of the rounds that are shown, the one to start with, and what was left out."""

    panels: tuple[Panel, ...]
    start: int
    left_out: str


def to_uri(image: np.ndarray, side: int = _SIDE) -> str:
    """Return an image (C, H, W) in [0, 1] as a PNG inside a URI; what is not finite is grey."""
    pixels = np.clip(np.nan_to_num(image, nan=0.5, posinf=1.0, neginf=0.0), 0, 1)
    times = max(1, math.ceil(max(pixels.shape[1:]) / side))
    if times > 1:
        _, h, w = pixels.shape
        cut = pixels[:, : max(1, h // times) * times, : max(1, w // times) * times]
        if h >= times and w >= times:
            cut = cut.reshape(len(cut), h // times, times, w // times, times).mean((2, 4))
        pixels = cut
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def gallery(arms: Sequence[Arm], notes: list[str], budget: int = BUDGET) -> Gallery | None:
    """Choose the best-recovered images of each round, under every defence.

    Parameters
    ----------
    arms : sequence of Arm
        The first folder (seed) of each is shown.
    notes : list of str
        Damaged files are named here.
    budget : int
        Bytes of all pictures.

    Returns
    -------
    Gallery or None
        None where there are no pictures.
    """
    sources = [(a.label, files_by_round(a.folders[0])) for a in arms if a.folders]
    sources = [(label, files) for label, files in sources if files]
    numbers = sorted({n for _, files in sources for n in files})
    panels: dict[int, Panel] = {}
    used, columns, capped = 0, COLUMNS, False
    for number in spread(numbers):
        found = [(label, read_round(files[number], notes)) for label, files in sources
                 if number in files]  # fmt: skip
        panel = _panel(number, found, columns)
        if panel is None:
            continue
        if not panels and (size := _size(panel)) > budget:  # many defences, large images
            columns = max(1, columns * budget // size)
            panel = _panel(number, found, columns) or panel
        size = _size(panel)
        if panels and (used + size > budget or len(panels) >= ROUNDS):
            capped = True
            break
        panels[number], used = panel, used + size
    if not panels:
        return None
    shown = tuple(panels[n] for n in sorted(panels))
    left_out = [f"{len(shown)} of {len(numbers)} attacked rounds"] if capped else []
    if any(p.total > len(p.names) for p in shown):
        left_out.append(f"the {columns} best-recovered images of each round")
    start = max(shown, key=_worst).number
    return Gallery(shown, start, ", ".join(left_out))


def _size(panel: Panel) -> int:
    return sum(len(tile.src) for _, row in panel.rows for tile in row)


def spread(numbers: Sequence[int]) -> Iterator[int]:
    """Yield all numbers, those far from each other first: ends, middle, quarters, ..."""
    seen: set[int] = set()
    steps = len(numbers) - 1
    for parts in (1 << n for n in range(max(1, steps).bit_length() + 1)):
        for k in range(parts + 1):
            index = round(k * max(steps, 0) / parts)
            if numbers and index not in seen:
                seen.add(index)
                yield numbers[index]


def _panel(
    number: int, found: Sequence[tuple[str, dict[Key, Picture]]], columns: int
) -> Panel | None:
    scores: dict[Key, list[float]] = {}
    for _, pictures in found:
        for key, picture in pictures.items():
            finite = 0.0 if math.isnan(picture.psnr_db) else picture.psnr_db
            scores.setdefault(key, []).append(min(finite, ENOUGH_DB))
    keys = sorted(scores, key=lambda k: (-sum(scores[k]), k))[:columns]
    if not keys:
        return None
    truth = tuple(Tile(to_uri(next(p[k].truth for _, p in found if k in p))) for k in keys)
    rows = [("true image", truth)]
    for label, pictures in found:
        tiles = (
            Tile(to_uri(pictures[k].made), pictures[k].psnr_db) if k in pictures else Tile("")
            for k in keys
        )
        rows.append((label, tuple(tiles)))
    return Panel(number, len(scores), tuple(f"client {c}" for c, _ in keys), tuple(rows))


def _worst(panel: Panel) -> float:
    """Return by how much a round leaks: the PSNR of its images, over all defences."""
    values = [min(t.psnr_db, ENOUGH_DB) for _, row in panel.rows[1:] for t in row if t.src]
    return float(np.nanmean(values)) if values and not np.isnan(values).all() else 0.0


def _caption(name: str, about: dict[str, Any]) -> str:
    """Return what is said below the pictures of one update: whose, and how far they explain it."""
    found = re.fullmatch(r"round-(\d{1,9})/client-(\d{1,9})", name)
    where = f"round {int(found[1])}, update {int(found[2])}" if found else name
    fit = finite(about.get("fit"))
    told = "" if fit is None else f": fit {fit_text(fit)}"
    return where + told + (", doubtful" if about.get("doubtful") is True else "")


def attack_pictures(folder: Path, most: int = 12) -> tuple[list[tuple[str, str]], int]:
    """Return pictures that ``fedleak attack`` drew, as (name, URI), and how many there are."""
    paths = sorted((folder / "pictures").glob("*/*.png"))
    found = []
    for path in paths[:most]:
        if not path.resolve().is_relative_to(folder.resolve()):
            continue  # a link to a picture of whoever reads this
        try:  # drawn again: a stranger's file is not passed on to a browser
            image = read_image(path)
        except InvalidInputError:
            continue
        name = path.relative_to(folder / "pictures").with_suffix("").as_posix()
        about = try_json(folder / "results" / f"{name}.json", [])
        found.append((_caption(name, about), to_uri(image.numpy(), _WIDE)))
    return found, len(paths)
