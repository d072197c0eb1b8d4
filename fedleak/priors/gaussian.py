"""A stationary Gaussian image prior, applied by FFT at any image size."""

from __future__ import annotations

import torch
from torch import Tensor


class GaussianPrior:
    r"""Images as ``x = mean + B u`` with ``u`` standard normal: ``x ~ N(mean, B B^T)``.

    ``B B^T = sigma^2 C kron R`` with colour correlation ``C`` and, between pixels at
    distance ``r``, correlation ``R = rho^r``. ``B`` is never a matrix: ``u`` lives on a
    torus twice the image's size, on which ``R`` is a convolution and its square root a
    product in Fourier space.

    Parameters
    ----------
    shape : tuple of int
        Shape (C, H, W) of one image.
    rho : float
        Correlation of neighbouring pixels, in (0, 1).
    colour : float
        Correlation of two colour channels of a pixel, in [0, 1).
    sigma : float
        Standard deviation of a pixel.
    mean : float
        Mean of a pixel.
    floor : float
        Variance added to every Fourier mode, relative to ``sigma^2``: keeps the finest
        detail possible.
    device : torch.device
        Where the prior computes.

    Notes
    -----
    The defaults need no data; they describe natural images of about 32 pixels.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        rho: float = 0.96,
        colour: float = 0.93,
        sigma: float = 0.25,
        mean: float = 0.5,
        floor: float = 1e-6,
        device: torch.device | str = "cpu",
    ):
        self.shape, self.mean = shape, mean
        channels, height, width = shape
        self.torus = (2 * height, 2 * width)
        grid = [torch.minimum(k := torch.arange(n, dtype=torch.float64), n - k) for n in self.torus]
        distance = torch.hypot(grid[0][:, None], grid[1][None, :])
        # The torus cuts the correlation off at half its size, which can turn a few modes
        # slightly negative: they are set to the floor.
        modes = torch.fft.rfft2(rho**distance).real.clamp_min(0) + floor
        self.modes = modes.sqrt().to(device)
        correlation = torch.full((channels, channels), colour, dtype=torch.float64)
        correlation.fill_diagonal_(1.0)
        values, vectors = torch.linalg.eigh(correlation)
        self.mix = (sigma * (vectors * values.sqrt()) @ vectors.T).to(device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one ``u``."""
        return (self.shape[0], *self.torus)

    def root(self, u: Tensor) -> Tensor:
        """Return ``B u``, shape (N, C, H, W), for ``u``, shape (N, *latent_shape)."""
        return self._colour(self._smooth(u)[..., : self.shape[1], : self.shape[2]])

    def root_adjoint(self, x: Tensor) -> Tensor:
        """Return ``B^T x``, shape (N, *latent_shape)."""
        pad = (0, self.torus[1] - self.shape[2], 0, self.torus[0] - self.shape[1])
        return self._smooth(torch.nn.functional.pad(self._colour(x), pad))

    def image(self, u: Tensor) -> Tensor:
        """Return ``mean + B u``."""
        return self.mean + self.root(u)

    def _smooth(self, u: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(u) * self.modes, s=self.torus)

    def _colour(self, x: Tensor) -> Tensor:
        return torch.einsum("dc,nchw->ndhw", self.mix, x)
