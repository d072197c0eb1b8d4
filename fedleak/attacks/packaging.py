"""What every attack says of its images: how well they explain the update, and what is doubtful."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedleak.attacks.base import Reconstruction
from fedleak.attacks.contrast import in_range
from fedleak.attacks.evidence import Evidence
from fedleak.images import on_grid

#: Two fits below this are equally good: both are within the rounding of float32.
ROUNDED = 1e-6
#: How near to the 8-bit grid, in steps of it, an image must come to be rounded, root mean
#: square: any image that is not on it is at 0.29.
_ON_GRID = 0.1


def package(
    evidence: Evidence, images: Tensor, details: Sequence[Mapping[str, Any]]
) -> list[Reconstruction]:
    """Return one :class:`Reconstruction` for each update.

    Parameters
    ----------
    evidence : Evidence
    images : Tensor, shape (N, C, H, W) or (N, B, C, H, W)
    details : sequence of mapping
        What the attack says of each.
    """
    if images.dim() == 4:
        images = images.unsqueeze(1)
    images, contrast = in_range(evidence, images)
    fits, factors = evidence.compare(images)
    out = []
    for n, seen in enumerate(evidence.seen):
        factor = seen.factor * float(factors[n])
        said: dict[str, Any] = dict(details[n])
        if factor != 1:
            said["factor"] = factor
        if notes := [*seen.notes, *filter(None, [contrast[n]])]:
            said["notes"] = notes
        out.append(
            Reconstruction(
                images[n].cpu(),
                evidence.labels[n].cpu(),
                float(fits[n]),
                said,
                doubts=seen.doubts,
            )
        )
    return out


def snapped(evidence: Evidence, images: Tensor) -> Tensor:
    """Round images, shape (N, B, C, H, W), that lie on the grid where the gradient agrees.

    Parameters
    ----------
    evidence : Evidence
    images : Tensor
        Those near the grid of 8-bit pixels are rounded to it.
    """
    rounded, off = on_grid(images)
    near = off < _ON_GRID
    if not bool(near.any()):
        return images
    rounded = torch.where(near[..., None, None, None], rounded, images)
    known = evidence.fit(images).maximum(evidence.floor).clamp_min(ROUNDED)
    agrees = evidence.fit(rounded) <= 2 * known
    return torch.where(agrees.reshape(-1, 1, 1, 1, 1), rounded, images)
