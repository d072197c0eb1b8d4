"""Synthetic images with the statistics of natural ones: no data needed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: The image is drawn this many times as large and averaged down, as a lens would.
_OVERSAMPLING = 3


def dead_leaves(
    shape: tuple[int, int, int], count: int = 1500, leaves: int = 50, seed: int = 0
) -> Tensor:
    """Draw dead-leaves images: shapes of every size that cover each other.

    The model of Lee, Mumford & Huang (2001), with super-elliptic leaves, shading and a
    texture of power-law spectrum on each: edges, level areas and occlusion as in photos.

    Parameters
    ----------
    shape : tuple of int
        Shape (C, H, W) of one image.
    count : int
        Number of images.
    leaves : int
        Leaves of each image.
    seed : int

    Returns
    -------
    Tensor, float32, shape (count, C, H, W)
        Values in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [_draw(shape, min(250, count - i), leaves, generator) for i in range(0, count, 250)]
    return torch.cat(parts)


def _draw(shape: tuple[int, int, int], count: int, leaves: int, g: torch.Generator) -> Tensor:
    channels, height, width = shape
    size = (height * _OVERSAMPLING, width * _OVERSAMPLING)
    y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in size), indexing="ij")
    correlation = torch.full((channels, channels), 0.9) + 0.1 * torch.eye(channels)
    mixing = torch.linalg.cholesky(correlation)

    def uniform(*s: int) -> Tensor:
        return torch.rand(*(s or (count, 1, 1)), generator=g)

    def normal(*s: int) -> Tensor:
        return torch.randn(*(s or (count, 1, 1)), generator=g)

    images = torch.zeros(count, channels, *size)
    for i in range(leaves):
        # A background, a few large leaves, then sizes by a power law.
        radius = (0.04**-1.5 + uniform() * (1 - 0.04**-1.5)) ** (-1 / 1.5)
        radius = torch.full_like(radius, 9.0) if i == 0 else radius
        radius = 0.2 + 0.6 * uniform() if 0 < i < 6 else radius
        dx, dy = x - (uniform() * 1.4 - 0.2), y - (uniform() * 1.4 - 0.2)
        angle, stretch, roundness = uniform() * math.pi, (0.5 * normal()).exp(), 1 + 3 * uniform()
        a = (dx * angle.cos() + dy * angle.sin()) / (radius * stretch)
        b = (dy * angle.cos() - dx * angle.sin()) / (radius / stretch)
        inside = (a.abs() ** roundness + b.abs() ** roundness < 1).unsqueeze(1)
        light = angle + math.pi * uniform()
        shade = 0.17 * (0.7 * normal()).exp() * (dx * light.cos() + dy * light.sin())
        texture = (1.2 * normal() - 4.2).exp() * _texture(count, size, g)
        tint = 0.7 + 0.3 * uniform(count, channels, 1, 1)
        colour = (0.5 + 0.26 * normal(count, channels) @ mixing.T)[:, :, None, None]
        images = torch.where(inside, colour + (shade + texture).unsqueeze(1) * tint, images)
    images = F.avg_pool2d(images, _OVERSAMPLING)
    blur = torch.tensor([1.0, 4.0, 1.0]) / 6
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate").flatten(0, 1).unsqueeze(1)
    blurred = F.conv2d(padded, (blur[:, None] * blur)[None, None])
    return blurred.reshape(images.shape).clamp(0, 1)


def _texture(count: int, size: tuple[int, int], g: torch.Generator) -> Tensor:
    """Return fields of unit variance whose amplitude falls with frequency to the 1.5."""
    frequency = torch.hypot(torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1]))
    frequency[0, 0] = 1 / max(size)
    noise = torch.fft.rfft2(torch.randn(count, *size, generator=g)) * frequency**-1.5
    field = torch.fft.irfft2(noise, s=size)
    return field / field.std((1, 2), keepdim=True).clamp_min(1e-12)
