"""The rank of a layer's system ``U = [A; K(e)]``: exact, in closed form, by probing."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.metric.rank_exact import numerical_ranks, selection
from fedleak.metric.rank_linalg import TOLERANCE
from fedleak.metric.rank_structure import reach, stride_classes
from fedleak.solvers import cgls
from fedleak.systems import Affine, Rows
from fedleak.systems.conv import Conv

__all__ = [
    "TOLERANCE",
    "batch_rank",
    "dense_system",
    "exact_rank",
    "layer_ranks",
    "probed_rank",
    "structural_rank",
]

#: :func:`layer_ranks` are exact up to this many unknowns.
AUTO_UNKNOWNS = 600


def structural_rank(layer: Affine, e: Tensor | None = None, known: Tensor | None = None) -> int:
    """Return the rank that generic weights and a generic ``e`` give, in closed form.

    Let ``k`` be the rank of one input channel's block of ``K``, ``u`` the pixels that the
    kernels cover, ``C`` and ``F`` the channels in and out. Then ``K`` has rank ``C k``, and
    what is left to ``A`` are the ``C (u - k)`` dimensions of its null space. The rows of
    ``A`` and ``K`` share the relations ``<e_f, A x|_g> = <W_g, K(e_f) x>``: on that null
    space the ``P`` outputs of each filter lie across from ``rank(e) = min(F, P)`` directions.
    They also lie in the span of the null space's shifts by the kernel's offsets. The least
    of these counts bounds the rank from above, and generic systems reach it.

    Exact on the usual layers. It over-estimates where padding cuts off whole patches (a
    kernel as large as the stride), and by a few dimensions where the equations are about as
    many as the unknowns: :func:`exact_rank` is the judge.

    Parameters
    ----------
    layer : Affine
    e : Tensor, shape (*out_shape), optional
        ``dL/dz``: its filters of zeros have no gradient rows.
    known : Tensor of bool, shape (*out_shape), optional
        Outputs that have a weight row. Missing ones break relations, too.

    Returns
    -------
    int
    """
    groups, filters, _ = layer.weight.shape
    shape = (groups, filters, -1)
    ones = torch.ones(layer.out_shape, dtype=torch.bool, device=layer.weight.device)
    used = (ones if e is None else e != 0).reshape(shape)
    known = (ones if known is None else known).reshape(shape)
    if not isinstance(layer, Conv):  # fully connected: K(e) x = e x^T alone gives x
        return layer.unknowns if bool(used.any()) else min(layer.unknowns, int(known.sum()))
    channels = layer.in_shape[0] // groups
    classes = stride_classes(layer)
    rank = 0
    for g in range(groups):
        live = int(used[g].any(1).sum())
        blocks = [min(live * offsets, pixels) for offsets, pixels in classes]
        free = sum(pixels for _, pixels in classes) - sum(blocks)
        counts = known[g].sum(1) - _relations(used[g], known[g])
        weight = int(counts.clamp(0, reach(layer, live)).sum())
        rank += channels * sum(blocks) + min(channels * free, weight)
    return rank


def _relations(used: Tensor, known: Tensor) -> Tensor:
    """Return how many combinations of the ``e_f`` vanish where a filter's outputs are hidden.

    Both arguments have shape (filters, positions), the result (filters,).
    """

    def generic_rank(e: Tensor) -> Tensor:
        return torch.minimum(e.any(-1).sum(-1), e.any(-2).sum(-1))

    return generic_rank(used) - generic_rank(used & ~known.unsqueeze(1))


def batch_rank(layer: Affine, e: Tensor, known: Tensor) -> int:
    """Return the rank that a batch's system has for generic weights, in closed form.

    As :func:`structural_rank`, with weight rows of each image's own and the gradient rows
    shared: ``sum_b K(e_b) x_b = dL/dW``.

    Parameters
    ----------
    layer : Affine
    e : Tensor, shape (B, *out_shape)
    known : Tensor of bool, shape (B, *out_shape)
        Outputs that have a weight row.
    """
    batch, (groups, filters, _) = len(e), layer.weight.shape
    shape = (batch, groups, filters, -1)
    used, known = (e != 0).reshape(shape), known.reshape(shape)
    unknowns = layer.unknowns // groups
    if not isinstance(layer, Conv):  # the gradient rows E^T X tell min(B, outputs) images apart
        told = min(batch, int(used.any(0).sum()), int(torch.linalg.matrix_rank(e.flatten(1))))
        rows = known.flatten(1).sum(1).clamp(max=unknowns).sort(descending=True).values
        return told * unknowns + int(rows[: batch - told].sum())
    channels = layer.in_shape[0] // groups
    rank = 0
    for g in range(groups):
        live = used[:, g].any(2).any(0)
        classes = stride_classes(layer)
        covered = sum(pixels for _, pixels in classes)
        block = sum(min(int(live.sum()) * o, batch * pixels) for o, pixels in classes)
        missed = torch.einsum("bfp,bgp->fg", used[:, g].double(), (~known[:, g]).double())
        relations = int((missed[live] == 0).sum())
        weight = int(known[:, g].flatten(1).sum(1).clamp(max=channels * covered).sum())
        joint = min(batch * channels * covered, weight + channels * block - relations)
        rank += max(channels * block, weight, joint)
    return rank


def layer_ranks(layer: Affine, e: Tensor, known: Tensor, batch: int = 1) -> tuple[Tensor, bool]:
    """Return the rank of a layer's system for each update, and whether it is exact.

    Small layers are ranked exactly. Of large ones the constraints are counted; where
    outputs are unknown or ``e`` has zeros, a full count is put to the test
    (:func:`probed_rank`).

    Parameters
    ----------
    layer : Affine
    e : Tensor, shape (N * batch, *out_shape)
    known : Tensor of bool, shape (N * batch, *out_shape)
        Outputs that have a weight row.
    batch : int
        Images of each update, which share their gradient rows; more than one are counted.

    Returns
    -------
    ranks : Tensor, int64, shape (N,)
    exact : bool
    """
    if batch > 1:
        parts = zip(e.split(batch), known.split(batch), strict=True)
        return torch.tensor([batch_rank(layer, *part) for part in parts]), False
    exact = layer.unknowns <= AUTO_UNKNOWNS
    rank = exact_rank if exact else structural_rank
    generic = (known & (e != 0)).flatten(1).all(1)
    ranks = torch.zeros(len(e), dtype=torch.int64)
    if bool(generic.any()):  # generic errors give one rank for all
        ranks[generic.cpu()] = rank(layer, e[generic][0])
    for n in (~generic).nonzero().flatten().tolist():
        ranks[n] = rank(layer, e[n], known[n])
    if not exact and isinstance(layer, Conv):
        doubtful = ~generic.cpu() & (ranks == layer.unknowns)
        if bool(doubtful.any()):
            ranks[doubtful] = probed_rank(layer, e[doubtful], known[doubtful])
    return ranks, exact


def probed_rank(
    layer: Affine, e: Tensor, known: Tensor, probes: int = 2, iterations: int = 3000
) -> Tensor:
    """Estimate the rank of each update's system from products with it alone.

    The least-norm solution of ``U x = U x_0`` misses the part of ``x_0`` in the null space:
    of a random ``x_0`` that is on average the null space's share of all dimensions. What
    the solver cannot find in ``iterations`` steps counts as not determined.

    Returns
    -------
    Tensor, int64, shape (N,)
    """
    many = [v.repeat_interleave(probes, 0) for v in (e, known.to(e))]
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(len(many[0]), *layer.in_shape, generator=generator, dtype=e.dtype).to(e.device)
    rows = layer.apply(x0, many[0])
    mask = many[1]
    balance = _rms(rows.weight) / _rms(rows.gradient)
    scale = balance.reshape(-1, *[1] * (rows.gradient.dim() - 1))

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        made = layer.apply(x, many[0])
        return made.weight * mask, made.gradient * scale

    def adjoint(r: tuple[Tensor, ...]) -> Tensor:
        return layer.adjoint(Rows(r[0] * mask, r[1] * scale), many[0])

    rhs = (rows.weight * mask, rows.gradient * scale)
    x, _ = cgls(apply, adjoint, rhs, torch.zeros_like(x0), 1e-10, iterations)
    share = (x - x0).flatten(1).square().sum(1) / x0.flatten(1).square().sum(1)
    n = layer.unknowns
    share = share.reshape(-1, probes).cpu()
    # A null space of one dimension has a share of about 1 / n, rarely below a hundredth of it.
    full = (share * n < 1e-2).all(1)
    estimate = (n * (1 - share.mean(1))).round().long().clamp(max=n - 1)
    return torch.where(full, n, estimate)


def _rms(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(1).sqrt().clamp_min(1e-300)


def dense_system(layer: Affine, e: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return ``(A, K(e))`` of each group as dense matrices over the group's own input.

    Only rank analysis and tests build them; no attack does.

    Parameters
    ----------
    layer : Affine
    e : Tensor, shape (*out_shape)

    Returns
    -------
    list of (Tensor, Tensor)
        Shapes (filters * positions, n) and (filters * fan_in, n), with ``n`` the inputs
        of one group.
    """
    weight = layer.weight
    groups, filters, fan_in = weight.shape
    n = layer.unknowns // groups
    # Which input each entry of each patch reads; 0 stands for padding.
    ordinal = torch.arange(1, n + 1, dtype=weight.dtype, device=weight.device)
    index = layer.patches(ordinal.repeat(groups).reshape(1, *layer.in_shape))[0].round().long()
    e = e.to(weight).reshape(groups, filters, -1)
    systems = []
    for g in range(groups):
        positions = index[g].shape[1]
        a = weight.new_zeros(filters, positions, n + 1)
        a.scatter_add_(
            2,
            index[g].T.expand(filters, -1, -1),
            weight[g].unsqueeze(1).expand(-1, positions, -1),
        )
        k = weight.new_zeros(filters, fan_in, n + 1)
        k.scatter_add_(
            2, index[g].expand(filters, -1, -1), e[g].unsqueeze(1).expand(-1, fan_in, -1)
        )
        systems.append((a.flatten(0, 1)[:, 1:], k.flatten(0, 1)[:, 1:]))
    return systems


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
        See :func:`fedleak.metric.rank_exact.numerical_ranks`.
    """
    return numerical_ranks(layer, e, None if known is None else selection(known)).joint
