"""The results of one attack on one capture: written as they come, found again after a kill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedleak.capture.jobs import Chunk, Result, Retry
from fedleak.capture.manifest import sha256
from fedleak.files import TEXT, read_bytes, tensors, to_json, write_atomically
from fedleak.images import png
from fedleak.results.folder import Kind, claim
from fedleak.results.format import ATTACK, ATTACKS, GALLERIES, GALLERY
from fedleak.wording import clean_reason

OVERVIEW = "reconstructions.png"
_RESULTS, _PICTURES = "results", "pictures"
KIND = Kind(
    "attack", ATTACK, (ATTACK, ATTACKS.file, OVERVIEW, _RESULTS, _PICTURES, GALLERIES.file, GALLERY)
)
#: Pictures are drawn at least this high, in pixels.
_HEIGHT = 64


def save_images(file: Path, images: Tensor) -> str:
    """Write images whole; return the checksum that says later that they still are."""
    content = save({"images": images.contiguous()})
    write_atomically(file, content)
    return sha256(content)


def load_images(file: Path, checksum: str) -> Tensor:
    """Read images that :func:`save_images` wrote.

    Raises
    ------
    OSError, ValueError, KeyError, SafetensorError
        If they are missing or damaged.
    """
    content = read_bytes(file, tensors())
    if sha256(content) != checksum:
        raise ValueError(f"{file.name} is damaged: its checksum differs")
    return load(content)["images"]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    chunk: str
    sha256: str | None
    labels: tuple[int, ...]
    fit: float | None
    seconds: float
    reason: str
    retry: Retry
    doubtful: bool = False
    certified: tuple[bool, ...] = ()
    notes: str = ""
    details: dict[str, Any] = {}


class Results:
    """The folder of one attack.

    Parameters
    ----------
    folder : Path
    settings : dict
        What every result in the folder must have been made with; plain types.
    shape : tuple of int
        Shape (C, H, W) of one image.
    overwrite : bool
        Start again, where the folder holds results.

    Raises
    ------
    InvalidInputError
        If the folder cannot be used, holds something else, or was made with other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        shape: tuple[int, int, int],
        overwrite: bool = False,
    ):
        self.folder, self.shape = folder, shape
        claim(folder, KIND, settings, overwrite=overwrite)

    def load(self, name: str, digest: str) -> Result | None:
        """Return a stored result; None where there is none, of this chunk, whole."""
        try:
            row = _Row.model_validate_json(read_bytes(self._path(name, ".json"), TEXT))
            if row.chunk != digest:
                return None
            images = None
            if row.sha256 is not None:
                images = load_images(self._path(name, ".safetensors"), row.sha256).numpy()
                if images.shape != (len(row.labels), *self.shape) or not np.isfinite(images).all():
                    return None
        except (OSError, ValueError, TypeError, SafetensorError, KeyError):
            return None
        return Result(
            name, images, row.labels, row.fit, row.seconds, row.reason, row.retry, row.doubtful,
            row.certified if len(row.certified) == len(row.labels) else (), row.notes,
            row.details,
        )  # fmt: skip

    def save(self, chunk: Chunk, results: Sequence[Result]) -> None:
        """Write the results of one chunk; each last with what says that it is there."""
        for result in results:
            checksum = None
            if result.images is not None:
                images = torch.from_numpy(np.array(result.images))  # Ray's are read-only
                checksum = save_images(self._path(result.name, ".safetensors"), images)
                self._draw(result.name, images)
            finite = result.fit is not None and math.isfinite(result.fit)
            row = _Row(
                chunk=chunk.digest,
                sha256=checksum,
                labels=result.labels,
                fit=result.fit if finite else None,
                seconds=result.seconds,
                reason=clean_reason(result.reason),
                retry=result.retry,
                doubtful=result.doubtful,
                certified=result.certified,
                notes=result.notes,
                details=result.details,
            )
            write_atomically(self._path(result.name, ".json"), to_json(row.model_dump(mode="json")))

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / _RESULTS / f"{name}{suffix}"

    def _draw(self, name: str, images: Tensor) -> None:
        """Write the images of one update side by side, enlarged where they are small."""
        if images.shape[1] not in (1, 3):
            return  # neither grey nor colour
        from torchvision.utils import make_grid

        times = max(1, math.ceil(_HEIGHT / images.shape[2]))
        pixels = images.repeat_interleave(times, 2).repeat_interleave(times, 3)
        grid = make_grid(pixels, nrow=8, padding=4, pad_value=1.0)
        write_atomically(self.folder / _PICTURES / f"{name}.png", png(grid.numpy()))
