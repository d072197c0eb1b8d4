"""The paper's security metric c(M), with its layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedleak.errors import InvalidInputError
from fedleak.metric.rank import exact_rank, layer_ranks, structural_rank
from fedleak.systems import Affine, Chain
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
    published code does. Outputs that a ReLU or a pool hides give no constraint; pools are
    not layers of their own here.

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
    trace = chain.trace(x.to(chain.device), label.to(chain.device))
    convolutions = [i for i, layer in enumerate(chain.layers) if isinstance(layer, Conv)]
    depth = len(convolutions)
    layers, c = [], 0
    for place, i in enumerate(convolutions):
        layer = chain.layers[i]
        assert isinstance(layer, Conv)
        known, e = _binding(chain, trace.inputs, i), trace.errors[i]
        if method == "auto":
            ranks, exact = layer_ranks(layer, e, known)
            rank = int(ranks[0])
        else:
            exact = method == "exact"
            rank = (exact_rank if exact else structural_rank)(layer, e[0], known[0])
        weight = (depth - place) / depth
        deficiency = rank - layer.unknowns
        c += round(weight * deficiency)
        layers.append(
            LayerRank(layer.name, "conv2d", layer.unknowns, rank, deficiency, weight, exact)
        )
    return SecurityMetric(c, tuple(layers))


def _binding(chain: Chain, inputs: list[Tensor], i: int) -> Tensor:
    """Return the outputs of layer ``i`` that are known when the next system's input is.

    An inactive ReLU hides its input and a pool all but one pixel of each window: what is
    hidden gives no weight constraint.
    """
    end = i + 1
    while end < len(chain.layers) and not isinstance(chain.layers[end], Affine):
        end += 1
    known = torch.ones_like(inputs[end], dtype=torch.bool)
    for j in reversed(range(i + 1, end)):
        known = chain.layers[j].binds(inputs[j], inputs[j + 1], known)
    return known
