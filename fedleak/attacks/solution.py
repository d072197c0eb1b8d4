"""What the recursion over linear systems found, for all updates and layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedleak.attacks.head.batch import Demixed
from fedleak.systems import Layer
from fedleak.tensors import rms

#: A solvable system of a clean update leaves a residual of a few roundings, below this.
_MISSED = 1.5e-6


@dataclass
class LayerSolution:
    """How the system of one layer was solved, for all updates.

    Attributes
    ----------
    name : str
    unknowns : int
    rank : Tensor, int64, shape (N,)
        Equal to ``unknowns`` if solvable. With ReLU or pooling above it depends on the update.
    exact : bool
        Whether the rank is that of this very system, or a count of its constraints.
    residual : Tensor, shape (N,)
        ``||U x - v|| / ||v||``.
    """

    name: str
    unknowns: int
    rank: Tensor
    exact: bool
    residual: Tensor


@dataclass
class LinearSolution:
    """The result of the recursion, with everything known on the way.

    Attributes
    ----------
    values, cotangents : list of Tensor
        Entry ``i`` is the output of layer ``i - 1``, or the image for 0, and ``dL/d`` of it,
        shape (N * B, *shape): the images of one update after each other.
    deviations : list of Tensor
        Estimated standard deviation of each value.
    noise : Tensor, shape (N,)
        Noise of the update's entries relative to their root mean square, estimated from
        how far the head's gradient is from rank one.
    layers : list of LayerSolution
        In forward order.
    batch : int
        Images B of each update.
    demixed : list of Demixed
        How each batch was told apart at the head; empty for one image.
    """

    values: list[Tensor]
    cotangents: list[Tensor]
    deviations: list[Tensor]
    noise: Tensor
    layers: list[LayerSolution] = field(default_factory=list)
    batch: int = 1
    demixed: list[Demixed] = field(default_factory=list)

    @property
    def image(self) -> Tensor:
        """The images, shape (N, B, C, H, W)."""
        return self.values[0].unflatten(0, (-1, self.batch))

    def relative(self, i: int) -> Tensor:
        """Return the typical deviation of each image's value ``i``, relative to it, (N * B,)."""
        deviation = self.deviations[i].flatten(1)
        known = torch.where(deviation.isinf(), torch.nan, deviation).nanmedian(1).values
        return known.nan_to_num(0.0) / rms(self.values[i]).flatten()

    def noise_below(self, i: int) -> Tensor:
        """Return the noise of the gradient rows below value ``i``, as far as it is trusted, (N,).

        In a batch, those rows mix all images: they are as uncertain as the worst.
        """
        if self.batch == 1:
            return self.noise
        return self.noise.maximum(self.relative(i).reshape(-1, self.batch).amax(1))

    def undetermined(self, layers: Sequence[Layer]) -> int:
        """Return how many of the first layers are left undetermined, in the worst update.

        From the head down, layers are solved exactly until the first rank-deficient one;
        that one and all below it are left, and layers above it whose outputs are known
        better than their inputs (a ReLU's). 0 means that the image itself is known.
        """
        # A system of full rank that its own solution misses was set up from wrong values.
        wrong = (10 * self.noise_below(len(self.values) - 1)).clamp_min(_MISSED)
        deficient = {
            s.name
            for s in self.layers
            if bool((s.rank < s.unknowns).any()) or bool((s.residual > wrong).any())
        }
        depth = max((i + 1 for i, layer in enumerate(layers) if layer.name in deficient), default=0)
        while bool(self.deviations[depth].isinf().any()):
            depth += 1
        return depth

    def subset(self, mask: Tensor) -> LinearSolution:
        """Return the updates of a mask or of indices."""

        def part(values: list[Tensor]) -> list[Tensor]:
            return [v.unflatten(0, (-1, self.batch))[mask].flatten(0, 1) for v in values]

        return LinearSolution(
            part(self.values),
            part(self.cotangents),
            part(self.deviations),
            self.noise[mask],
            [replace(s, rank=s.rank[mask.cpu()], residual=s.residual[mask]) for s in self.layers],
            self.batch,
            [self.demixed[i] for i in torch.arange(len(self.noise))[mask.cpu()] if self.demixed],
        )

    @staticmethod
    def pick(solutions: Sequence[LinearSolution], best: Tensor) -> LinearSolution:
        """Return, for each update, the solution of index ``best``, shape (N,)."""
        layers = [
            replace(
                steps[0],
                rank=pick([s.rank for s in steps], best.cpu()),
                residual=pick([s.residual for s in steps], best),
            )
            for steps in zip(*(s.layers for s in solutions), strict=True)
        ]
        values, cotangents, deviations = (
            [pick(v, best) for v in zip(*lists, strict=True)]
            for lists in (
                [s.values for s in solutions],
                [s.cotangents for s in solutions],
                [s.deviations for s in solutions],
            )
        )
        noise = pick([s.noise for s in solutions], best)
        return LinearSolution(values, cotangents, deviations, noise, layers)


def pick(parts: Sequence[Tensor], best: Tensor) -> Tensor:
    return torch.stack(list(parts))[best, torch.arange(len(best), device=best.device)]
