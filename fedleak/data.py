"""Labelled images: scikit-learn's digits, any torchvision data set, a folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak.errors import DataUnavailableError, InvalidInputError, UnknownNameError
from fedleak.events import steps, warn
from fedleak.images import MAX_TOGETHER, image_files, read_image, scale, to_tensor
from fedleak.registry import Registry


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with labels, read when they are asked for.

    Attributes
    ----------
    labels : Tensor, int64, shape (n,)
    classes : int
    shape : tuple of int
        Shape (C, H, W) of every image.
    read : callable
        ``index -> Tensor``, float32 in [0, 1], of that shape.
    """

    labels: Tensor
    classes: int
    shape: tuple[int, int, int]
    read: Callable[[int], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images (n, C, H, W) and labels (n,)."""
        images = torch.stack([self.read(int(i)) for i in indices])
        return images, self.labels[list(indices)]

    def subset(self, indices: Sequence[int]) -> LabelledImages:
        """Return these images only, in this order."""
        chosen = [int(i) for i in indices]
        return LabelledImages(
            self.labels[chosen], self.classes, self.shape, lambda i: self.read(chosen[i])
        )


Split = tuple[LabelledImages, LabelledImages]
#: ``loader(root, download, size) -> (training images, test images)``
DATASETS: Registry[Callable[[str, bool, int], Split]] = Registry("data set", "fedleak.datasets")

#: Arguments that a data set of torchvision cannot do without. EMNIST by class is what FEMNIST
#: is made of.
_NEEDED: dict[str, dict[str, Any]] = {"EMNIST": {"split": "byclass"}}

#: Share of images held out for testing where a data set brings no split of its own.
_TEST_SHARE = 0.2


def known_datasets() -> list[str]:
    """Return the names that :func:`load_data` takes."""
    return [*DATASETS, *torchvision_names()]


def check_name(name: str) -> None:
    """Raise UnknownNameError if there is no such data set."""
    # Ours first: torchvision takes seconds to import.
    if name not in DATASETS and name not in torchvision_names():
        raise UnknownNameError("data set", name, known_datasets())


@lru_cache(maxsize=8)
def load_data(name: str, root: str = "data", download: bool = False, size: int = 0) -> Split:
    """Load training and test images.

    Parameters
    ----------
    name : str
        ``digits`` (scikit-learn, 8x8, ships with it), ``folder`` (a folder with one
        folder of images for each class), or a class of ``torchvision.datasets``.
    root : str
        Where the data set lies, or is downloaded to. Not used by ``digits``.
    download : bool
        Let torchvision download the data set into ``root``.
    size : int
        Height and width to resize images to; 0 leaves them (``folder``: 32).

    Raises
    ------
    UnknownNameError
        If there is no such data set.
    DataUnavailableError
        If the data set is not under ``root``; the message gives the ways out.
    """
    check_name(name)
    if name in DATASETS:
        return DATASETS[name](root, download, size)
    return _load_torchvision(name, root, download, size)


def _hold_out(images: LabelledImages) -> Split:
    """Split with a fixed permutation: the same everywhere, whatever the run's seed."""
    if len(images) < 2 or images.classes < 2:
        raise DataUnavailableError(
            f"the data set has {len(images)} images of {images.classes} classes; at least two of "
            "each are needed, to train on and to test with"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    cut = max(1, round(len(images) * _TEST_SHARE))
    return images.subset(sorted(order[cut:])), images.subset(sorted(order[:cut]))


@DATASETS.register("digits")
def _digits(root: str, download: bool, size: int) -> Split:
    """Handwritten digits of scikit-learn, 1x8x8, 1797 images; needs no download."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images / 16.0, dtype=torch.float32).unsqueeze(1)
    if size:
        if len(pixels) * size * size > MAX_TOGETHER:
            raise InvalidInputError(
                f"digits have 8x8 pixels; data.size={size} would make {len(pixels)} images of "
                f"{size}x{size}, more than fit in memory"
            )
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    labels = torch.tensor(found.target, dtype=torch.int64)
    shape = (1, int(pixels.shape[2]), int(pixels.shape[3]))
    return _hold_out(LabelledImages(labels, 10, shape, lambda i: pixels[i]))


@DATASETS.register("folder")
def _folder(root: str, download: bool, size: int) -> Split:
    """A folder with one folder of images for each class, 3x32x32 if not told otherwise.

    What cannot be read is named in a warning and left out, before anything is computed.
    """
    if not Path(root).is_dir():
        raise DataUnavailableError(
            f"there is no folder {root!r}; set data.root to a folder that holds one folder of "
            "images for each class"
        )
    try:
        classes = sorted(p for p in Path(root).iterdir() if p.is_dir())
    except OSError as error:
        raise DataUnavailableError(f"folder {root!r} cannot be read: {error}") from error
    if not classes:
        raise DataUnavailableError(
            f"folder {root!r} holds no folders; it must hold one folder of images for each class"
        )
    files, labels, kept = [], [], []
    side, held = size or 32, 0
    listed = [(file, label) for label, c in enumerate(classes) for file in image_files(c)]
    for n in steps(len(listed), f"reading {root}"):
        file, label = listed[n]
        try:
            image = read_image(file, 3, (side, side))
        except InvalidInputError as error:
            warn(f"left out: {error}", file=str(file))
            continue
        held += image.numel()
        files.append(file)
        labels.append(label)
        kept.append(image if held <= MAX_TOGETHER // 4 else None)
    empty = [c.name for n, c in enumerate(classes) if n not in set(labels)]
    if empty:
        raise DataUnavailableError(
            f"no image could be read in {', '.join(map(repr, empty[:5]))} of {root!r}; remove what "
            "is no folder of a class"
        )

    def read(index: int) -> Tensor:
        known = kept[index]
        return read_image(files[index], 3, (side, side)) if known is None else known

    labelled = torch.tensor(labels, dtype=torch.int64)
    return _hold_out(LabelledImages(labelled, len(classes), (3, side, side), read))


def _wrap(found: Any, labels: Any, classes: int, size: int) -> LabelledImages:
    """Wrap a torchvision data set."""

    def decode(index: int) -> Tensor:
        try:
            image = to_tensor(found[index][0])
        except Exception as error:  # of a damaged file, decoders raise anything
            raise InvalidInputError(f"image {index} of the data set: {error}") from error
        return scale(image, (size, size) if size else None)

    channels, height, width = decode(0).shape

    def read(index: int) -> Tensor:
        image = decode(index)
        if image.shape != (channels, height, width):
            raise InvalidInputError(
                f"image {index} has shape {tuple(image.shape)}, the first one "
                f"{(channels, height, width)}; set data.size to resize all to one size"
            )
        return image

    targets = torch.as_tensor(labels, dtype=torch.int64).flatten()
    return LabelledImages(targets, classes, (channels, height, width), read)


@lru_cache(maxsize=1)
def torchvision_names() -> tuple[str, ...]:
    """Return the classes of ``torchvision.datasets`` that may be data sets; takes seconds."""
    from torchvision import datasets

    other = {"ImageFolder", "DatasetFolder", "VisionDataset", "wrap_dataset_for_transforms_v2"}
    return tuple(n for n in datasets.__all__ if n not in other)


def _load_torchvision(name: str, root: str, download: bool, size: int) -> Split:
    from torchvision import datasets

    kind = getattr(datasets, name)
    parameters = inspect.signature(kind).parameters
    common: dict[str, Any] = {"root": root} if "root" in parameters else {}
    if download and "download" in parameters:
        common["download"] = True
    common |= _NEEDED.get(name, {})
    try:
        if "train" in parameters or name in _NEEDED:
            pair = [kind(**common, train=True), kind(**common, train=False)]
        elif "split" in parameters:
            pair = [kind(**common, split="train"), kind(**common, split="test")]
        else:
            pair = [kind(**common)]
    except TypeError as error:
        raise InvalidInputError(
            f"data set {name!r} needs more than a root ({error}); export it to a folder of "
            "images and use data.name='folder'"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        if "split" in str(error) and not isinstance(error, OSError):
            raise InvalidInputError(
                f"data set {name!r} has splits of its own ({error}); export it to a folder of "
                "images and use data.name='folder'"
            ) from error
        raise DataUnavailableError(
            f"data set {name!r} is not usable from {root!r} ({str(error).splitlines()[0]}). Three "
            "ways out: let torchvision download it (data.download=true), point data.root at the "
            "folder that has it, or use what needs no download (data.name='digits', or "
            "data.name='folder' with your own images)"
        ) from error
    labels = [_labels(p, name) for p in pair]
    classes = int(max(int(torch.as_tensor(label).max()) for label in labels)) + 1
    wrapped = [_wrap(p, label, classes, size) for p, label in zip(pair, labels, strict=True)]
    return (wrapped[0], wrapped[1]) if len(wrapped) == 2 else _hold_out(wrapped[0])


def _labels(found: Any, name: str) -> Any:
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(found, attribute):
            return getattr(found, attribute)
    labels = [found[i][1] for i in range(len(found))]
    if not all(isinstance(label, int) for label in labels):
        raise InvalidInputError(f"data set {name!r} has no class labels, so nothing to classify")
    return labels
