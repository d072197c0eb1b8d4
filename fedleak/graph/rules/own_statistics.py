"""Down through layers that are normalised by their own statistics, as most clients train.

Batch normalisation in training mode and group normalisation hide the scale of their input, and
their derivative depends on it. The kernels find a convolution's input up to one positive number:
from the derivative by its normalisation's output (:func:`solve_normalised`), or, where that is not
known yet, from the gradient alone (:func:`blind_convolution`). The number is told by the next bias
below, before the activation that made the input: its gradient is the sum of what arrives there.
There is one such equation for each channel and one unknown, so that a wrong mask shows and is
mended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.graph.activations import flat_outside
from fedleak.graph.capture import Node
from fedleak.graph.kernels.batch_norm import (
    Normalised,
    derivative_above,
    solve_normalised,
    zero_sum_factors,
)
from fedleak.graph.kernels.blind import blind_criterion
from fedleak.graph.kernels.refusal import Refused
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge, Known
from fedleak.graph.rules.bias_sums import bias_below
from fedleak.graph.rules.derivatives import pulled_back
from fedleak.graph.rules.mixtures import geometry_of, resolved

_NAME = "own statistics"
#: Values below this, in units of the error, may be zeros of a ReLU, and at most so large, relative
#: to the root mean square, is one whose mask is mended.
_CLEAR, _NEAR = 30.0, 1e-2
#: How far off a channel's equation may be, in units of the usual and at most relative.
_FACTOR, _HOLDS = 20.0, 1e-3
#: Rows for each unknown from which the fixed point converges: a stride gives some far fewer.
_REDUNDANT = 1.3
#: How often the scale, and with it what eps leaves, is found anew.
_EPSILONS = 4


@dataclass(frozen=True, eq=False)
class Placed:
    """An edge's value with its scale.

    Attributes
    ----------
    scale : Tensor, shape (B, 1, 1, 1)
        What it had to be multiplied by.
    slopes : Tensor
        Of the activation that made it.
    unsure : Tensor of bool, shape (C,)
        Channels with a constant that nothing tells.
    """

    scale: Tensor
    slopes: Tensor
    unsure: Tensor


def apply(knowledge: Knowledge) -> bool:
    """Find one more edge, from the head down."""
    for edge in reversed(knowledge.graph.nodes):
        known = knowledge.values.get(edge)
        done = known is not None and (known.whole or known.by == _NAME)
        if not done and _descend(knowledge, edge):
            return True
    return any(_begin(knowledge, n) for n in reversed(knowledge.graph.nodes.values()))


def _norm_above(knowledge: Knowledge, name: str) -> Node | None:
    """Return the normalisation that alone takes a convolution's output."""
    graph = knowledge.graph
    node, above = graph.nodes[name], graph.consumers[name]
    if node.kind is not Kind.CONVOLUTION or len(above) != 1 or len(node.shape) != 4:
        return None
    norm = graph.nodes[above[0][0]]
    sent = all(knowledge.gradient_of(norm, p) is not None for p in ("weight", "bias"))
    own = norm.kind is Kind.NORMALISATION and sent
    return norm if own and knowledge.gradient_of(node, "weight") is not None else None


def _part(knowledge: Knowledge, node: Node, norm: Node, derivative: Tensor) -> Normalised:
    parameters = knowledge.graph.parameters
    gamma, beta = (parameters[f"{norm.path}.{p}"] for p in ("weight", "bias"))
    known = knowledge.values.get(norm.name)
    z_hat = active = None
    if known is not None:
        full = (known.value - beta[:, None, None]) / gamma[:, None, None]
        active = torch.ones_like(full, dtype=torch.bool) if known.mask is None else known.mask
        active = active & (gamma != 0)[:, None, None]
        z_hat = torch.where(active, full, 0.0)
    return Normalised(
        knowledge.gradient[f"{node.path}.weight"],
        parameters[f"{node.path}.weight"],
        geometry_of(knowledge, node),
        derivative,
        gamma,
        knowledge.gradient[f"{norm.path}.weight"],
        knowledge.gradient[f"{norm.path}.bias"],
        getattr(norm.module, "num_groups", None),
        float(norm.module.eps),
        z_hat,
        active,
    )


def _descend(knowledge: Knowledge, edge: str) -> bool:
    """Solve for an edge all of whose normalised convolutions have a known derivative above."""
    graph, found = knowledge.graph, dict[str, tuple[Node, Node, Normalised]]()
    for name, place in graph.consumers[edge]:
        if (name, place) in knowledge.contributions:
            continue
        norm = _norm_above(knowledge, name)
        if norm is None or norm.name not in knowledge.cotangents or name in knowledge.short:
            return False
        part = _part(knowledge, graph.nodes[name], norm, knowledge.cotangents[norm.name].value)
        found[name] = graph.nodes[name], norm, part
    if not found or _activation(knowledge, edge) is None:
        return False
    parts = [p for *_, p in found.values()]
    names = ", ".join(n.path for n, *_ in found.values())
    rows = sum(p.gradient.shape[0] * p.geometry.taps for p in parts)
    unknowns = graph.batch * parts[0].geometry.positions
    if rows < _REDUNDANT * unknowns:
        return _give_up(knowledge, found, f"{names}: {rows} rows for {unknowns} positions")
    try:
        solved = solve_normalised(*parts)
        e = dict(zip(found, solved.cotangents, strict=True))
        at = solved.lifted.unsqueeze(1)
        apart = any(p.groups is not None for p in parts)
        placed = _place(knowledge, edge, solved.values, e, solved.error, apart, solved.unsure, at)
    except Refused as refusal:
        return _give_up(knowledge, found, f"{names}: {refusal}")
    open_ = placed.unsure[:, None, None] & at
    if bool(open_.any()):
        # The layers above do not see what is open: all else of them is known.
        relative = max(solved.error, ROUNDING)
        for (name, (node, norm, _)), z_hat in zip(found.items(), solved.z_hat, strict=True):
            gamma, beta = (graph.parameters[f"{norm.path}.{p}"] for p in ("weight", "bias"))
            y = gamma[:, None, None] * z_hat + beta[:, None, None]
            size = float(y.square().mean().sqrt())
            knowledge.learn_value(norm.name, Known(y, relative * size, _NAME))
            below = e[name] / placed.scale
            size = float(below.square().mean().sqrt())
            knowledge.learn_cotangent(name, Known(below, relative * size, _NAME))
            knowledge.short[name] = f"{node.path}: constants of {int(placed.unsure.sum())} channels"
    return _learn(knowledge, edge, solved.values, solved.error, placed, open_)


def _give_up(knowledge: Knowledge, nodes: Mapping[str, object], why: str) -> bool:
    knowledge.short.update(dict.fromkeys(nodes, why))
    return True


def _begin(knowledge: Knowledge, node: Node) -> bool:
    """Solve a convolution blindly, and with its input find the derivative above."""
    norm = _norm_above(knowledge, node.name)
    (edge, *_) = node.inputs or ("",)
    if norm is None or node.name in knowledge.blind or knowledge.value(edge) is not None:
        return False
    if norm.name in knowledge.cotangents or _activation(knowledge, edge) is None:
        return False
    others = [c for c in knowledge.graph.consumers[edge] if c[0] != node.name]
    if any(c not in knowledge.contributions for c in others):
        return False
    gradient, images = knowledge.gradient[f"{node.path}.weight"], knowledge.graph.batch
    out, channels = gradient.shape[:2]
    if not blind_criterion(geometry_of(knowledge, node), out, channels, images).holds:
        return False
    knowledge.blind.add(node.name)
    part = _part(knowledge, node, norm, gradient.new_zeros(node.shape))
    try:
        x, e, error = _images_of(knowledge, node, part)
        inverse: float | Tensor = 0.0
        apart = part.groups is not None
        for _ in range(_EPSILONS):
            derivative = derivative_above(part, x, e, inverse)
            placed = _place(knowledge, edge, x, {node.name: e}, error, apart)
            inverse = placed.scale**-2
    except Refused as refusal:
        knowledge.short[node.name] = str(refusal)
        return False
    error = max(error, ROUNDING)
    size = float(derivative.square().mean().sqrt())
    knowledge.learn_cotangent(norm.name, Known(derivative, error * size, _NAME))
    return _learn(knowledge, edge, x, error, placed)


def _images_of(knowledge: Knowledge, node: Node, part: Normalised) -> tuple[Tensor, Tensor, float]:
    """Return a convolution's input and cotangent, up to one number.

    One for all images, or for each where they are normalised apart.
    """
    x, e, error = resolved(knowledge, node)
    if len(x) == 1 or part.groups is not None:
        return x, e, error
    factors, residual = zero_sum_factors(e)
    if not residual < 0.1 or not bool((factors > 0).all()):
        raise Refused(f"{node.path}: no weights of the images make the cotangent's sums zero")
    return x / factors[:, None, None, None], e * factors[:, None, None, None], error


def _activation(knowledge: Knowledge, edge: str) -> Node | None:
    """Return the ReLU that made an edge, if there is a bias below it."""
    node = knowledge.graph.nodes[edge]
    if node.kind is not Kind.POINTWISE or flat_outside(node.target, node.args) != (0.0, torch.inf):
        return None
    return node if bias_below(knowledge, node) is not None else None


def _place(
    knowledge: Knowledge,
    edge: str,
    x: Tensor,
    cotangents: Mapping[str, Tensor],
    error: float,
    apart: bool = False,
    unsure: Tensor | None = None,
    lifted: Tensor | None = None,
) -> Placed:
    """Find the scale of an edge's value, and check and mend the mask of its activation.

    Parameters
    ----------
    knowledge : Knowledge
    edge : str
    x : Tensor, shape (B, C, H, W)
        Its value up to a positive number.
    cotangents : mapping of str to Tensor
        Of the convolutions that take it, up to that number's inverse.
    error : float
        Relative, of ``x``.
    apart : bool
        Whether each image has a number of its own.
    unsure : Tensor of bool, shape (C,), optional
        Channels whose constant on the positions ``lifted``, (B, 1, H, W), may be off.
    lifted : Tensor of bool, optional

    Raises
    ------
    Refused
        The equations contradict each other.
    """
    graph, activation = knowledge.graph, _activation(knowledge, edge)
    assert activation is not None
    bias = bias_below(knowledge, activation)
    assert bias is not None
    unknown = torch.zeros_like(x)
    for name, e in cotangents.items():
        unknown = unknown + pulled_back(graph, graph.nodes[name], 0, e)
    known = torch.zeros_like(x)
    for consumer in graph.consumers[edge]:
        if consumer[0] not in cotangents:
            known = known + knowledge.contributions[consumer].value
    size = float(x.square().mean().sqrt())
    slopes = (x > _CLEAR * max(error, ROUNDING) * size).to(x)
    doubt = torch.zeros(x.shape[1], dtype=torch.bool) if unsure is None else unsure
    share, usual = _share(known * slopes, unknown * slopes, bias, ~doubt, apart)
    full = known + share * unknown
    bound = _FACTOR * usual * full.square().sum((0, 2, 3)).sqrt()
    off = bias - (full * slopes).sum((0, 2, 3))
    for channel in (off.abs() > bound).nonzero()[:, 0].tolist():
        mended = _mended(off[channel], full[:, channel], slopes[:, channel],
                         x[:, channel].abs() < _NEAR * size, float(bound[channel]))  # fmt: skip
        if mended is None:
            raise Refused(
                f"{activation.name}: the gradient of channel {channel}'s bias is missed by "
                f"{float(off[channel].abs() / bound[channel]) * _FACTOR:.0f} times the usual"
            )
        slopes[:, channel] = mended
    if lifted is not None:
        # Where the least value lies at zero as the bias says, the constant is right.
        zero = (slopes == 0) & lifted & (full.abs() > bound[:, None, None])
        doubt = doubt & ~zero.any(3).any(2).any(0)
    return Placed(1 / share.expand(len(x), 1, 1, 1), slopes, doubt)


def _share(
    known: Tensor, unknown: Tensor, bias: Tensor, used: Tensor, apart: bool
) -> tuple[Tensor, float]:
    """Return ``f`` with ``bias = sum of (known + f unknown)``, and the usual relative misfit.

    ``f`` has shape (1, 1, 1, 1), or (B, 1, 1, 1) where images count ``apart``.
    """
    right = bias - known.sum((0, 2, 3))
    left = unknown.sum((2, 3)).mT
    left = left if apart else left.sum(1, keepdim=True)  # (channels, numbers)
    first = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    size = (known + first.reshape(-1, 1, 1, 1) * unknown).square().sum((0, 2, 3)).sqrt()
    used = used & (size > 1e-9 * size.max())
    size = size.clamp_min(1e-300)
    right, left = right / size, left / size[:, None]
    for _ in range(5):
        if int(used.sum()) < 4 * left.shape[1]:
            raise Refused("too few channels tell the scale")
        factor = torch.linalg.lstsq(left[used], right[used][:, None]).solution[:, 0]
        off = (right - left @ factor).abs()
        usual = max(float(off[used].median()), ROUNDING)
        used = used & (off <= _FACTOR * usual)
    if not bool((factor > 0).all()) or not usual < _HOLDS:
        raise Refused(f"the scale is not told: equations are off by {usual:.1e}")
    return factor.reshape(-1, 1, 1, 1), usual


def _mended(off: Tensor, full: Tensor, slopes: Tensor, near: Tensor, bound: float) -> Tensor | None:
    """Flip one unit near zero so that a channel's equation holds."""
    change = torch.where(slopes > 0, -full, full)
    rest = torch.where(near, (off - change).abs(), torch.inf)
    best = int(rest.argmin())
    if not float(rest.flatten()[best]) <= bound:
        return None
    slopes = slopes.clone().flatten()
    slopes[best] = 1 - slopes[best]
    return slopes.reshape(full.shape)


def _learn(
    knowledge: Knowledge,
    edge: str,
    x: Tensor,
    error: float,
    placed: Placed,
    open_: Tensor | None = None,
) -> bool:
    """Note an edge's value and its activation's slopes and input."""
    activation = knowledge.graph.nodes[edge]
    value = (x * placed.scale).clamp_min(0) * placed.slopes
    deviation = max(error, ROUNDING) * float(value.square().mean().sqrt())
    mask = None if open_ is None or not bool(open_.any()) else ~open_
    knowledge.learn_value(edge, Known(value, deviation, _NAME, mask))
    knowledge.slopes[edge] = placed.slopes
    active = placed.slopes > 0
    active = active if mask is None else active & mask
    below = Known(value, deviation, _NAME, active)
    knowledge.learn_value(activation.inputs[0], below)
    return True


__all__ = ["apply"]
