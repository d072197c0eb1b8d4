"""What a prior is: a mean, a square root of the covariance, and its adjoint."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.registry import Registry, make
from fedleak.solvers.gaussian import Gaussian


class Prior(ABC):
    """What images look like before anything is known of this one.

    Images are ``x = mean + B u``. A matching attack works on the whitened ``u``, where
    ``energy`` says how unlikely an image is; ``B`` is the preconditioner as well.

    Attributes
    ----------
    shape : tuple of int
        Shape (C, H, W) of one image.
    mean : Tensor, float64, broadcastable to (C, H, W)
    latent_shape : tuple of int
        Shape of one ``u``.
    gaussian : bool
        Whether the energy is that of the normal distribution ``N(mean, B B^T)``.
    """

    shape: tuple[int, int, int]
    mean: Tensor
    latent_shape: tuple[int, ...]
    gaussian: bool = True

    @abstractmethod
    def root(self, u: Tensor) -> Tensor:
        """Return ``B u``, shape (N, C, H, W), for ``u``, shape (N, *latent_shape)."""

    @abstractmethod
    def root_adjoint(self, x: Tensor) -> Tensor:
        """Return ``B^T x``, shape (N, *latent_shape)."""

    def image(self, u: Tensor) -> Tensor:
        """Return ``mean + B u``."""
        return self.mean + self.root(u)

    def energy(self, u: Tensor) -> Tensor:
        """Return minus twice the log density of each ``u``, up to a constant, shape (N,)."""
        return u.flatten(1).square().sum(1)

    def damped(self, u: Tensor, weight: Tensor, power: float = -0.5) -> Tensor:
        """Return ``(I + weight B^T B)^power u``, or what comes near: a preconditioner.

        Where data tell every pixel with the variance ``1 / weight``, the curvature in the
        whitened ``u`` is ``I + weight B^T B``: fine detail, of which the prior expects little,
        is then known as well as all else. One weight, or one for each image, shape (N, 1, 1, 1).
        """
        return u

    def dense(self) -> Gaussian:
        """Return the normal distribution of images with its covariance as a matrix."""
        size = math.prod(self.shape)
        eye = torch.eye(size, dtype=torch.float64, device=self.mean.device)
        units = eye.reshape(-1, *self.shape).split(256)
        rows = [self.root(self.root_adjoint(part)) for part in units]
        mean = self.mean.expand(self.shape).reshape(-1)
        return Gaussian(mean, torch.cat(rows).flatten(1))

    def family(self, stage: int = 0) -> Sequence[Prior]:
        """Return priors among which the evidence of one update chooses, this one first.

        The choice goes in stages: the chosen prior is asked for the family of the next
        stage, and ends it by returning itself alone.
        """
        return [self]

    def local(self, image: Tensor, covariance: Tensor) -> Gaussian:
        """Return what is expected around an image that is known up to ``covariance``.

        A prior that says no more than its normal distribution returns that.

        Parameters
        ----------
        image : Tensor, shape (n,)
        covariance : Tensor, shape (n, n)
        """
        return self.dense()


#: ``factory(shape, device=..., public=..., **options) -> Prior``. ``public`` are images of the
#: server's own, shape (M, C, H, W), or None.
PriorFactory = Callable[..., Prior]
PRIORS: Registry[PriorFactory] = Registry("prior", "fedleak.priors")


def make_prior(
    name: str,
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    public: Tensor | None = None,
    **options: Any,
) -> Prior:
    """Make a prior by name.

    Parameters
    ----------
    name : str
        A registered name, as ``"gaussian"`` or ``"patches:learned"``.
    shape : tuple of int
        Shape (C, H, W) of one image.
    device : torch.device or str
    public : Tensor, shape (N, C, H, W), optional
        Images to learn from, for the priors that are learned.
    **options
        The prior's own.

    Returns
    -------
    Prior

    Raises
    ------
    UnknownNameError
        If there is no such prior.
    InvalidInputError
        If it needs public images and has none, or refuses an option.
    """
    made: Prior = make(PRIORS, name, options, shape, device=device, public=public)
    return made


def demand_public(name: str, shape: tuple[int, int, int], public: Tensor | None) -> Tensor:
    """Return the public images, or say that they are missing or do not fit."""
    if public is None or len(public) < 2:
        raise InvalidInputError(
            f"prior {name!r} is learned from public images: give a folder of at least two "
            "(--public FOLDER), none of them a client's"
        )
    if tuple(public.shape[1:]) != tuple(shape):
        raise InvalidInputError(
            f"the public images have shape {tuple(public.shape[1:])}, the clients' {tuple(shape)}"
        )
    if not bool(public.isfinite().all()):
        raise InvalidInputError("the public images hold NaN or infinite values")
    return public.double()
