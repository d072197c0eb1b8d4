"""Reconstructions of a run, round by round, beside their truth: written and read."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedleak import files
from fedleak.results.format import RECONSTRUCTIONS

#: A file that unpacks to more bytes is not read.
_BYTES = 1 << 30
_FIELDS = ("client", "image", "truth", "reconstruction", "psnr_db")

#: Client and image.
Key = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Picture:
    """One reconstructed image and its truth, as arrays (C, H, W)."""

    truth: np.ndarray
    made: np.ndarray
    psnr_db: float


def write_round(folder: Path, number: int, pictures: Sequence[tuple[Key, Picture]]) -> None:
    """Write one round's pictures, whole and onto the disk."""
    keys, found = zip(*pictures, strict=True)
    content = io.BytesIO()
    np.savez_compressed(
        content,
        client=np.array([client for client, _ in keys]),
        image=np.array([image for _, image in keys]),
        truth=np.stack([p.truth for p in found]),
        reconstruction=np.stack([p.made for p in found]),
        psnr_db=np.array([p.psnr_db for p in found]),
    )
    file = folder / RECONSTRUCTIONS / f"round-{number:04d}.npz"
    files.write_atomically(file, content.getvalue(), durable=True)


def files_by_round(folder: Path) -> dict[int, Path]:
    """Return the files of reconstructions by their round."""
    found = {}
    for path in sorted((folder / RECONSTRUCTIONS).glob("round-*.npz")):
        if match := re.fullmatch(r"round-(\d{1,9})\.npz", path.name):
            found[int(match[1])] = path
    return found


def read_round(path: Path, notes: list[str]) -> dict[Key, Picture]:
    """Read one round's pictures by client and image; none, and a note, of a damaged file."""
    try:
        content = files.read_bytes(path, files.TABLE)
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            if sum(part.file_size for part in packed.infolist()) > _BYTES:
                raise ValueError(f"it unpacks to more than {_BYTES >> 20} MB")
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            client, image, truth, made, psnr = (stored[k] for k in _FIELDS)
        count = len(client)
        if truth.ndim != 4 or truth.shape != made.shape or truth.shape[1] not in (1, 3):
            raise ValueError(f"arrays of shapes {truth.shape} and {made.shape} are no images")
        if not (len(image) == len(psnr) == len(truth) == count):
            raise ValueError("its arrays differ in length")
        return {
            (int(c), int(i)): Picture(np.asarray(t, float), np.asarray(m, float), float(p))
            for c, i, t, m, p in zip(client, image, truth, made, psnr, strict=True)
        }
    except Exception as error:  # of damaged archives and arrays, readers raise anything
        why = str(error).replace(str(path), path.name)
        notes.append(f"{path.parent.parent.name}/reconstructions/{path.name} is damaged: {why}")
        return {}
