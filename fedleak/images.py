"""Image files as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedleak.errors import DataUnavailableError, InvalidInputError

#: Endings of files that are read as images.
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


def read_images(
    paths: Sequence[Path], channels: int = 3, limit: int = 0, size: Sequence[int] | None = None
) -> tuple[list[Path], Tensor]:
    """Read image files and folders of them.

    Parameters
    ----------
    paths : sequence of Path
        Files, or folders searched to any depth.
    channels : int
        1 for grey, 3 for colour.
    limit : int
        Read at most this many; 0 for all.
    size : (int, int), optional
        Height and width to scale every image to; without it all must be of one size.

    Returns
    -------
    files : list of Path
    images : Tensor, float32, shape (N, C, H, W)

    Raises
    ------
    DataUnavailableError, InvalidInputError
        If a path is missing, nothing is an image, or sizes differ.
    """
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.functional import resize

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise DataUnavailableError(f"there is no image file or folder {str(path)!r}")
    files = files[: limit or None]
    if not files:
        raise DataUnavailableError(
            f"no images in {', '.join(map(str, paths))}; known types: {', '.join(sorted(SUFFIXES))}"
        )
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    images: list[Tensor] = []
    for file in files:
        try:
            images.append(decode_image(str(file), mode).float() / 255)
        except RuntimeError as error:
            raise InvalidInputError(f"{str(file)!r} cannot be read as an image: {error}") from error
        if size is not None and tuple(images[-1].shape[1:]) != tuple(size):
            images[-1] = resize(images[-1], list(size), antialias=True).clamp(0, 1)
        if images[-1].shape != images[0].shape:
            raise InvalidInputError(
                f"{str(file)!r} has shape {tuple(images[-1].shape)}, {str(files[0])!r} has "
                f"{tuple(images[0].shape)}; images attacked together must have one size"
            )
    return files, torch.stack(images)
