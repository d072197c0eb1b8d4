"""Images that explain an update, in another unit than pixels: clients that normalise.

Of the same update ``x`` and ``(x - mean) / std`` are equally right, so nothing but the pixels
themselves tells: they are in [0, 1], in steps of the bits they were stored with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedleak.observation import Observation
from fedleak.wording import EXPLAINED, RECOGNISABLE

if TYPE_CHECKING:  # which is where this is called from
    from fedleak.attacks.base import Reconstruction

#: What tutorials and data sets' papers subtract and divide by: of one channel, of all, of each.
_STANDARD: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...] = (
    ("", (0.5,), (0.5,)),
    ("", (0.5,), (1.0,)),
    ("pixels of 0 to 255", (0.0,), (1 / 255,)),
    ("MNIST", (0.1307,), (0.3081,)),
    ("Fashion-MNIST", (0.2860,), (0.3530,)),
    ("CIFAR-10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ("CIFAR-10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    ("CIFAR-100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ("ImageNet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)
#: Steps of pixels: 8 bits, and the digits of scikit-learn.
_LEVELS = (255, 16)
#: Fit up to which images count as those of the update.
_EXPLAINED = 1e-3
#: How far pixels may be out of [0, 1], and how near black and white must be to say something.
_OUTSIDE, _END = 0.02, 2e-3
#: So far out is no image that explains most of its update, however little determines it.
_FAR = 0.4
#: Root mean square distance from steps, in steps: 0.29 where there are none. Of fewer different
#: values it may be chance.
_ON_STEPS, _VALUES = 0.1, 6


def in_pixels(result: Reconstruction, observation: Observation) -> Reconstruction:
    """Return a reconstruction in pixels, where its images are normalised and one knows how.

    Where they are and no standard normalisation, or more than one, makes pixels of them, the
    images stay and a doubt says so.

    Parameters
    ----------
    result : Reconstruction
    observation : Observation
        What it was made of.
    """
    if not result.images.numel():  # an attack may leave out what it cannot tell
        return result
    low, high = float(result.images.min()), float(result.images.max())
    far = low < -_FAR or high > 1 + _FAR
    exact = result.fit < _EXPLAINED and (low < -_OUTSIDE or high > 1 + _OUTSIDE)
    far |= apart_db(result.images) < RECOGNISABLE
    if not exact and not (far and result.fit < EXPLAINED):
        return result
    client = observation.training
    declared = client is not None and bool(client.mean)
    known = () if declared or not exact else _STANDARD
    fitting = [s for s in known if _are_pixels(result.images, *s[1:])]
    if len(fitting) == 1:
        ((name, mean, std),) = fitting
        says = (
            f"clients normalise: mean {_text(mean)} and std {_text(std)}{name and f' ({name})'} "
            "make pixels of the images that explain the update, which come in [0, 1]"
        )
        details = {**result.details, "notes": [*result.details.get("notes", ()), says]}
        return replace(result, images=_undone(result.images, mean, std), details=details)
    told = _determined(result.details) or far
    if observation.defence is not None:  # what it hides may leave them open, but not by so much
        told = apart_db(result.images) < RECOGNISABLE
    if not told:
        return result  # one of many images that explain the update: it says nothing of clients
    if not (exact and _determined(result.details)):
        what = (
            "of no picture: another unit than declared (mean, std), or the update tells too little"
        )
    elif declared:
        what = "clients normalise otherwise than declared"
    else:
        what = "clients probably normalise; declare mean and std (LocalTraining(mean=, std=))"
    doubt = f"pixels from {low:.3g} to {high:.3g}: {what}"
    return replace(result, doubts=(*result.doubts, doubt))


def apart_db(images: Tensor) -> float:
    """Return the highest PSNR in dB that images can have, each against any picture in [0, 1].

    A pixel is at least as far from the true one as from [0, 1]. The lowest of the images.
    """
    outside = (images - images.clamp(0, 1)).double().square().flatten(1).mean(1)
    return float(-10 * outside.max().clamp_min(1e-300).log10())


def _undone(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    offset, factor = (images.new_tensor(v).reshape(-1, 1, 1) for v in (mean, std))
    return images * factor + offset


def _are_pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
    """Return whether images are in [0, 1] with a mean and std, and on steps or at both ends."""
    if len(mean) not in (1, images.shape[-3]):
        return False
    x = _undone(images, mean, std)
    low, high = float(x.min()), float(x.max())
    if low < -_END or high > 1 + _END:
        return False
    if abs(low) < _END and abs(high - 1) < _END:
        return True
    for levels in _LEVELS:
        steps = (x * levels).round()
        off = float((x * levels - steps).square().mean().sqrt())
        if off < _ON_STEPS and len(torch.unique(steps)) >= _VALUES:
            return True
    return False


def _determined(details: Mapping[str, Any]) -> bool:
    """Return whether the update leaves no other images, as far as the attack says."""
    layers = details.get("layers")
    if layers:  # from the head to the image
        return bool(layers[-1]["rank"] >= layers[-1]["unknowns"])
    if details.get("certified"):
        return not details.get("open")
    return details.get("by") == "linear"  # read off the head


def _text(values: tuple[float, ...]) -> str:
    return "/".join(f"{v:.4g}" for v in values)
