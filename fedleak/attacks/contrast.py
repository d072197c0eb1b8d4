"""Contrast and brightness that normalisation layers take out of the update, put back.

Where a first layer's output is normalised by its own mean and variance (batch normalisation in
training mode, instance or group normalisation), images ``a x + b`` with one brightness ``b`` of
each channel lead to the update of ``x``, but for the small ``eps`` beside the variance. Where
the update is known to its rounding that ``eps`` gives the contrast; elsewhere pixels are made to
fill [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak import deadline
from fedleak.attacks.evidence import Evidence
from fedleak.wording import PARTLY

#: Relative change of an update up to which it does not show the contrast, of which ``eps`` leaves
#: something, and the brightness, of which a border of zeros may.
_SAME, _EXACTLY = 2e-2, 1e-6
#: What is tried: a contrast, a brightness, and powers of two between the steps of the search.
_LESS, _BRIGHTER, _STEP = 0.7, 0.2, 0.5
_POWERS = torch.arange(-4, 12) * _STEP
#: How far the fit must rise beside its minimum for the contrast to be found there: relative, at
#: twice and half of it; and steps of the search between them.
_RISES, _SECTIONS = 1.2, 40
#: Part of the pixels that must be at an end, within this part of the range, to be black or white.
_CUT_OFF, _AT_END = 0.05, 0.01
#: Part of a batch's images that must stay within the range of pixels.
_MOST = 0.75
#: Part of its fit that the new contrast may cost.
_COSTS = 1.1

FOUND = "the contrast is the one that explains the update best"
FILLED = "the contrast is set so that pixels fill [0, 1]"
_OPEN = "normalisation leaves brightness and contrast of the images open"


@dataclass(frozen=True)
class _Open:
    """What an update does not show: of all images alike, and of each image."""

    contrast: bool
    brightness: bool
    each: bool


def in_range(evidence: Evidence, images: Tensor) -> tuple[Tensor, list[str]]:
    """Return images with their contrast and brightness, and what is to be noted of each update.

    Parameters
    ----------
    evidence : Evidence
    images : Tensor, shape (N, B, C, H, W)

    Returns
    -------
    images : Tensor, shape (N, B, C, H, W)
    notes : list of str
        Empty where the update shows the contrast.
    """
    notes = [""] * len(images)
    if not _normalises(evidence) or evidence.signs:
        return images, notes
    before = evidence.fit(images)
    wanted = before < PARTLY
    if not bool(wanted.any()):
        return images, notes
    shown = _open(evidence)
    if not shown.contrast:
        return images, notes
    made, found = _with_contrast(evidence, images, shown)
    if shown.brightness:
        made = _with_brightness(made, shown.each)
    better = wanted & (evidence.fit(made) <= _COSTS * before + 1e-9)
    for n in better.nonzero().flatten().tolist():
        notes[n] = f"{_OPEN}: {FOUND if bool(found[n]) else FILLED}"
    return torch.where(better.reshape(-1, 1, 1, 1, 1), made, images), notes


def _normalises(evidence: Evidence) -> bool:
    """Return whether the model has a layer by whose name it may normalise: else it is not asked."""
    return any("norm" in type(m).__name__.lower() for m in evidence.model.modules())


def _open(evidence: Evidence) -> _Open:
    """Ask the model with random images what their update does not show."""
    replay, batch = evidence.replay, evidence.num_images
    generator = torch.Generator().manual_seed(0)
    shape = (1, batch, *replay.input_shape)
    x = torch.rand(shape, generator=generator, dtype=torch.float64).to(replay.device)
    y = torch.randint(replay.classes, shape[:2], generator=generator).to(replay.device)

    def same(other: Tensor, within: float = _SAME) -> bool:
        with torch.no_grad():
            made = replay(other, y).gradients
        return _distance(made, plain) < within

    with torch.no_grad():
        plain = replay(x, y).gradients
    if not same(_LESS * x):
        return _Open(False, False, False)
    first = torch.zeros(batch, 1, 1, 1, dtype=torch.bool, device=x.device)
    first[0] = True
    return _Open(
        True, same(x + _BRIGHTER, _EXACTLY), batch == 1 or same(torch.where(first, _LESS * x, x))
    )


def _distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    miss = sum(float((one[k] - g).square().sum()) for k, g in two.items())
    return (miss / max(sum(float(g.square().sum()) for g in two.values()), 1e-300)) ** 0.5


def _with_contrast(evidence: Evidence, images: Tensor, shown: _Open) -> tuple[Tensor, Tensor]:
    """Return images with the contrast that explains the update best, else with that of pixels.

    Also whether it was found, shape (N,).
    """
    low, high = _ends(images, shown.each)
    if not shown.brightness:  # else only differences within a channel say something
        low = torch.zeros_like(low)
    filled = images / (high - low).amax(2, keepdim=True).clamp_min(1e-6)
    factor, found = _search(lambda a: evidence.fit(a.reshape(-1, 1, 1, 1, 1) * filled), filled)
    return factor.reshape(-1, 1, 1, 1, 1) * filled, found


def _search(fit: Callable[[Tensor], Tensor], filled: Tensor) -> tuple[Tensor, Tensor]:
    """Return by what to multiply each update's images, and whether its fit says so, (N,)."""
    one = filled.new_ones(len(filled))
    powers = _POWERS.to(filled) - _POWERS.to(filled)[-1] / 2
    fits = torch.stack([fit(one * 2**p) for p in powers])
    best = fits.argmin(0).clamp(1, len(powers) - 2)
    low, high = 2 ** powers[best - 1], 2 ** powers[best + 1]
    ratio = (5**0.5 - 1) / 2
    for _ in range(_SECTIONS):
        if deadline.passed():
            break
        span = high / low
        left, right = low * span ** (1 - ratio), low * span**ratio
        down = fit(left) < fit(right)
        low, high = torch.where(down, low, left), torch.where(down, right, high)
    factor = (low * high).sqrt()
    least = fit(factor) * _RISES
    found = (fit(2 * factor) > least) & (fit(factor / 2) > least)
    return torch.where(found, factor, one), found


def _with_brightness(images: Tensor, each: bool) -> Tensor:
    """Return images whose channels lie in [0, 1]: from black or up to white, or in the middle."""
    low, high = _ends(images, each)
    dims = (3, 4) if each else (1, 3, 4)
    span = _AT_END * (high - low)
    black = (images < low + span).double().mean(dims, keepdim=True) > _CUT_OFF
    white = (images > high - span).double().mean(dims, keepdim=True) > _CUT_OFF
    middle = (1 - high - low) / 2
    shift = torch.where(black, -low, torch.where(white, 1 - high, middle))
    return images + shift


def _ends(images: Tensor, each: bool) -> tuple[Tensor, Tensor]:
    """Return the darkest and the lightest of each channel, of each image or of nearly all."""
    low, high = images.amin((3, 4), keepdim=True), images.amax((3, 4), keepdim=True)
    if each:
        return low, high
    # Not of all: one image that is badly reconstructed has the extremes.
    low = low.quantile(1 - _MOST, 1, keepdim=True, interpolation="higher")
    return low, high.quantile(_MOST, 1, keepdim=True, interpolation="lower")
