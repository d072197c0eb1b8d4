"""What the fully connected head gives: its input and ``dL/dlogits``, with or without bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak.attacks.evidence import Evidence
from fedleak.attacks.head import informed
from fedleak.attacks.head.batch import Demixed, demix
from fedleak.attacks.head.equations import Constraint
from fedleak.attacks.head.stacked import head_of, typical_probabilities
from fedleak.client.loss import CanonicalLoss, Loss
from fedleak.errors import UnsupportedModelError
from fedleak.precision import FORWARD, GRADIENT, SOFTMAX_MOST
from fedleak.solvers import cgls
from fedleak.systems import Affine, Chain, Pointwise
from fedleak.tensors import per_update

#: Below this noise, relative to an entry's size, an update is as good as undefended.
CLEAN = 1e-5
#: Noise up to which, and by how many times it, ``dL/dlogits`` contradicts the declared loss.
_CONTRADICTED, _FACTOR = 1e-2, 30
# Scales tried for a head without bias: logarithms of ||dL/dlogits||, and how many.
_LEAST, _GRID = -28.0, 1000
#: Normals of the space of outputs that demixed inputs must respect.
_NORMALS = 32


@dataclass
class HeadSolution:
    """What the gradient of the head says.

    Attributes
    ----------
    g : Tensor, shape (N * B, classes)
        ``dL/dlogits``.
    value, deviation : Tensor, shape (N * B, features)
        The head's input and its estimated standard deviation.
    noise : Tensor, shape (N,)
        Noise of the update's entries relative to their root mean square, estimated from
        how far the head's gradient is from rank one.
    labels : Tensor, int64, shape (N, B)
    demixed : list of Demixed
        How each batch was told apart; empty for one image.
    """

    g: Tensor
    value: Tensor
    deviation: Tensor
    noise: Tensor
    labels: Tensor
    demixed: list[Demixed] = field(default_factory=list)


def solve_head(evidence: Evidence) -> list[HeadSolution]:
    """Solve ``G = g x^T`` for ``x`` and ``g``, or demix the head's gradient of a batch.

    Returns
    -------
    list of HeadSolution
        One; of a head with two classes and no bias several, which explain its gradient
        equally well.

    Raises
    ------
    UnsupportedModelError
        If the images of a batch cannot be told apart.
    """
    if evidence.num_images > 1:
        return [of_batches(list(demix_heads(evidence)), evidence)]
    chain, labels = evidence.chain, evidence.labels
    if evidence.defended and evidence.rescales != "tensor":
        return [_informed(evidence)]
    head = evidence.gradient[chain.head.weight_name]
    if chain.head.bias is not None:
        g = evidence.gradient[chain.head.bias_name]
        made = [(g, *_head_input(g, head), labels)]
    elif head.shape[1] > 2:
        made = [_rank_one(evidence, labels, 0)]
    else:
        # (x, y) and (-x, 1 - y) give the same gradient, and so may two scales.
        tried = [labels] if bool(evidence.granted.all()) else [labels, 1 - labels]
        made = [_rank_one(evidence, y, place) for y in tried for place in (0, 1)]
    out = []
    for g, value, deviation, noise, y in made:
        logits = chain.head.forward(value)
        g, noise = _self_consistent(chain.loss.alone(logits, y[:, 0]), logits, g, noise)
        out.append(HeadSolution(g, value, deviation, noise, y))
    return out


def _informed(evidence: Evidence) -> HeadSolution:
    """Solve the head with the known errors of a defence."""
    head = head_of(evidence.gradient, evidence.errors, evidence.replay)
    assert head is not None  # a chain has one
    g, value, deviation = informed.solve(head, evidence.labels[:, 0])
    part = [
        torch.where(e.isfinite(), e, 0.0).flatten(1).square().mean(1)
        / v.flatten(1).square().mean(1).clamp_min(1e-300)
        for e, v in zip(evidence.errors.values(), evidence.gradient.values(), strict=True)
    ]
    noise = torch.stack(part).mean(0).sqrt().clamp(GRADIENT, 1.0)
    return HeadSolution(g, value, deviation, noise, evidence.labels)


def demix_heads(evidence: Evidence, scaled: bool = False) -> Iterator[Demixed]:
    """Demix the head's gradient of every batch, one after the other as they are asked for.

    With ``scaled`` their factor is taken for unknown, as it is where the evidence says so.

    Raises
    ------
    UnsupportedModelError
        If the model is no chain, or a batch is larger than its head tells apart.
    """
    head = evidence.chain.head
    loss = evidence.chain.loss
    # Or it were no chain for batches.
    assert head.bias is not None and isinstance(loss, CanonicalLoss)
    weights, biases = (evidence.gradient[n] for n in (head.weight_name, head.bias_name))
    typical = typical_probabilities(evidence.replay)
    demands = forward_constraint(evidence.chain)
    for n, (gradient, bias) in enumerate(zip(weights, biases, strict=True)):
        yield demix(
            gradient,
            bias,
            head.weight[0],
            head.bias,
            evidence.num_images,
            typical,
            evidence.labels[n] if bool(evidence.granted[n]) else None,
            demands,
            (evidence.rounding(head.weight_name), evidence.rounding(head.bias_name)),
            loss,
            scaled or evidence.scale == "update",
        )


def forward_constraint(chain: Chain) -> Constraint | None:
    """Return what the topmost layer with weights demands of the head's inputs, if anything.

    Where it has more outputs than inputs, its outputs ``A x + c`` fill a subspace only: along
    some random normals of it, what the activations above make of them is known to be zero.
    """
    above: list[Pointwise] = []
    for layer in reversed(chain.layers):
        if isinstance(layer, Pointwise):
            above.insert(0, layer)
            continue
        if not isinstance(layer, Affine) or math.prod(layer.out_shape) <= layer.unknowns:
            return None
        return partial(_demanded, layer, above, cache(partial(_normals, layer)))
    return None


def _normals(layer: Affine, count: int = _NORMALS) -> Tensor:
    """Return random unit vectors normal to all outputs ``A x``, shape (count, *out_shape)."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(count, *layer.out_shape, generator=generator, dtype=torch.float64)
    y = y.to(layer.weight)
    zero = y.new_zeros(count, *layer.in_shape)

    def apply(x: Tensor) -> tuple[Tensor, ...]:
        return (layer.target(layer.forward(x), x).weight,)

    def adjoint(rows: tuple[Tensor, ...]) -> Tensor:
        return layer.backward(zero, rows[0], rows[0])

    x, _ = cgls(apply, adjoint, (y,), zero, 1e-13, 3000)
    rest = y - apply(x)[0]
    return rest / per_update(rest.flatten(1).norm(dim=1), rest)


def _demanded(
    layer: Affine, above: list[Pointwise], normals_of: Callable[[], Tensor], value: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the residuals, (B, q), and their derivatives by the head's inputs, (B, q, F)."""
    normals = normals_of()
    x, change = value, torch.ones_like(value)
    for pointwise in reversed(above):
        z, x = x, pointwise.inverse(x)
        lost = pointwise.lost(z)
        slope = pointwise.backward(x, z, torch.ones_like(z))
        change = change.reshape(x.shape) / slope.abs().clamp_min(1e-12)
        if lost is not None and bool(lost.any()):  # nothing is demanded of what is not known
            empty = value.new_zeros(len(value), len(normals))
            return empty, empty.unsqueeze(2).expand(-1, -1, value.shape[1])
    target = layer.target(x, x).weight
    flat = normals.flatten(1)
    return target.flatten(1) @ flat.mT, flat * change.flatten(1).unsqueeze(1)


def of_batches(found: list[Demixed], evidence: Evidence) -> HeadSolution:
    """Return demixed heads as one solution.

    Raises
    ------
    UnsupportedModelError
        If one of them could not be demixed.
    """
    for batch in found:
        if not batch.solved:
            raise UnsupportedModelError(
                f"the {evidence.num_images} images of a batch could not be told apart at the head: "
                f"{batch.why_not}"
            )
    value = torch.cat([b.inputs for b in found])
    deviation = torch.cat([b.deviation for b in found]).unsqueeze(1).expand_as(value)
    noise = torch.tensor([max(b.noise, GRADIENT) for b in found]).to(value)
    labels = torch.stack([b.labels for b in found])
    return HeadSolution(
        torch.cat([b.cotangents for b in found]), value, deviation, noise, labels, found
    )


def _head_input(g: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve ``G = g x^T`` for the head's input ``x`` by weighted least squares.

    Every row gives ``x`` alone; rows are weighted by the inverse of their variance: even
    noise (a defence) plus rounding in proportion to the row.

    Returns
    -------
    x, deviation : Tensor, shape (N, features)
    noise : Tensor, shape (N,)
    """

    def solve(weight: Tensor) -> tuple[Tensor, Tensor]:
        total = (weight * g.square()).sum(1, keepdim=True).clamp_min(1e-300)
        x = torch.einsum("nc,ncf->nf", weight * g, head) / total
        return x, head - torch.einsum("nc,nf->ncf", g, x)

    size = head.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-300)[:, :, 0]
    x, rest = solve(torch.ones_like(g))
    rows = rest.square().mean(2).sqrt()
    used = head.abs().amax(2) > 0
    even = torch.where(used, rows, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num(0.0)
    rounding = FORWARD / 4 * g.abs() * x.square().mean(1, keepdim=True).sqrt()
    variance = even.square() + rounding.square()
    floor = variance.amax(1, keepdim=True) * 1e-12 + 1e-300
    weight = 1.0 / (variance + floor)
    weight = weight / weight.amax(1, keepdim=True)
    x, rest = solve(weight)
    freedom = max(1, (head.shape[1] - 1) * head.shape[2])
    noise = (rest.square().sum((1, 2)) / freedom).sqrt() / size[:, 0]
    spread = (weight.square() * g.square() * variance).sum(1, keepdim=True).sqrt()
    total = (weight * g.square()).sum(1, keepdim=True).clamp_min(1e-300)
    return x, (spread / total).expand_as(x), noise


def _rank_one(
    evidence: Evidence, labels: Tensor, place: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve ``G = g x^T`` without knowing ``g``: ``g = a u`` and ``x = (s / a) v``.

    ``s u v^T`` is the best approximation of rank one. ``g`` is negative at the label only,
    which gives the sign, and ``softmax(W x) - y = g`` gives the scale ``a``; of other losses with
    a link alike.

    Parameters
    ----------
    evidence : Evidence
    labels : Tensor, int64, shape (N, 1)
    place : int
        0 for the scale that fits best, 1 for the next.
    """
    head, weight = evidence.gradient[evidence.chain.head.weight_name], evidence.chain.head.weight[0]
    left, values, right = torch.linalg.svd(head, full_matrices=False)
    u, s, v = left[:, :, 0], values[:, :1].clamp_min(1e-300), right[:, 0]
    sign = torch.where(u.gather(1, labels) > 0, -1.0, 1.0)
    u, v = sign * u, sign * v
    a = _scale(s * (v @ weight.mT), u, labels, place, evidence.chain.loss)
    freedom = max(1, (head.shape[1] - 1) * head.shape[2])
    spread = (values[:, 1:].square().sum(1, keepdim=True) / freedom).sqrt()
    size = head.square().mean((1, 2)).sqrt().clamp_min(1e-300)
    x = s / a * v
    return a * u, x, (spread / a).expand_as(x), spread[:, 0] / size, labels


def _scale(w: Tensor, u: Tensor, labels: Tensor, place: int, loss: Loss) -> Tensor:
    """Return the ``a`` with ``softmax(w / a) - y = a u``, shape (N, 1).

    A grid over ``log a``, then golden sections, then Gauss-Newton steps to the last digit.
    """
    if not isinstance(loss, CanonicalLoss):
        raise UnsupportedModelError(
            f"the head has no bias, and under the loss {type(loss).__name__} its gradient does "
            "not tell the scale of its input"
        )
    each = labels.unsqueeze(1)  # (N, 1, 1): every try is a batch of one
    own = F.one_hot(labels, u.shape[1]).to(u)  # (N, 1, classes)

    def residual(t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(softmax - y) / a - u`` and its derivative, shape (N, len, classes)."""
        logits = w.unsqueeze(1) * torch.exp(-t).unsqueeze(2)
        p = loss.link(logits)
        g = loss.from_probabilities(p.unsqueeze(2), each).squeeze(2)
        if loss.independent(u.shape[1]) < u.shape[1]:
            g = g * (1 - own)
            g = g - own * g.sum(2, keepdim=True)  # p - 1 without cancellation
        change = loss.pushed(p.unsqueeze(2), -logits.unsqueeze(2), each).squeeze(2)
        size = torch.exp(t).unsqueeze(2)
        return g / size - u.unsqueeze(1), (change - g) / size

    def misfit(t: Tensor) -> Tensor:
        return residual(t)[0].square().sum(2)

    # p > 0 at the label bounds a.
    most = -u.gather(1, labels).abs().clamp_min(1e-12).log()
    grid = _LEAST + (most - _LEAST) * torch.linspace(0, 1, _GRID).to(u)
    value = misfit(grid)
    padded = F.pad(value, (1, 1), value=torch.inf)
    valley = (value <= padded[:, :-2]) & (value <= padded[:, 2:])
    best = value.masked_fill(~valley, torch.inf).topk(place + 1, 1, largest=False).indices
    t, step = grid.gather(1, best[:, place:]), (most - _LEAST) / (_GRID - 1)
    for _ in range(60):
        step = step * 0.618
        tries = torch.cat([t - step, t, t + step], 1)
        t = tries.gather(1, misfit(tries).argmin(1, keepdim=True))
    for _ in range(8):
        r, slope = residual(t)
        fresh = t - (r * slope).sum(2) / slope.square().sum(2).clamp_min(1e-300)
        t = torch.where(misfit(fresh) < misfit(t), fresh, t)
    return t.exp()


def _self_consistent(
    made: Tensor, logits: Tensor, g: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the head's ``dL/dlogits`` made from its input where that is more precise.

    The clients' loss makes ``g`` of the logits ``W x + b``: ``made``. The input ``x`` averages over
    all rows of the head's gradient, so under noise this ``g`` is better than the observed
    one. It is not taken where it contradicts the observed one: the loss may be another than the
    one declared. Then the observed one is as good as the head's gradient is of rank one.

    Returns
    -------
    g : Tensor, shape (N, classes)
    noise : Tensor, shape (N,)
        At least the difference of the two: a pruned head can look noiseless.
    """
    size = g.norm(dim=1).clamp_min(1e-300)
    miss = (made - g).norm(dim=1) / size
    # The client's float32 softmax rounds p - y: of a confident model's small g, a large part.
    rounding = SOFTMAX_MOST * (1 + logits.abs().amax(1)) / size
    miss = torch.where(miss < rounding, torch.zeros_like(miss), miss)
    # Of a pruned head entries are missing, and more noise than this bends both.
    whole = (g != 0).all(1) & (noise < _CONTRADICTED)
    other = whole & (miss > _FACTOR * noise)
    noise = torch.where(other, noise, noise.maximum(miss))
    use = ~other & (noise > CLEAN) & (miss < (5 * noise).clamp(0.5, 1.0))
    return torch.where(use.unsqueeze(1), made, g), noise
