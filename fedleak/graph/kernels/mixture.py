"""A mixture of images, told apart by the exact zeros of ReLU.

``Y = A X`` with the images' entries after a ReLU in the rows of ``X`` (non-negative, many of
them exactly zero) and an unknown invertible ``A`` (B, B). A direction ``v`` that gives one
image, ``v^T A`` a multiple of a unit vector, cancels every column of ``Y`` where that image
is zero, and gives no negative entry.

Directions are sought near the one that gives about the images' mean, which is positive: relative
to it they are ``1 + z . p`` with a point ``p`` for each column, and an image is a hyperplane that
a large share of all points lie on, and none beyond. From the mean in random directions to the
border of the cloud, then by reweighted least squares, ever narrower, this finds every one of 2 to
32 images of a ResNet's last stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.graph.kernels.refusal import Refused

#: An entry below this share of the length of its column is a zero.
TOLERANCE = 1e-4
#: A direction that cancels fewer of the entries than this gives no image, as far as we can tell.
LEAST = 0.02
#: Columns below this share of the root mean square, or of the mean, are as good as dead.
_SMALL = 0.02
#: A direction whose zeros are to this share another's is a combination of that with others.
_WITHIN = 0.95
#: Starts in a round, rounds at most, and columns that the descent looks at.
_STARTS, _ROUNDS, _COLUMNS = 48, 12, 6000


@dataclass(frozen=True, eq=False)
class Unmixed:
    """Images of a batch, in an arbitrary order.

    Attributes
    ----------
    images : Tensor, float64, shape (B, ...)
        Each up to a positive number: of unit mean square.
    mixing : Tensor, shape (B, B)
        ``images = mixing @ mixed``. What is mixed inversely goes with :meth:`cotangents`.
    zeros : Tensor, shape (B,)
        Share of the entries that are not dead in all images which each direction cancels:
        the certificate. A direction that gives no image cancels about one in ten thousand.
    negative : float
        Greatest negative entry over the root mean square.
    error : float
        Estimate of the relative error of the images that the mixing leaves, of the worst one;
        beside that of the mixed entries.
    """

    images: Tensor
    mixing: Tensor
    zeros: Tensor
    negative: float
    error: float

    def cotangents(self, mixed: Tensor) -> Tensor:
        """Return what belongs to each image of derivatives that are mixed inversely, (B, ...)."""
        return torch.linalg.solve(self.mixing.mT, mixed.flatten(1)).reshape(mixed.shape)


def unmix(mixed: Tensor, tolerance: float = TOLERANCE, seed: int = 0) -> Unmixed:
    """Tell the images of a mixture apart.

    Parameters
    ----------
    mixed : Tensor, shape (B, ...)
        An invertible mixture of images after a ReLU, the same for all entries; zero where no
        entry was seen.
    tolerance : float
        What counts as zero, relative to the column's length: a hundred times the entries' error
        at least, as small columns and near images make that grow.
    seed : int
        Of the directions that are tried.

    Raises
    ------
    Refused
        Fewer than B directions cancel a share of the entries and give non-negative images.
    """
    if mixed.dim() < 2 or not len(mixed) or not bool(torch.isfinite(mixed).all()):
        raise InvalidInputError(
            f"a mixture of shape {tuple(mixed.shape)}: finite entries (images, ...) are needed"
        )
    flat = mixed.double().flatten(1)
    q, r = torch.linalg.qr(flat.mT)
    size = r.diagonal().abs()
    if bool(size.min() <= 1e-9 * size.max()):
        raise Refused("mixture: its images are linearly dependent")
    white = q.mT * flat.shape[1] ** 0.5
    columns = white[:, white.norm(dim=0) > _SMALL * len(white) ** 0.5]
    directions, zeros, error = _directions(columns, tolerance, seed)
    images = directions @ white
    scale = images.square().mean(1, keepdim=True).sqrt()
    mixing = directions @ torch.linalg.inv(r.mT) * flat.shape[1] ** 0.5 / scale
    images = images / scale
    return Unmixed(
        images.reshape(mixed.shape), mixing, zeros, max(0.0, -float(images.min())), error
    )


def _directions(columns: Tensor, tolerance: float, seed: int) -> tuple[Tensor, Tensor, float]:
    """Return the directions (B, B) that give one image each, their zeros' share, their error."""
    images = len(columns)
    if images == 1:
        values = columns[0] * columns.sum().sign()
        _check_sign(values, tolerance)
        share = (columns[0].abs() < tolerance).double().mean()
        return columns.sum().sign().reshape(1, 1), share.reshape(1), 0.0
    unit = columns / columns.norm(dim=0)
    generator = torch.Generator().manual_seed(seed)
    slice_ = _Slice(columns)
    chosen: list[tuple[Tensor, Tensor, float]] = []
    for _ in range(_ROUNDS):
        candidates = slice_.descend(_STARTS, tolerance, generator)
        counts = _zeros(candidates, unit, tolerance).sum(1)
        for index in counts.argsort(descending=True, stable=True).tolist():
            if counts[index] < LEAST * unit.shape[1]:
                break
            if _is_combination(_zeros(candidates[index], unit, tolerance), chosen):
                continue
            refined = _refine(candidates[index], unit, tolerance)
            if refined is not None and not _is_combination(refined[1], chosen):
                chosen.append(refined)
        if len(chosen) >= images:
            break
    if len(chosen) != images:
        raise Refused(
            f"mixture: {len(chosen)} directions cancel at least {LEAST:.0%} of the entries and "
            f"give no negative ones; {images} images are in it"
        )
    directions = torch.stack([v for v, _, _ in chosen])
    zeros = torch.stack([z.double().mean() for _, z, _ in chosen])
    # What a direction is off weighs the more, the nearer the others are.
    return directions, zeros, max(e for *_, e in chosen) * float(torch.linalg.cond(directions))


class _Slice:
    """Directions with one and the same value on the mean column, in whitened coordinates."""

    def __init__(self, columns: Tensor):
        step = max(1, columns.shape[1] // _COLUMNS)
        part = columns[:, ::step]
        mean = columns.mean(1)
        self.centre = mean / mean.square().sum()
        self.basis = torch.linalg.svd(mean[:, None]).U[:, 1:]  # (B, B - 1)
        value = self.centre @ part
        whole = value > _SMALL * value.abs().mean()
        points = (self.basis.mT @ part)[:, whole] / value[whole]
        factor = torch.linalg.cholesky(points @ points.mT / points.shape[1])
        self.points = torch.linalg.solve_triangular(factor, points, upper=False)
        self.basis = torch.linalg.solve_triangular(factor, self.basis.mT, upper=False).mT

    def descend(self, starts: int, tolerance: float, generator: torch.Generator) -> Tensor:
        """Return directions, (starts, B), on which as many points lie as near them do."""
        p = self.points
        z = torch.randn(starts, len(p), generator=generator, dtype=torch.float64).to(p)
        z = z / torch.quantile(-(z @ p), 0.99, dim=1, keepdim=True).clamp_min(1e-12)
        width = 0.5
        while width > tolerance:
            for _ in range(2):
                weight = 1 / ((1 + z @ p).square() + width**2)
                gram = torch.stack([(p * w) @ p.mT for w in weight])
                z = -torch.linalg.solve(gram, (weight @ p.mT).unsqueeze(2))[:, :, 0]
            width /= 2
        v = self.centre + z @ self.basis.mT
        return v / v.norm(dim=1, keepdim=True)


def _zeros(directions: Tensor, columns: Tensor, tolerance: float) -> Tensor:
    return (directions @ columns).abs() < tolerance


def _refine(
    direction: Tensor, columns: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, float] | None:
    """Return the direction that best cancels its zeros, those, and its error; if of one sign."""
    width = tolerance
    for _ in range(6):
        zero = _zeros(direction, columns, width)
        direction = torch.linalg.svd(columns[:, zero], full_matrices=False).U[:, -1]
        # As narrow as the zeros are: what is small by chance is none of them.
        off = float((direction @ columns[:, zero]).abs().median())
        width = min(tolerance, 30 * off + 1e-13)
    zero = _zeros(direction, columns, width)
    values = direction @ columns
    if float(values.sum()) < 0:
        direction, values = -direction, -values
    s = torch.linalg.svdvals(columns[:, zero])
    wrong = int((values < -max(tolerance, 30 * off)).sum())
    if len(s) < len(columns) or wrong > 1e-3 * len(values):
        return None
    return direction, zero, float(s[-1] / s[-2].clamp_min(1e-300)) / int(zero.sum()) ** 0.5


def _is_combination(zero: Tensor, chosen: list[tuple[Tensor, Tensor, float]]) -> bool:
    """Whether nearly all zeros are another's: so they are of its sums with other images."""
    return any(int((zero & z).sum()) > _WITHIN * int(zero.sum()) for _, z, _ in chosen)


def _check_sign(values: Tensor, tolerance: float) -> None:
    if int((values < -tolerance).sum()) > 1e-3 * len(values):
        raise Refused("mixture: the one image is of both signs, so no ReLU made it")
