"""Total variation, the prior of most published attacks."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.priors.base import PRIORS
from fedleak.priors.gaussian import GaussianPrior

#: Keeps the slope finite where an image is level.
_ROUND = 1e-4


class TotalVariationPrior(GaussianPrior):
    """``p(x) ~ exp(-sum |grad x| / scale)`` (Rudin, Osher & Fatemi 1992), isotropic.

    The whitening ``B`` of the stationary Gaussian prior stays as a preconditioner; the
    energy is that of the image alone.

    Parameters
    ----------
    shape, device
        As for :class:`GaussianPrior`.
    scale : float
        Typical size of the difference of neighbouring pixels.
    """

    gaussian = False

    def __init__(
        self,
        shape: tuple[int, int, int],
        scale: float = 0.05,
        device: torch.device | str = "cpu",
    ):
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not number or not 0 < scale < float("inf"):
            raise InvalidInputError(f"scale must be a number above 0, not {scale!r}")
        # Without adapt: the evidence chooses among normal distributions, which this is not.
        super().__init__(shape, adapt=False, device=device)
        self.scale = scale

    def __repr__(self) -> str:
        return f"tv(scale={self.scale:g})"

    def energy(self, u: Tensor) -> Tensor:
        x = self.image(u.reshape(-1, *self.latent_shape))
        dy = torch.nn.functional.pad(x.diff(dim=2), (0, 0, 0, 1))
        dx = torch.nn.functional.pad(x.diff(dim=3), (0, 1))
        length = (dy.square() + dx.square() + _ROUND**2).sqrt()
        return 2 * length.flatten(1).sum(1) / self.scale


@PRIORS.register("tv")
def _tv(
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    public: Tensor | None = None,
    scale: float = 0.05,
) -> TotalVariationPrior:
    """Images of small total variation: flat areas with sharp edges."""
    return TotalVariationPrior(shape, scale, device)
