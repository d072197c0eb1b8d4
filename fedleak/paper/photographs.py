"""Photographs that need no download: those that scikit-learn and scikit-image carry along."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak.errors import InvalidInputError

#: (name, photograph, top, left, side): square crops, in parts of the photograph's shorter
#: side. The order puts different photographs first, as the first few are used the most.
CROPS: tuple[tuple[str, str, float, float, float], ...] = (
    ("cat", "chelsea", 0.0, 0.2, 0.95),
    ("coffee", "coffee", 0.0, 0.25, 1.0),
    ("astronaut", "astronaut", 0.0, 0.15, 0.6),
    ("temple", "china", 0.0, 0.0, 1.0),
    ("flower", "flower", 0.0, 0.4, 1.0),
    ("motorcycle", "stereo_motorcycle", 0.05, 0.25, 0.95),
    ("rocket", "rocket", 0.0, 0.25, 1.0),
    ("galaxies", "hubble_deep_field", 0.25, 0.3, 0.4),
    ("retina", "retina", 0.0, 0.0, 1.0),
    ("tissue", "immunohistochemistry", 0.2, 0.2, 0.5),
    ("lake", "china", 0.1, 0.8, 0.6),
    ("petals", "flower", 0.2, 0.6, 0.5),
    ("suit", "astronaut", 0.45, 0.3, 0.55),
    ("eyes", "chelsea", 0.15, 0.45, 0.45),
    ("engine", "stereo_motorcycle", 0.4, 0.5, 0.5),
    ("cup", "coffee", 0.15, 0.4, 0.55),
)


def photographs(limit: int = 0, size: int = 32) -> tuple[list[str], Tensor]:
    """Return crops of photographs that are installed along with fedleak's dependencies.

    No network is used: scikit-learn ships ``china`` and ``flower``, and of scikit-image's
    pictures only those are taken that lie in its package. Crops are averaged down and
    rounded to 8 bit, as any image file would have them. Always the same, in one order.

    Parameters
    ----------
    limit : int
        Return the first crops only; 0 for all sixteen.
    size : int
        Height and width, in pixels.

    Returns
    -------
    names : list of str
    images : Tensor, float32, shape (N, 3, size, size), in [0, 1]

    Raises
    ------
    InvalidInputError
        If more are asked for than there are.
    """
    if not 0 <= limit <= len(CROPS):
        raise InvalidInputError(
            f"there are {len(CROPS)} photographs, not {limit}; give --images for more"
        )
    chosen = CROPS[: limit or None]
    images = []
    for _, source, top, left, side in chosen:
        photo = _photo(source)
        short = min(photo.shape[1:])
        y, x, edge = round(top * short), round(left * short), round(side * short)
        crop = photo[:, y : y + edge, x : x + edge]
        images.append(F.interpolate(crop[None], (size, size), mode="area")[0])
    return [c[0] for c in chosen], (torch.stack(images) * 255).round() / 255


@lru_cache(maxsize=16)
def _photo(source: str) -> Tensor:
    """Return one photograph, shape (3, H, W)."""
    if source in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(f"{source}.jpg")
    else:
        from skimage import data

        pixels = getattr(data, source)()
        pixels = pixels[0] if isinstance(pixels, tuple) else pixels  # a stereo pair
    return torch.tensor(pixels).permute(2, 0, 1).float() / 255
