"""Gaussian noise on the update."""

from __future__ import annotations

import torch

from fedleak.defences.base import DEFENCES, Defence, Update


def gaussian_noise(update: Update, strength: float, generator: torch.Generator) -> Update:
    """Add normal noise to every entry.

    Parameters
    ----------
    update : dict of str to Tensor
    strength : float
        Standard deviation of the noise relative to the root mean square of the entry's
        own tensor: 0.1 is noise at a tenth of the signal, at every layer alike.
    generator : torch.Generator

    Notes
    -----
    Noise in proportion to the signal is how the gradient-inversion literature reports it;
    it carries no differential-privacy guarantee.
    """
    noisy = {}
    for name, value in update.items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        size = value.double().square().mean().sqrt() if value.numel() else 0.0
        noisy[name] = (value.double() + strength * size * noise).to(value.dtype)
    return noisy


DEFENCES.register("noise")(
    Defence(gaussian_noise, "standard deviation relative to each tensor's root mean square")
)
