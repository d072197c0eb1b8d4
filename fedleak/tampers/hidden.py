"""Tampers of a fully connected first layer: each unit speaks for few images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedleak.attacks.first_layer import FirstLayer
from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.priors import Prior, make_prior
from fedleak.tampers.base import TAMPERS, Tamper, changed_state

_NORMAL = torch.distributions.Normal(0.0, 1.0)


@dataclass(frozen=True)
class _Hidden(Tamper):
    """What the tampers of this file share.

    Parameters
    ----------
    scale : float
        Size of the first layer's weights. Small, since clients that share weights round them:
        their change is to be large beside them.
    logits : float
        Size that the change of the outputs of the second layer may reach over a typical batch:
        near 1, so that no softmax saturates and every image has a gradient.
    seed : int
        Draws what is random.
    """

    scale: float = 1e-3
    logits: float = 0.5
    seed: int = 0
    attack: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        for name in ("scale", "logits"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise InvalidInputError(f"{name} must be a number above 0, not {value!r}")

    def _second(self, model: nn.Module, layer: FirstLayer, typical: float) -> dict[str, Tensor]:
        """Return a second layer that adds all units up: an image has one factor in all rows."""
        weight = model.get_parameter(f"{layer.second}.weight").detach()
        outputs = torch.arange(len(weight), dtype=torch.float64)
        # Both signs and no two alike: labels can be told apart, and no image has no gradient.
        column = (1 - 2 * (outputs % 2)) * (1 + outputs / (2 * len(outputs)))
        column = column * self.logits / max(typical, 1e-300)
        return {f"{layer.second}.weight": column.unsqueeze(1).expand_as(weight).to(weight.dtype)}


@TAMPERS.register("peel")
@dataclass(frozen=True)
class Peel(_Hidden):
    """Units that sort the images of a batch by several measurements at once.

    Each of ``directions`` smooth patterns gets a part of the first layer's units, with equal
    weights and rising thresholds: the difference of two neighbours is the sum of the images
    between them. An image that is alone in one of the patterns is known, is taken out of the
    others, and leaves more alone there, as in an invertible Bloom filter. What two patterns
    agree on is certified.

    Parameters
    ----------
    directions : int
        Number of patterns; 1 is the measurement of Fowl et al. alone.

    Notes
    -----
    Thresholds are quantiles under the data-free Gaussian prior: no image of the clients' kind
    is needed. Fowl et al. 2022 (Robbing the Fed, ICLR) for one pattern, the brightness; several
    patterns and peeling are ours.
    """

    directions: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.directions, bool) or not isinstance(self.directions, int):
            raise InvalidInputError(f"directions must be a whole number, not {self.directions!r}")
        if self.directions < 1:
            raise InvalidInputError(f"directions must be at least 1, not {self.directions}")

    def prepare(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        server_round: int = 1,
        client: int = 0,
        num_images: int = 1,
    ) -> dict[str, Tensor]:
        layer = FirstLayer.of(model, input_shape)
        if layer.units < 2 * self.directions:
            raise UnsupportedModelError(
                f"the first layer {layer.first!r} has {layer.units} units, too few for "
                f"{self.directions} directions"
            )
        prior = make_prior("gaussian", input_shape)
        sizes = [len(p) for p in torch.arange(layer.units).tensor_split(self.directions)]
        rows, thresholds, typical = [], [], 0.0
        for pattern, size in zip(patterns(input_shape, self.directions), sizes, strict=True):
            spread = float(prior.root_adjoint(pattern.unsqueeze(0)).norm())
            centre = float((pattern * prior.mean).sum())
            quantiles = _NORMAL.icdf((torch.arange(size, dtype=torch.float64) + 0.5) / size)
            rows.append(self.scale * pattern.reshape(1, -1).expand(size, -1))
            thresholds.append(self.scale * (centre + spread * quantiles))
            typical += self.scale * size * spread / math.sqrt(math.pi)
        changed = self._second(model, layer, typical)
        changed[f"{layer.first}.weight"] = torch.cat(rows)
        changed[f"{layer.first}.bias"] = -torch.cat(thresholds)
        return changed_state(model, changed)


@TAMPERS.register("imprint")
@dataclass(frozen=True)
class Imprint(Peel):
    """Units that sort the images of a batch by their brightness (Fowl et al. 2022).

    As :class:`Peel` with one pattern: two images of nearly one brightness stay together.

    Notes
    -----
    Fowl et al. 2022, *Robbing the Fed*, ICLR. There a module of bins is put before any network,
    which changes the architecture; here the model must have a fully connected first layer.
    """

    directions: int = 1


@TAMPERS.register("trap")
@dataclass(frozen=True)
class Trap(_Hidden):
    """Units that are silent for all but few images: trap weights (Boenisch et al. 2021).

    Of every row, half of the weights, drawn at random, are positive and a little smaller than
    the negative half, so that only extreme images activate the unit.

    Parameters
    ----------
    share : float
        Share of images that activate a unit, under the data-free Gaussian prior; 0 for one
        image of the batch.

    Notes
    -----
    Boenisch et al. 2021, *When the Curious Abandon Honesty* (arXiv 2112.02918): there the ratio
    of the halves is tuned on images; here it follows from the prior. The second layer stays
    as it is.
    """

    share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.share, (int, float)) or not 0 <= self.share < 1:
            raise InvalidInputError(f"share must be a number from 0 to below 1, not {self.share!r}")

    def prepare(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        server_round: int = 1,
        client: int = 0,
        num_images: int = 1,
    ) -> dict[str, Tensor]:
        layer = FirstLayer.of(model, input_shape)
        prior = make_prior("gaussian", input_shape)
        generator = torch.Generator().manual_seed(self.seed)
        pixels = math.prod(input_shape)
        sizes = torch.randn(layer.units, pixels, generator=generator, dtype=torch.float64).abs()
        order = torch.rand(layer.units, pixels, generator=generator).argsort(1)
        positive = order < pixels // 2
        share = self.share or 1 / max(num_images, 2)
        quantile = float(_NORMAL.icdf(torch.tensor(1 - share, dtype=torch.float64)))
        ratio = torch.cat(
            [
                _ratios(part, there, prior, quantile)
                for part, there in zip(sizes.split(128), positive.split(128), strict=True)
            ]
        )
        weight = torch.where(positive, ratio.unsqueeze(1) * sizes, -sizes) * self.scale / pixels
        changed = {f"{layer.first}.weight": weight}
        changed[f"{layer.first}.bias"] = torch.zeros(layer.units)
        return changed_state(model, changed)


def _ratios(sizes: Tensor, positive: Tensor, prior: Prior, quantile: float) -> Tensor:
    """Return the ratio of the halves at which a unit's activation is 0 at a quantile.

    The activation ``r p x - q x`` of an image ``x ~ N(m, S)`` is normal; its mean is to be
    ``-quantile`` standard deviations, which is a quadratic equation in ``r``.
    """
    halves = [torch.where(there, sizes, 0.0) for there in (positive, ~positive)]
    mean = prior.mean.expand(prior.shape).reshape(-1)
    a, b = (half @ mean for half in halves)
    p, q = (prior.root_adjoint(half.reshape(-1, *prior.shape)).flatten(1) for half in halves)
    z = quantile**2
    square = a**2 - z * (p * p).sum(1)
    middle = a * b - z * (p * q).sum(1)
    rest = b**2 - z * (q * q).sum(1)
    return (middle - (middle**2 - square * rest).clamp_min(0).sqrt()) / square


def patterns(input_shape: tuple[int, int, int], count: int) -> list[Tensor]:
    """Return smooth patterns, the brightness first; absolute values add up to 1.

    Parameters
    ----------
    input_shape : tuple of int
        Shape (C, H, W).
    count : int

    Returns
    -------
    list of Tensor, float64, shape (C, H, W)
        Products of cosines over rows and columns, from coarse to fine; of images in colour
        the differences of their channels come in turns.
    """
    channels, height, width = input_shape
    rows = (torch.arange(height, dtype=torch.float64) + 0.5) * math.pi / height
    columns = (torch.arange(width, dtype=torch.float64) + 0.5) * math.pi / width
    colours = (torch.arange(channels, dtype=torch.float64) + 0.5) * math.pi / channels
    finest = math.ceil(math.sqrt(count)) + 1
    waves = sorted(
        ((c, i, j) for c in range(min(channels, 2)) for i in range(finest) for j in range(finest)),
        key=lambda w: (w[0] + w[1] + w[2], w),
    )
    out = []
    for c, i, j in waves[:count]:
        wave = (
            torch.cos(c * colours)[:, None, None]
            * torch.cos(i * rows)[None, :, None]
            * torch.cos(j * columns)[None, None, :]
        )
        out.append(wave / wave.abs().sum())
    return out
