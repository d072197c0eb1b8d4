"""Galleries of a capture's clients: all rounds of each together, from stored results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError

from fedleak.attacks import Dossier, Held, Reconstruction
from fedleak.capture.jobs import Result, Work
from fedleak.capture.reader import Capture, round_of
from fedleak.capture.store import load_images, save_images
from fedleak.capture.truth import read_truth
from fedleak.errors import FedleakError
from fedleak.files import TEXT, read_bytes, to_json, write_atomically
from fedleak.quality import decibels_between
from fedleak.results.format import GALLERIES, GALLERY, plain


def write_galleries(
    capture: Capture, work: Work, results: Mapping[str, Result], folder: Path
) -> pd.DataFrame:
    """Write ``gallery.csv`` and a picture of each client; clients that are done are not done again.

    Parameters
    ----------
    capture : Capture
    work : Work
        Made ``results``.
    results : mapping of str to Result
        By name of the update, in the order of rounds.
    folder : Path

    Returns
    -------
    DataFrame
        One row for each image that is held. Rounds without a reconstruction are left out.
    """
    from fedleak.plots import gallery  # seaborn takes seconds to import

    clients: dict[tuple[int, ...], list[str]] = {}
    for name in results:
        try:
            clients.setdefault(capture.record(name).nodes, []).append(name)
        except FedleakError:  # damaged: its row in the table says so
            continue
    rows: list[dict[str, Any]] = []
    for nodes, names in clients.items():
        key = "+".join(map(str, nodes))
        file = folder / GALLERY / f"client-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        digest = _digest(work, results, names)
        held = _stored(file, digest)
        if held is None:
            held = _dossier(capture, work, results, names).gallery
            _store(file, digest, held)
        if not held:
            continue
        images = torch.stack([h.image for h in held])
        scores = _scores(capture, names, images)
        captions = [f"{len(h.rounds)} rounds" for h in held]
        title = f"What the server holds of client {key}: {len(held)} images"
        gallery(images, captions, file.with_suffix(".png"), title)
        for n, h in enumerate(held):
            rows.append({
                "client": key, "place": n, "label": h.label, "seen": len(h.rounds),
                "rounds": " ".join(map(str, h.rounds)), "certainty_db": plain(h.certainty_db),
                "misfit": plain(h.misfit), "certified": int(h.certified),
                "together": h.together, "psnr_db": "" if scores is None else plain(scores[n]),
            })  # fmt: skip
    GALLERIES.write(folder, rows)
    return pd.read_csv(folder / GALLERIES.file)


def _dossier(
    capture: Capture, work: Work, results: Mapping[str, Result], names: Sequence[str]
) -> Dossier:
    """Return what the rounds of one client tell, in their order."""
    dossier = Dossier(work.make())
    for name in names:
        found, read = results[name], capture.read(name)
        if found.images is None or read.observation is None:
            continue
        alone = Reconstruction(
            torch.from_numpy(found.images),
            torch.tensor(found.labels),
            float("inf") if found.fit is None else found.fit,
            dict(found.details),
        )
        dossier.add(round_of(name), read.observation, alone)
    return dossier


def _digest(work: Work, results: Mapping[str, Result], names: Sequence[str]) -> str:
    """Return a checksum of what a gallery is made from."""
    from fedleak import __version__

    digest = hashlib.sha256(f"{__version__} {work.attack} {work.options} {names}".encode())
    for name in names:
        images = results[name].images
        digest.update(b"-" if images is None else images.tobytes())
    return digest.hexdigest()


def _store(file: Path, digest: str, held: Sequence[Held]) -> None:
    images = torch.stack([h.image for h in held]) if held else torch.zeros(0)
    said = [{k: v for k, v in vars(h).items() if k != "image"} for h in held]
    for one in said:
        one.update({k: None for k, v in one.items() if v != v})  # JSON has no NaN
    checksum = save_images(file.with_suffix(".safetensors"), images)
    # Last: what is named here is there.
    told = {"digest": digest, "sha256": checksum, "held": said}
    write_atomically(file.with_suffix(".json"), to_json(told))


def _stored(file: Path, digest: str) -> list[Held] | None:
    """Return a gallery that an earlier call wrote; None where there is none, whole, of these."""
    try:
        told = json.loads(read_bytes(file.with_suffix(".json"), TEXT))
        if told["digest"] != digest:
            return None
        images = load_images(file.with_suffix(".safetensors"), told["sha256"])
        nan = float("nan")
        said: list[dict[str, Any]] = [
            {k: nan if v is None else v for k, v in h.items()} for h in told["held"]
        ]
        return [Held(image, **h) for image, h in zip(images, said, strict=True)]
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return None


def _scores(capture: Capture, names: Sequence[str], images: torch.Tensor) -> list[float] | None:
    """Return the PSNR in dB of each image with the nearest true one; None where it is unknown."""
    known: dict[tuple[int, int], torch.Tensor] = {}
    try:
        for name in names:
            truth = read_truth(capture.folder, name, capture.manifest.model.input_shape)
            if truth is not None:
                known |= dict(zip(truth.used, truth.images, strict=True))
    except FedleakError:
        return None
    if not known:
        return None
    return decibels_between(images, torch.stack([*known.values()])).amax(1).tolist()
