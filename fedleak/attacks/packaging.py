"""What every attack says of its images: how well they explain the update, and what is doubtful."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedleak.attacks.base import Reconstruction
from fedleak.attacks.contrast import in_range
from fedleak.attacks.evidence import Evidence


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
