"""Gaussian image priors: stationary and data-free, or learned from public images."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.priors.base import PRIORS, Prior, demand_public
from fedleak.solvers.gaussian import Gaussian, KroneckerGaussian, cholesky

#: A covariance matrix of images with more entries than this is not held in memory.
DENSE_PRIOR = 4096
#: Smoothness (rho, power) and colour correlations between which the evidence decides.
_SHAPES = ((0.98, 1.5), (0.97, 1.0), (0.98, 1.75))
_ROUGH = ((0.9, 1.0), (0.75, 1.0), (0.5, 1.0))
_COLOURS = (0.93, 0.85, 0.975)
#: Public images that count as much as the stationary prior that a learned covariance is
#: shrunk to, and the least weight of the latter: fine detail is learned last.
_SHRINKAGE, _LEAST_SHRINKAGE = 300, 0.1


class GaussianPrior(Prior):
    r"""Images as ``x = mean + B u`` with ``u`` standard normal: ``x ~ N(mean, B B^T)``.

    ``B B^T = sigma^2 C kron R`` with colour correlation ``C`` and, between pixels at
    distance ``r``, correlation ``R = rho^(r^power)``. ``B`` is never a matrix: ``u`` lives
    on a torus twice the image's size, on which ``R`` is a convolution and its square root a
    product in Fourier space.

    Parameters
    ----------
    shape : tuple of int
        Shape (C, H, W) of one image.
    rho : float
        Correlation of neighbouring pixels, in [0, 1).
    power : float
        Smoothness, in (0, 2]: 1 gives edges everywhere, 2 none.
    colour : float
        Correlation of two colour channels of a pixel, in [0, 1).
    sigma : float
        Standard deviation of a pixel.
    mean : float
        Mean of a pixel.
    floor : float
        Variance added to every Fourier mode, relative to ``sigma^2``: keeps the finest
        detail possible.
    adapt : bool
        Whether smoothness and colour may follow the evidence of each update.
    device : torch.device
        Where the prior computes.

    Notes
    -----
    The defaults need no data; they describe natural images of about 32 pixels.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        rho: float = _SHAPES[0][0],
        power: float = _SHAPES[0][1],
        colour: float = _COLOURS[0],
        sigma: float = 0.25,
        mean: float = 0.5,
        floor: float = 1e-6,
        adapt: bool = True,
        device: torch.device | str = "cpu",
    ):
        _check(rho=rho, power=power, colour=colour, sigma=sigma, mean=mean, floor=floor)
        self.shape, self.adapt = shape, adapt
        self._families: dict[int, Sequence[Prior]] = {}
        self.mean = torch.full((1, 1, 1), mean, dtype=torch.float64, device=device)
        self.options = {"sigma": sigma, "mean": mean, "floor": floor, "device": device}
        self.rho, self.power, self.colour = rho, power, colour
        channels, height, width = shape
        self.torus = (2 * height, 2 * width)
        grid = [torch.minimum(k := torch.arange(n, dtype=torch.float64), n - k) for n in self.torus]
        distance = torch.hypot(grid[0][:, None], grid[1][None, :])
        # The torus cuts the correlation off at half its size, which can turn a few modes
        # slightly negative: they are set to the floor.
        modes = torch.fft.rfft2(rho ** (distance**power)).real.clamp_min(0) + floor
        self.modes = modes.sqrt().to(device)
        correlation = torch.full((channels, channels), colour, dtype=torch.float64)
        correlation.fill_diagonal_(1.0)
        values, vectors = torch.linalg.eigh(correlation)
        self.mix = (sigma * (vectors * values.sqrt()) @ vectors.T).to(device)
        self._colours = vectors.to(device), (sigma**2 * values).to(device)
        self.latent_shape = (channels, *self.torus)

    def root(self, u: Tensor) -> Tensor:
        return self._colour(self._smooth(u)[..., : self.shape[1], : self.shape[2]])

    def root_adjoint(self, x: Tensor) -> Tensor:
        pad = (0, self.torus[1] - self.shape[2], 0, self.torus[0] - self.shape[1])
        return self._smooth(torch.nn.functional.pad(self._colour(x), pad))

    def damped(self, u: Tensor, weight: Tensor, power: float = -0.5) -> Tensor:
        # Exact on the torus; that the image is a part of it is left out.
        vectors, values = self._colours
        variance = values[:, None, None] * self.modes.square()
        modes = torch.fft.rfft2(torch.einsum("dc,ndhw->nchw", vectors, u))
        made = torch.fft.irfft2(modes * (1 + weight * variance) ** power, s=self.torus)
        return torch.einsum("dc,nchw->ndhw", vectors, made)

    def _smooth(self, u: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(u) * self.modes, s=self.torus)

    def _colour(self, x: Tensor) -> Tensor:
        return torch.einsum("dc,nchw->ndhw", self.mix, x)

    @cached_property
    def _space(self) -> Gaussian:
        """Return the distribution of one channel; priors that differ in colour share it."""
        _, height, width = self.shape
        kernel = torch.fft.irfft2(self.modes.square(), s=self.torus)
        rows = (torch.arange(height)[:, None] - torch.arange(height)[None, :]) % self.torus[0]
        columns = (torch.arange(width)[:, None] - torch.arange(width)[None, :]) % self.torus[1]
        space = kernel[rows[:, None, :, None], columns[None, :, None, :]]
        size = height * width
        return Gaussian(self.mean.expand(1, height, width).reshape(-1), space.reshape(size, size))

    @cached_property
    def _dense(self) -> Gaussian:
        mean = self.mean.expand(self.shape).reshape(-1)
        return KroneckerGaussian(mean, self.mix @ self.mix, self._space)

    def dense(self) -> Gaussian:
        return self._dense

    def __repr__(self) -> str:
        return f"gaussian(rho={self.rho:g}, power={self.power:g}, colour={self.colour:g})"

    def family(self, stage: int = 0) -> Sequence[Prior]:
        if stage not in self._families:
            self._families[stage] = self._family(stage)
        return self._families[stage]

    def _family(self, stage: int) -> Sequence[Prior]:
        if not self.adapt or stage > 2 or (self.shape[0] == 1 and not stage):
            return [self]
        if stage:
            shapes = _others((self.rho, self.power), _SHAPES if stage == 1 else _ROUGH)
            return [self, *(self._other(rho, power, self.colour) for rho, power in shapes)]
        found = [self._other(self.rho, self.power, c) for c in _others(self.colour, _COLOURS)]
        for prior in found:
            prior.__dict__["_space"] = self._space  # made once
        return [self, *found]

    def _other(self, rho: float, power: float, colour: float) -> GaussianPrior:
        return GaussianPrior(self.shape, rho, power, colour, **self.options)  # type: ignore[arg-type]


def _others(here: object, options: Sequence) -> list:
    return [o for o in options if o != here]


def _check(**options: float) -> None:
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidInputError(f"{name} must be a number, not {value!r}")
        if not math.isfinite(value):
            raise InvalidInputError(f"{name} must be a finite number, not {value!r}")
    for name in ("rho", "colour"):
        if not 0 <= options[name] < 1:
            raise InvalidInputError(f"{name} must lie in [0, 1), not {options[name]}")
    if options["sigma"] <= 0 or options["floor"] < 0:
        raise InvalidInputError(
            f"sigma ({options['sigma']}) must be above 0 and floor ({options['floor']}) not below"
        )
    if not 0 < options["power"] <= 2:
        raise InvalidInputError(f"power must lie in (0, 2], not {options['power']}")


class LearnedGaussianPrior(Prior):
    """Mean and covariance of public images, shrunk towards the stationary prior.

    Parameters
    ----------
    shape : tuple of int
        Shape (C, H, W) of one image.
    public : Tensor, shape (M, C, H, W)
        Public images; their mirror images are used too.
    device : torch.device or str

    Raises
    ------
    InvalidInputError
        If the images do not fit, or are too large for a covariance matrix.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        public: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        images = demand_public("gaussian:learned", shape, public)
        size = math.prod(shape)
        if size > DENSE_PRIOR:
            raise InvalidInputError(
                f"prior 'gaussian:learned' covers images of up to {DENSE_PRIOR} values; "
                f"{tuple(shape)} has {size}: use 'gaussian'"
            )
        self.shape, self.latent_shape = shape, (size,)
        both = torch.cat([images, images.flip(3)]).to(device)
        self.mean = both.mean(0)
        rest = (both - self.mean).flatten(1)
        spread = max(float(rest.square().mean().sqrt()), 1e-3)
        weight = max(_SHRINKAGE / (_SHRINKAGE + len(images)), _LEAST_SHRINKAGE)
        stationary = GaussianPrior(shape, sigma=spread, device=device).dense().covariance
        self.covariance = (1 - weight) * (rest.T @ rest) / len(rest) + weight * stationary
        self.factor = cholesky(self.covariance)

    def root(self, u: Tensor) -> Tensor:
        return (u @ self.factor.T).reshape(-1, *self.shape)

    def root_adjoint(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.factor

    @cached_property
    def _dense(self) -> Gaussian:
        return Gaussian(self.mean.reshape(-1), self.covariance)

    def dense(self) -> Gaussian:
        return self._dense

    def __repr__(self) -> str:
        return "gaussian:learned"


@PRIORS.register("gaussian")
def _gaussian(
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    public: Tensor | None = None,
    *,
    rho: float = _SHAPES[0][0],
    power: float = _SHAPES[0][1],
    colour: float = _COLOURS[0],
    sigma: float = 0.25,
    mean: float = 0.5,
    adapt: bool = True,
) -> Prior:
    """Pixels are normal, and correlated the more the nearer they are; data-free."""
    return GaussianPrior(
        shape, rho=rho, power=power, colour=colour, sigma=sigma, mean=mean, adapt=adapt,
        device=device,
    )  # fmt: skip


# What messages name as its options.
_gaussian.__signature__ = inspect.signature(GaussianPrior)  # type: ignore[attr-defined]


@PRIORS.register("gaussian:learned")
def _learned(
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    public: Tensor | None = None,
) -> Prior:
    """Normal, with the mean and covariance of public images."""
    return LearnedGaussianPrior(shape, public, device)
