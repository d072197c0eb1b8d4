"""The paper's security metric c(M), with its layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from fedleak.errors import InvalidInputError
from fedleak.metric.rank import AUTO_UNKNOWNS, exact_rank, structural_rank
from fedleak.systems import Chain
from fedleak.systems.conv import Conv

Method = Literal["auto", "exact", "structural"]


@dataclass(frozen=True)
class LayerRank:
    """One layer's system: ``deficiency = rank - unknowns`` is 0 when it is solvable."""

    name: str
    kind: str
    unknowns: int
    rank: int
    deficiency: int
    weight: float
    exact: bool


@dataclass(frozen=True)
class SecurityMetric:
    """c(M) of one model.

    Attributes
    ----------
    c : int
        The metric as published; 0 means that every layer's system can be solved, and the
        more negative, the more directions an attack has to guess.
    layers : tuple of LayerRank
        In forward order; the head has no part in c(M).
    """

    c: int
    layers: tuple[LayerRank, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON."""
        return asdict(self)


def security_metric(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    method: Method = "auto",
    seed: int = 0,
) -> SecurityMetric:
    r"""Compute ``c(M) = sum_i (d - i + 1) / d * (rank(U_i) - n_i)``.

    Chen & Campbell 2022, equation 10: ``d`` convolutions, ``U_i`` the system of layer
    ``i`` and ``n_i`` its unknowns. Each layer's term is rounded half to even, as the
    published code does.

    Parameters
    ----------
    model : nn.Module
        A chain of supported layers, with the weights to judge.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    method : {"auto", "exact", "structural"}
        ``exact`` ranks the systems numerically, for a random image with a random label;
        ``structural`` is the closed form; ``auto`` is exact for small layers.
    seed : int
        Draws the image and the label.

    Returns
    -------
    SecurityMetric

    Raises
    ------
    UnsupportedModelError
        If the model is not a chain of supported layers.
    InvalidInputError
        If the method is unknown or the image shape does not fit.
    """
    if method not in ("auto", "exact", "structural"):
        raise InvalidInputError(f"method {method!r} is not one of auto, exact, structural")
    chain = Chain.read(model, input_shape)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise InvalidInputError("the model holds NaN or infinite weights: it has no metric")
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, *chain.input_shape, generator=generator, dtype=torch.float64)
    classes = chain.head.out_shape[0]
    label = torch.randint(classes, (1,), generator=generator)
    errors = chain.trace(x.to(chain.device), label.to(chain.device)).errors
    convolutions = [i for i, layer in enumerate(chain.layers) if isinstance(layer, Conv)]
    depth = len(convolutions)
    layers, c = [], 0
    for place, i in enumerate(convolutions):
        layer = chain.layers[i]
        assert isinstance(layer, Conv)
        exact = method == "exact" or (method == "auto" and layer.unknowns <= AUTO_UNKNOWNS)
        rank = exact_rank(layer, errors[i][0]) if exact else structural_rank(layer)
        weight = (depth - place) / depth
        deficiency = rank - layer.unknowns
        c += round(weight * deficiency)
        layers.append(
            LayerRank(layer.name, "conv2d", layer.unknowns, rank, deficiency, weight, exact)
        )
    return SecurityMetric(c, tuple(layers))
