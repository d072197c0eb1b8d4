"""Several rounds as one target: every update under the model that was sent then."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedleak.attacks.targets.base import Target


class RoundsTarget(Target):
    """What images must reproduce of several updates at once.

    The likelihood of independent rounds is their product, so that residuals and errors stand one
    below the other; the images are the same.

    Parameters
    ----------
    parts : sequence of Target
        One for each round, of one update each (``N = 1``).
    members : sequence of sequence of int, optional
        Of each round, which of the images were in it, in the order of its labels; by default all.
    """

    def __init__(self, parts: Sequence[Target], members: Sequence[Sequence[int]] | None = None):
        self.parts = list(parts)
        self.members = [list(m) for m in members] if members is not None else None
        self.values = torch.cat([p.values for p in parts], 1)
        self.errors = torch.cat([p.errors for p in parts], 1)
        self.linear = all(p.linear for p in parts)
        self.calibrated = all(p.calibrated for p in parts)
        self.dense = all(p.dense for p in parts)
        self.rounds = len(self.parts)
        self.hidden = sum(p.hidden for p in parts)

    def made(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        rows, begin = [], 0
        for n, part in enumerate(self.parts):
            own = images if self.members is None else images[:, self.members[n]]
            end = begin + part.hidden
            unknown = None if hidden is None or end == begin else hidden[:, begin:end]
            rows.append(part.made(own, unknown))
            begin = end
        return torch.cat(rows, 1)

    def subset(self, index: Tensor) -> RoundsTarget:
        return RoundsTarget([p.subset(index) for p in self.parts], self.members)
