"""The paper's security metric c(M), with its layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.systems import Affine, Chain, Trace
from fedleak.systems.ranks.binding import binding_rows
from fedleak.systems.ranks.blocks import AFFORDABLE, EXACT, FAST, Effort

Method = Literal["auto", "exact", "structural"]
_EFFORTS = {"auto": AFFORDABLE, "exact": EXACT, "structural": FAST}


@dataclass(frozen=True)
class LayerRank:
    """One layer's system ``U = [A; K(e)]``.

    Attributes
    ----------
    name, kind : str
        The module's dotted name; ``"conv2d"``, ``"linear"``, or what another package's layer is.
    unknowns : int
        Entries of the layer's input.
    rank : int
    deficiency : int
        ``rank - unknowns``: 0 when the system is solvable.
    weight : float
        The part of the deficiency that counts in c(M).
    exact : bool
        Whether ``rank`` is the numerical rank, factored or proven. If not, it is what generic
        weights and errors give, which may be too large and is never too small.
    weight_rank, gradient_rank : int
        The ranks of ``A`` and of ``K(e)`` alone. They are counted where the layer is too large,
        and by ``structural`` where the other of the two decides.
    """

    name: str
    kind: str
    unknowns: int
    rank: int
    deficiency: int
    weight: float
    exact: bool
    weight_rank: int
    gradient_rank: int


@dataclass(frozen=True)
class SecurityMetric:
    """c(M) of one model.

    Attributes
    ----------
    c : int
        The metric as published; 0 means that every layer's system can be solved, and the
        more negative, the more directions an attack has to guess.
    c_normalised : float
        The same sum without rounding, over that of a network whose gradients tell nothing:
        ``sum_i w_i (rank_i - n_i) / sum_i w_i n_i``, from -1 to 0. It is the weighted part of
        all layer inputs that stays open, so that wide and narrow networks, or images of
        different sizes, can be compared; ``c`` grows with all of these.
    layers : tuple of LayerRank
        The convolutions, in forward order.
    dense : tuple of LayerRank
        Fully connected layers below the head, with weight 0. The paper's networks have none,
        and none could add to c(M): the gradient rows ``K(e) x = e x^T`` alone give ``x``,
        unless no error passes the layer at all.
    """

    c: int
    c_normalised: float
    layers: tuple[LayerRank, ...]
    dense: tuple[LayerRank, ...] = ()

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
    published code does. Of outputs that a ReLU or a pool hides, only what the next layer's
    input tells to first order is a constraint; pools are not layers of their own here.

    Parameters
    ----------
    model : nn.Module
        A chain of supported layers, with the weights to judge.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    method : {"auto", "exact", "structural"}
        ``exact`` ranks the systems numerically, for a random image with a random label.
        ``structural`` factors each of the two blocks alone and counts what they share, which
        often proves the rank. ``auto`` is exact but where a layer would take more than some
        seconds. :attr:`LayerRank.exact` says which ranks are numerical.
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
        If the method is unknown, the image shape does not fit or the model holds NaN.
    """
    if method not in _EFFORTS:
        raise InvalidInputError(f"method {method!r} is not one of auto, exact, structural")
    chain = Chain.read(model, _image_shape(input_shape))
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, *chain.input_shape, generator=generator, dtype=torch.float64)
    classes = chain.head.out_shape[0]
    label = torch.randint(classes, (1,), generator=generator)
    trace = chain.trace(x.to(chain.device), label.to(chain.device))
    systems = {i: layer for i, layer in enumerate(chain.layers) if isinstance(layer, Affine)}
    depth = sum(layer.counts for layer in systems.values())
    layers: list[LayerRank] = []
    dense: list[LayerRank] = []
    for i, layer in systems.items():
        weight = (depth - len(layers)) / depth if layer.counts else 0.0
        found = _layer_rank(chain, trace, i, layer, weight, _EFFORTS[method])
        (layers if layer.counts else dense).append(found)
    c = sum(round(r.weight * r.deficiency) for r in layers)
    open_ = sum(r.weight * r.deficiency for r in layers)
    total = sum(r.weight * r.unknowns for r in layers)
    return SecurityMetric(c, open_ / total if total else 0.0, tuple(layers), tuple(dense))


def exact_rank(layer: Affine, e: Tensor, known: Tensor | None = None) -> int:
    """Return the numerical rank of ``U = [A; K(e)]`` for one ``e``.

    Parameters
    ----------
    layer : Affine
    e : Tensor, shape (*out_shape)
        ``dL/dz`` of one example.
    known : Tensor of bool, shape (*out_shape), optional
        Outputs that have a weight row.

    Returns
    -------
    int
        See :meth:`fedleak.systems.System.block_ranks`.
    """
    return layer.exact_rank(e, known)


def structural_rank(layer: Affine, e: Tensor | None = None, known: Tensor | None = None) -> int:
    """Return the rank that generic weights and a generic ``e`` give, in closed form.

    Parameters
    ----------
    layer : Affine
    e : Tensor, shape (*out_shape), optional
        ``dL/dz``: its filters of zeros have no gradient rows.
    known : Tensor of bool, shape (*out_shape), optional
        Outputs that have a weight row.

    Returns
    -------
    int
        For a convolution :func:`fedleak.systems.ranks.counted.counted_rank`.

    Raises
    ------
    UnsupportedModelError
        If this kind of layer has no closed form.
    """
    rank = layer.counted_rank(e, known)
    if rank is None:
        raise UnsupportedModelError(
            f"layer {layer.name!r} ({type(layer).__name__}) has no rank in closed form"
        )
    return rank


def _image_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the shape as integers; refuse what is not one of an image."""
    try:
        channels, height, width = (int(n) for n in shape)
    except (TypeError, ValueError):
        channels = height = width = 0
    if min(channels, height, width) < 1:
        raise InvalidInputError(
            f"input shape {shape!r} is not that of one image: give (channels, height, width)"
        )
    return channels, height, width


def _layer_rank(
    chain: Chain, trace: Trace, i: int, layer: Affine, weight: float, effort: Effort
) -> LayerRank:
    e = trace.cotangents[i][0]
    if not bool(e.isfinite().all()):
        raise InvalidInputError(
            f"the gradient at layer {layer.name!r} is not finite: its weights, or those after "
            "it, are too large for a metric"
        )
    ranks = layer.block_ranks(e, binding_rows(chain.layers, trace.inputs, i), effort)
    return LayerRank(
        layer.name,
        layer.kind or type(layer).__name__,
        layer.unknowns,
        ranks.joint,
        ranks.joint - layer.unknowns,
        weight,
        ranks.exact,
        ranks.weight,
        ranks.gradient,
    )
