"""The rank of a layer's system ``U = [A; K(e)]``: exactly, and in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.solvers import cgls
from fedleak.systems import Affine, Rows
from fedleak.systems.conv import Conv

#: A singular value counts when it exceeds this part of the largest one. A float32 gradient
#: says nothing about directions below it, and a Gram matrix in float64 resolves no smaller.
TOLERANCE = 1e-7
#: :func:`layer_ranks` are exact up to this many unknowns.
AUTO_UNKNOWNS = 600
# An eigenvalue of a Gram matrix, relative to the largest, does not count below the first
# bound and counts above the second; between them an SVD decides.
_GRAM_ZERO, _GRAM_SURE = 1e-14, 1e-11


def structural_rank(layer: Affine, e: Tensor | None = None, known: Tensor | None = None) -> int:
    """Return the rank that generic weights and a generic ``e`` give, in closed form.

    With ``k`` the rank of one input channel's block of ``K``, ``u`` the pixels that the
    kernels cover, ``C`` and ``F`` the channels in and out and ``|W|`` the weight
    constraints, the rank is ``max(C k, min(C u, |W| + C k - F^2))`` for each group: the
    rows of ``A`` and ``K`` share the ``F^2`` relations ``<e_f, A x|_g> = <W_g, K(e_f) x>``.

    Exact on the usual layers. It over-estimates some with few filters or pixels, and where
    the kernel equals a stride of 2 with padding: :func:`exact_rank` is the judge.

    Parameters
    ----------
    layer : Affine
    e : Tensor, shape (*out_shape), optional
        ``dL/dz``: its filters of zeros have no gradient rows.
    known : Tensor of bool, shape (*out_shape), optional
        Outputs that have a weight row. Missing ones break relations, too.
    """
    groups, filters, _ = layer.weight.shape
    shape = (groups, filters, -1)
    ones = torch.ones(layer.out_shape, dtype=torch.bool, device=layer.weight.device)
    used = (ones if e is None else e != 0).reshape(shape)
    known = (ones if known is None else known).reshape(shape)
    if not isinstance(layer, Conv):  # fully connected: K(e) x = e x^T alone gives x
        return layer.unknowns if bool(used.any()) else min(layer.unknowns, int(known.sum()))
    channels = layer.in_shape[0] // groups
    rank = 0
    for g in range(groups):
        live = used[g].any(1)
        covered, block = _blocks(layer, int(live.sum()))
        missed = used[g].double() @ (~known[g]).double().mT
        relations = int((missed[live] == 0).sum())
        joint = min(channels * covered, int(known[g].sum()) + channels * block - relations)
        rank += max(channels * block, joint)
    return rank


def _blocks(layer: Conv, filters: int, batch: int = 1) -> tuple[int, int]:
    """Return the pixels one channel's kernels cover, and the rank of its block of K.

    The block is that of ``batch`` images beside each other.
    """
    rows, columns = (_axis(layer, axis) for axis in (0, 1))
    covered = sum(p for _, p in rows.values()) * sum(p for _, p in columns.values())
    block = sum(
        min(filters * oi * oj, batch * pi * pj)
        for oi, pi in rows.values()
        for oj, pj in columns.values()
    )
    return covered, block


def _axis(layer: Conv, axis: int) -> dict[int, tuple[int, int]]:
    """Return, per stride class along one axis, kernel offsets and the pixels they reach."""
    w = layer.windows
    size, out = layer.in_shape[1 + axis], layer.out_shape[1 + axis]
    kernel, stride, dilation = w.kernel[axis], w.stride[axis], w.dilation[axis]
    before = w.padding[2 - 2 * axis]
    offsets: dict[int, int] = {}
    pixels: dict[int, set[int]] = {}
    for k in range(kernel):
        offset = k * dilation
        cls = offset % stride
        reached = {p for o in range(out) if 0 <= (p := o * stride + offset - before) < size}
        offsets[cls] = offsets.get(cls, 0) + bool(reached)
        pixels.setdefault(cls, set()).update(reached)
    return {cls: (offsets[cls], len(pixels[cls])) for cls in offsets}


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
        covered, block = _blocks(layer, int(live.sum()), batch)
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

    The rows of ``K`` are block diagonal over a group's input channels with identical
    blocks, so one block is factored once; what remains is the rank of ``A`` on the null
    space of ``K``.

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
        Number of singular values above ``1e-7`` times the largest of their block.
    """
    groups, filters, _ = layer.weight.shape
    channels = layer.in_shape[0] // groups
    pixels = layer.unknowns // groups // channels
    rank = 0
    for g, (a, k) in enumerate(dense_system(layer, e)):
        if known is not None:
            a = a[known.reshape(groups, -1)[g]]
        block = k.reshape(filters, channels, -1, channels, pixels)[:, 0, :, 0]
        _, values, vectors = torch.linalg.svd(block.flatten(0, 1), full_matrices=False)
        basis = vectors[values > TOLERANCE * values.max()]
        rows = a.reshape(-1, channels, pixels)
        rest = (rows - (rows @ basis.mT) @ basis).flatten(1)
        rank += channels * basis.shape[0]
        if len(a):
            rank += _rank(rest, _gram_spectrum(a)[-1])
    return rank


def _gram_spectrum(m: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m)


def _rank(m: Tensor, largest: Tensor) -> int:
    """Return the rank of ``m``; ``largest`` is the squared singular value to compare with."""
    spectrum = _gram_spectrum(m) / largest
    if bool(((spectrum > _GRAM_ZERO) & (spectrum < _GRAM_SURE)).any()):
        values = torch.linalg.svdvals(m)
        return int((values > TOLERANCE * largest.sqrt()).sum())
    return int((spectrum >= _GRAM_SURE).sum())
