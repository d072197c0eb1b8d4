"""Image files as tensors: the one reader of them. What it cannot read rightly it refuses.

Pillow decodes, within a bound on pixels that is checked before any is decoded.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedleak import files
from fedleak.errors import DataUnavailableError, InvalidInputError
from fedleak.events import warn

#: Endings of files that are read as images, and what Pillow calls these formats.
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
#: Pixels of one image, and of all images that are held at once (4 bytes for each channel).
MAX_PIXELS, MAX_TOGETHER = 1 << 26, 1 << 30
_SIXTEEN = 65535.0
#: Of modes of Pillow: 8 bits a channel, which it converts among themselves rightly.
_EIGHT = {"1", "L", "P", "RGB", "CMYK", "YCbCr"}
_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
#: Numbers of TIFF tags.
_BITS, _PHOTOMETRIC, _SAMPLES = 258, 262, 339


def read_images(
    paths: Sequence[Path], channels: int = 3, limit: int = 0, size: Sequence[int] | None = None
) -> tuple[list[Path], Tensor]:
    """Read image files and folders of them.

    Parameters
    ----------
    paths : sequence of Path
        Files, or folders searched to any depth. What cannot be read in a folder is named in a
        warning and left out.
    channels : int
        1 for grey, 3 for colour.
    limit : int
        Read at most this many; 0 for all.
    size : (int, int), optional
        Height and width to scale every image to; without it all must be of one size.

    Returns
    -------
    files : list of Path
    images : Tensor, float32, shape (N, C, H, W), in [0, 1]

    Raises
    ------
    DataUnavailableError, InvalidInputError
        If a path is missing, nothing is an image, a file that was named cannot be read, sizes
        differ, or it is more than fits (:data:`MAX_TOGETHER`).
    """
    found: list[Path] = []
    images: list[Tensor] = []
    first_error: InvalidInputError | None = None
    left_out = 0
    for file, named in _listed(paths):
        if limit and len(images) >= limit:
            break
        try:
            image = read_image(file, channels, size)
        except InvalidInputError as error:
            if named:
                raise
            first_error, left_out = first_error or error, left_out + 1
            warn(f"left out: {error}", file=str(file))
            continue
        if images and image.shape != images[0].shape:
            raise InvalidInputError(
                f"{str(file)!r} has shape {tuple(image.shape)}, {str(found[0])!r} has "
                f"{tuple(images[0].shape)}; images attacked together must have one size"
            )
        if (len(images) + 1) * image.numel() > MAX_TOGETHER:
            raise InvalidInputError(
                f"the images in {_names(paths)} are more than {MAX_TOGETHER} values of "
                f"pixels together; read fewer (--limit), or smaller ones"
            )
        found.append(file)
        images.append(image)
    if first_error is not None and not images:
        more = f" (and {left_out - 1} more)" if left_out > 1 else ""
        raise InvalidInputError(f"{first_error}{more}") from first_error
    if not images:
        raise DataUnavailableError(
            f"no images in {_names(paths)}; known types: {', '.join(sorted(SUFFIXES))}"
        )
    return found, torch.stack(images)


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _listed(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield the files, and whether each was named itself."""
    for path in paths:
        if path.is_dir():
            for file in image_files(path):
                yield file, False
        elif path.exists():
            yield path, True
        else:
            raise DataUnavailableError(f"there is no image file or folder {str(path)!r}")


def image_files(folder: Path) -> list[Path]:
    """Return what is named as an image in a folder, at any depth, in order of the path's parts.

    Links are followed; a folder that is reached twice is searched once.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(where) / n for n in names if Path(n).suffix.lower() in SUFFIXES]
    return sorted(found)


def read_image(path: Path, channels: int = 3, size: Sequence[int] | None = None) -> Tensor:
    """Read one image file.

    8 bits a channel, 16 bits of grey, and floating point in [0, 1] are read; palettes and CMYK are
    converted, the rotation that a camera noted is applied, and of several pages or frames the first
    is read. Refused by name: transparency (what lies behind is not known), 16 bits of colour,
    which Pillow would cut to 8, and everything else.

    Parameters
    ----------
    path : Path
    channels : int
        1 for grey, 3 for colour.
    size : (int, int), optional
        Height and width to scale it to.

    Returns
    -------
    Tensor, float32, shape (C, H, W), in [0, 1]

    Raises
    ------
    InvalidInputError
        If it cannot be read, or is larger than :data:`MAX_PIXELS`; the file is named.
    """
    from PIL import Image

    if channels not in (1, 3):
        raise InvalidInputError(f"an image file has 1 or 3 channels, not {channels}")
    try:
        content = files.read_bytes(path, files.IMAGE)
        with warnings.catch_warnings():
            # Pillow only warns of what is larger than its own bound; ours refuses it.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
                found = _upright(opened, str(path))
                image = to_tensor(found, channels)
    except InvalidInputError as error:
        raise InvalidInputError(f"{str(path)!r} cannot be read as an image: {error}") from error
    except Exception as error:  # of a damaged file, decoders raise anything
        why = {
            "UnidentifiedImageError": "it is of no known type",
            "DecompressionBombError": f"it has more than the {MAX_PIXELS} pixels that are read",
        }.get(type(error).__name__, str(error) or type(error).__name__)
        raise InvalidInputError(f"{str(path)!r} cannot be read as an image: {why}") from error
    return scale(image, size)


def scale(image: Tensor, size: Sequence[int] | None) -> Tensor:
    """Return an image, shape (C, H, W), at another height and width."""
    if size is None or tuple(image.shape[1:]) == tuple(size):
        return image
    from torchvision.transforms.functional import resize

    return resize(image, list(size), antialias=True).clamp(0, 1)


def to_tensor(image: Any, channels: int = 0) -> Tensor:
    """Return an image of Pillow as numbers in [0, 1].

    Parameters
    ----------
    image : PIL.Image.Image
    channels : int
        1 for grey, 3 for colour; 0: grey stays grey, all else becomes colour.

    Returns
    -------
    Tensor, float32, shape (C, H, W)

    Raises
    ------
    InvalidInputError
        If it has a meaning that is not known here.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        made = _wide(image).unsqueeze(0).repeat(channels or 1, 1, 1)
    else:
        image = _opaque(image)
        channels = channels or (1 if image.mode in ("1", "L") else 3)
        eight = np.array(image.convert("L" if channels == 1 else "RGB"))
        made = torch.from_numpy(eight).float() / 255
        made = made.unsqueeze(0) if channels == 1 else made.permute(2, 0, 1).contiguous()
    return check(made, made.shape[0])


def on_grid(images: Tensor, levels: int = 255) -> tuple[Tensor, Tensor]:
    """Round images to the grid of 8-bit pixels.

    Parameters
    ----------
    images : Tensor, shape (..., C, H, W)
        In [0, 1].
    levels : int
        Of the grid, without zero.

    Returns
    -------
    rounded : Tensor
    off : Tensor, shape (...)
        How far the images are off, in steps of the grid, root mean square: images that have
        nothing to do with it are at 0.29.
    """
    rounded = (images * levels).round() / levels
    return rounded, (images - rounded).flatten(-3).square().mean(-1).sqrt() * levels


def check(image: Tensor, channels: int) -> Tensor:
    """Return an image if it is one: shape (C, H, W), values in [0, 1].

    Raises
    ------
    InvalidInputError
        If it is not.
    """
    if image.ndim != 3 or image.shape[0] != channels or not image.numel():
        raise InvalidInputError(f"it has shape {tuple(image.shape)}, not ({channels}, H, W)")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # also of NaN
        raise InvalidInputError(f"its values are {low:g} ... {high:g}, not in [0, 1]")
    return image


def _upright(image: Any, where: str) -> Any:
    """Check what the head of a file says, decode it, and turn it as the camera was held."""
    from PIL import ImageOps

    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InvalidInputError(
            f"it has {width}x{height} pixels, more than the {MAX_PIXELS} that are read"
        )
    # A camera's JPEG with a second picture in it is an MPO: the first is what is shown.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        warn(f"{where}: of several frames or pages the first is read", file=where)
        image.seek(0)
    raw = " ".join(str(tile[3]) for tile in image.tile)
    bits = max(_tag(image, _BITS) or (8,))
    grey16 = image.mode.startswith("I;16") and bits in (8, 16)  # 8: not TIFF, says nothing of it
    deep = ";16" in raw or ";12" in raw or bits > 8
    wide = grey16 or image.mode in ("I", "F")
    if deep and not wide and image.format in ("PNG", "TIFF"):
        raise InvalidInputError(
            f"it has more than 8 bits a channel ({image.mode}, {raw}), of which Pillow keeps 8; "
            "convert it to 8 bits, or to 16 bits of grey"
        )
    if grey16 and _tag(image, _PHOTOMETRIC) == (0,):
        raise InvalidInputError("it has 16 bits in which 0 is white; convert it to 8 bits")
    image.load()
    return ImageOps.exif_transpose(image)


def _tag(image: Any, number: int) -> tuple[int, ...]:
    """Return a tag of a TIFF."""
    value = getattr(image, "tag_v2", {}).get(number, ())
    return value if isinstance(value, tuple) else (value,)


def _wide(image: Any) -> Tensor:
    """Return grey of more than 8 bits, in [0, 1]."""
    if "transparency" in image.info:
        raise InvalidInputError("a grey value of it stands for transparent; flatten it")
    if image.mode.startswith("I;16"):
        return torch.from_numpy(np.array(image).astype(np.float32) / np.float32(_SIXTEEN))
    values = torch.from_numpy(np.array(image).astype(np.float32))
    if image.mode == "F" and float(values.min()) >= 0 and float(values.max()) <= 1:
        return values
    raise InvalidInputError(
        f"its numbers are {float(values.min()):g} ... {float(values.max()):g}, and it is not known "
        "which of them is white; convert it to 8 bits"
    )


def _opaque(image: Any) -> Any:
    """Return an image without alpha; refuse one in which something is transparent."""
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        lowest, _ = image.getchannel("A").getextrema()
        if lowest < 255:
            raise InvalidInputError(
                "parts of it are transparent, and what lies behind them is not known; flatten it "
                "onto a background"
            )
        return image.convert("RGB")
    if image.mode not in _EIGHT:
        raise InvalidInputError(f"its pixels are of type {image.mode}; convert it to 8 bits")
    return image


def png(image: np.ndarray) -> bytes:
    """Return an image, shape (C, H, W) with values in [0, 1], as a PNG; beyond that it is cut."""
    from PIL import Image

    kept = np.clip(np.nan_to_num(image, nan=0.5, posinf=1.0, neginf=0.0), 0, 1)
    eight = np.round(kept * 255).astype(np.uint8)
    made = Image.fromarray(eight[0] if len(eight) == 1 else np.moveaxis(eight, 0, -1))
    stream = io.BytesIO()
    made.save(stream, "PNG", optimize=True)
    return stream.getvalue()
