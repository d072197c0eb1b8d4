"""The true images of a simulated capture: what scoring reads, and no attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.files import read_bytes, tensors, write_atomically

FOLDER = "truth"


@dataclass(frozen=True, eq=False)
class Truth:
    """The images behind one update.

    Attributes
    ----------
    images : Tensor, shape (n, C, H, W)
    labels : Tensor, int64, shape (n,)
    used : list of (int, int)
        Client, and index of the image in the simulation's data set.
    """

    images: Tensor
    labels: Tensor
    used: list[tuple[int, int]]


def write_truth(
    capture: Path, name: str, used: Sequence[tuple[int, int]], images: Tensor, labels: Tensor
) -> None:
    """Write the truth of the update ``name`` beside a capture."""
    content = save({"images": images.contiguous(), "labels": labels, "used": torch.tensor(used)})
    write_atomically(capture / FOLDER / f"{name}.safetensors", content)


def read_truth(capture: Path, name: str, shape: tuple[int, int, int]) -> Truth | None:
    """Return the truth of the update ``name``; None where there is none.

    Raises
    ------
    InvalidInputError
        If it is damaged.
    """
    path = capture / FOLDER / f"{name}.safetensors"
    if not path.exists():
        return None
    try:
        found = load(read_bytes(path, tensors()))
        images, labels, used = (found[k] for k in ("images", "labels", "used"))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InvalidInputError(f"{str(path)!r} is damaged: {error}") from error
    count = len(images)
    if tuple(images.shape[1:]) != shape or len(labels) != count or used.shape != (count, 2):
        raise InvalidInputError(f"{str(path)!r} is damaged: its tensors do not belong together")
    if not (bool(images.double().isfinite().all()) and count):
        raise InvalidInputError(f"{str(path)!r} is damaged: its images are no numbers")
    return Truth(images, labels, [(int(c), int(i)) for c, i in used.tolist()])
