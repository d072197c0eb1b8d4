"""How close a reconstruction comes to the truth: PSNR, SSIM, MSE.

Scoring owns the truth; nothing in :mod:`fedleak.attacks` may import this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from skimage.metrics import structural_similarity
from torch import Tensor

#: Mean squared error, of a peak of 1, that is rounding of the fit of brightness and contrast.
_ROUNDING = 1e-20


@dataclass(frozen=True)
class Quality:
    """Scores of one reconstructed image.

    Attributes
    ----------
    psnr_db : float
        Peak signal-to-noise ratio, infinite where the images are equal.
    ssim : float
        Structural similarity; NaN where the images are too small for it.
    mse : float
        Mean squared error.
    psnr_fitted_db : float
        PSNR after the best brightness and contrast of each channel, which tell nobody what is
        to be seen, and which normalisation layers may leave open; never below ``psnr_db``.
    """

    psnr_db: float
    ssim: float
    mse: float
    psnr_fitted_db: float = math.nan


def score(reconstruction: Tensor, truth: Tensor, data_range: float = 1.0) -> Quality:
    """Compare one image with the truth.

    Parameters
    ----------
    reconstruction, truth : Tensor, shape (C, H, W)
        Images with values in ``[0, data_range]``. The reconstruction is clamped to
        that range first: a pixel cannot be brighter than white.
    data_range : float
        The largest possible difference of two pixels; the peak of the PSNR. The
        published code uses peak 255 on images in [0, 1], which adds 48.13 dB.

    Returns
    -------
    Quality
        PSNR in dB (infinite when equal), SSIM, the mean squared error, and the PSNR after the
        best brightness and contrast of each channel.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if reconstruction.shape != truth.shape:
        raise ValueError(
            f"reconstruction {tuple(reconstruction.shape)} and truth "
            f"{tuple(truth.shape)} differ in shape"
        )
    x = reconstruction.detach().double().cpu().clamp(0.0, data_range)
    y = truth.detach().double().cpu()
    mse = torch.mean((x - y) ** 2).item()
    psnr = math.inf if mse == 0 else 10 * math.log10(data_range**2 / mse)
    # The usual window is 7 pixels; smaller images take the largest odd one that fits.
    window = min(7, (min(y.shape[-2:]) - 1) // 2 * 2 + 1)
    if window < 3:
        ssim = math.nan
    else:
        ssim = float(
            structural_similarity(
                x.numpy(), y.numpy(), data_range=data_range, channel_axis=0, win_size=window
            )
        )
    off = torch.mean((_fitted(reconstruction, y, data_range) - y) ** 2).item()
    fitted = math.inf if off < _ROUNDING * data_range**2 else 10 * math.log10(data_range**2 / off)
    return Quality(psnr, ssim, mse, max(psnr, fitted))


def _fitted(reconstruction: Tensor, truth: Tensor, data_range: float) -> Tensor:
    """Return ``a x + b`` nearest to the truth, ``a >= 0`` and ``b`` of each channel, clamped."""
    x = reconstruction.detach().double().cpu().flatten(1)
    y = truth.flatten(1)
    centre = x.mean(1, keepdim=True)
    x, of_y = x - centre, y.mean(1, keepdim=True)
    a = (x * (y - of_y)).sum(1, keepdim=True) / x.square().sum(1, keepdim=True).clamp_min(1e-300)
    return (a.clamp_min(0) * x + of_y).clamp(0.0, data_range).reshape(truth.shape)


@dataclass(frozen=True, eq=False)
class Scored:
    """A true image of a batch, and what an attack made of it.

    Attributes
    ----------
    image : Tensor, shape (C, H, W), or None
        The reconstruction that was matched with it; None where there is none.
    quality : Quality or None
    label, label_inferred : int or None
    place : int or None
        Its place among the reconstructions.
    """

    image: Tensor | None
    quality: Quality | None
    label: int
    label_inferred: int | None
    place: int | None


def score_batch(
    images: Tensor | None, labels: Tensor | None, truth: Tensor, truth_labels: Tensor
) -> list[Scored]:
    """Match reconstructions, which come back in any order, with the truth; score each.

    Parameters
    ----------
    images : Tensor, shape (R, C, H, W), or None
        None where the attack failed.
    labels : Tensor, shape (R,), or None
    truth : Tensor, shape (T, C, H, W)
    truth_labels : Tensor, shape (T,)

    Returns
    -------
    list of Scored
        One for each true image, in order.
    """
    pairs: dict[int, int] = {}
    if images is not None:
        pairs = {true: made for made, true in pair(images, truth)}
    out = []
    for place, (true, label) in enumerate(zip(truth, truth_labels.tolist(), strict=True)):
        if images is None or labels is None or place not in pairs:
            out.append(Scored(None, None, int(label), None, None))
            continue
        found = pairs[place]
        quality = score(images[found], true)
        out.append(Scored(images[found], quality, int(label), int(labels[found]), found))
    return out


def decibels_between(images: Tensor, truth: Tensor) -> Tensor:
    """Return the PSNR in dB of every image with every true one, at most 160.

    Parameters
    ----------
    images : Tensor, shape (R, C, H, W)
        Clamped to [0, 1] first.
    truth : Tensor, shape (T, C, H, W)

    Returns
    -------
    Tensor, shape (R, T)
    """
    a = images.detach().double().cpu().clamp(0, 1).flatten(1)
    b = truth.detach().double().cpu().flatten(1)
    rows = [(b - one).square().mean(1) for one in a]  # exact, where a product would round
    return -10 * torch.stack(rows).clamp_min(1e-16).log10()


def pair(reconstructions: Tensor, truth: Tensor) -> list[tuple[int, int]]:
    """Pair reconstructions with true images so that the total squared error is least.

    A batch comes back in any order; this is the Hungarian method.

    Parameters
    ----------
    reconstructions : Tensor, shape (R, C, H, W)
    truth : Tensor, shape (T, C, H, W)

    Returns
    -------
    list of (int, int)
        ``min(R, T)`` pairs (reconstruction, true image).
    """
    a = reconstructions.detach().double().cpu().clamp(0, 1).flatten(1)
    b = truth.detach().double().cpu().flatten(1)
    cost = torch.cdist(a, b).square().nan_to_num(1e12)  # an image that diverged fits worst
    rows, columns = linear_sum_assignment(cost.numpy())
    return [(int(r), int(c)) for r, c in zip(rows, columns, strict=True)]
