"""The table of an attack on a capture: stored results, scored where the truth is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fedleak.capture.jobs import Result
from fedleak.capture.reader import Capture, round_of
from fedleak.capture.store import OVERVIEW
from fedleak.capture.truth import Truth, read_truth
from fedleak.errors import FedleakError, InvalidInputError, InvalidUpdateError
from fedleak.quality import score_batch
from fedleak.results.format import ATTACKS
from fedleak.status import most_frequent, most_frequent_note, reconstructed

#: Images in the overview.
_SHOWN = 8

Row = dict[str, Any]


def write_table(
    capture: Capture, attack: str, results: Mapping[str, Result], folder: Path
) -> pd.DataFrame:
    """Score what was reconstructed, and write the table and an overview.

    Parameters
    ----------
    capture : Capture
    attack : str
        Its name.
    results : mapping of str to Result
        By name of the update; the table is in this order.
    folder : Path

    Returns
    -------
    DataFrame
        ``attacks.csv``, one row for each image; ``client`` and ``image`` are those of the
        simulation, or else the node and the place in the update. ``certified`` is 1 where the
        attack's own test proved the image, ``defence`` what the attack allowed for.
    """
    rows: list[Row] = []
    pictures: list[tuple[Any, Any, float]] = []
    for name, result in results.items():
        base = {
            "round": round_of(name), "attack": attack, "seconds": round(result.seconds, 4),
            "fit": "" if result.fit is None else result.fit,
            "defence": _defence(capture, name),
            "status": result.status,
            "reason": result.reason, "notes": result.notes,
        }  # fmt: skip
        for row, picture in _rows(capture, name, result):
            rows.append(base | row)
            if picture is not None and len(pictures) < _SHOWN:
                pictures.append(picture)
    ATTACKS.write(folder, rows)
    _overview(pictures, attack, capture.manifest.simulated, folder)
    # As anybody reads it: numbers are numbers, and what is unknown is NaN.
    return pd.read_csv(folder / ATTACKS.file)


def _rows(
    capture: Capture, name: str, result: Result
) -> Iterator[tuple[Row, tuple[Any, Any, float] | None]]:
    """Yield what tells the images of one update apart, and their pictures."""
    note = ""
    try:
        truth = read_truth(capture.folder, name, capture.manifest.model.input_shape)
        if truth is not None:
            yield from list(_scored(truth, result))
            return
    except (FedleakError, RuntimeError, ValueError) as error:
        note = f"not scored: {error}"
    row: Row = {"client": _nodes(capture, name)}
    if result.images is None:
        yield row, None
        return
    for place, image in enumerate(result.images):
        found = {
            "image": place,
            "label_inferred": result.labels[place],
            "certified": int(result.certified[place]) if result.certified else "",
            "reason": note or result.reason,
        }
        yield row | found, (None, image, math.nan)


def _scored(truth: Truth, result: Result) -> Iterator[tuple[Row, tuple[Any, Any, float] | None]]:
    images = None if result.images is None else torch.from_numpy(result.images)
    labels = None if images is None else torch.tensor(result.labels)
    scored = score_batch(images, labels, truth.images, truth.labels)
    for (client, image), true, one in zip(truth.used, truth.images, scored, strict=True):
        row: Row = {"client": client, "image": image, "label_true": one.label}
        if one.image is None or one.quality is None:
            reason = result.reason or "not reconstructed"
            missing = {"reason": reason, "status": "failed"}
            yield row | missing, None
            continue
        quality = one.quality
        row |= asdict(quality) | {"label_inferred": one.label_inferred}
        if result.certified:  # which is whose is not kept by the score
            row["certified"] = int(all(result.certified))
        yield row, (true.numpy(), one.image.numpy(), quality.psnr_db)


def _nodes(capture: Capture, name: str) -> str:
    try:
        return "+".join(map(str, capture.record(name).nodes))
    except InvalidUpdateError:
        return ""


def _defence(capture: Capture, name: str) -> str:
    try:
        return capture.record(name).defence or ""
    except InvalidUpdateError:
        return ""


def _overview(
    pictures: list[tuple[Any, Any, float]], attack: str, simulated: bool, folder: Path
) -> None:
    from fedleak.plots import image_grid  # seaborn takes seconds to import

    if not pictures or pictures[0][1].shape[0] not in (1, 3):
        return
    truth, made, psnr = (list(part) for part in zip(*pictures, strict=True))
    known = [t for t in truth if t is not None]
    title = "Reconstructed from captured updates" + (" (simulated)" if simulated else "")
    true_row = truth if len(known) == len(truth) else []
    image_grid(true_row, [(attack, made, psnr)], folder / OVERVIEW, title)


def summary(table: pd.DataFrame) -> dict[str, Any]:
    """Return what a closing message says of a table, as plain types.

    ``psnr_db_mean`` and ``psnr_db_median`` are None where the truth is not known, and
    ``inf`` where images are exact.
    """
    if table.empty:
        raise InvalidInputError("the capture holds no updates yet")
    ok = table[reconstructed(table)]
    scored = ok[ok["psnr_db"].notna()]
    return {
        "images": len(ok),
        "failed": len(table) - len(ok),
        "psnr_db_mean": float(scored["psnr_db"].mean()) if len(scored) else None,
        "psnr_db_median": float(scored["psnr_db"].median()) if len(scored) else None,
        "psnr_db_best": float(scored["psnr_db"].max()) if len(scored) else None,
        "labels_right": float((scored["label_true"] == scored["label_inferred"]).mean())
        if len(scored)
        else None,
        "fit_median": float(ok["fit"].median()) if len(ok) else None,
        "reason": most_frequent(table, "failed"),
        "doubtful": int((table["status"] == "doubtful").sum()),
        "doubt": most_frequent(table, "doubtful"),
        "note": most_frequent_note(table),
    }
