"""The rank of any linear system, from products with it alone: dense where small, else probed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.solvers.least_squares import cgls
from fedleak.systems.ranks.blocks import Ranks
from fedleak.systems.ranks.linalg import TOLERANCE, count_above, counted
from fedleak.tensors import per_update, rms

#: Unknowns up to which a system without a closed form is written out to be ranked.
DENSE_UNKNOWNS = 2048
#: Unknowns up to which one is probed: the solver's steps grow with them.
PROBED_UNKNOWNS = 16384
#: Columns that are made together, in entries of the widest of their vectors.
_ENTRIES = 2e7
#: Entries of a system that may be written out whole, where its Gram matrix leaves doubt.
_WHOLE = 2e8


@dataclass(frozen=True)
class Operators:
    """Products with the two blocks of ``U = [A; K(e)]`` of one update.

    Attributes
    ----------
    shape : tuple of int
        Of the unknowns; with a batch ``(B, *in_shape)``.
    apply : callable
        ``x -> (A x, K x)``, for ``x`` of shape (k, *shape); a block without rows has 0 columns.
    adjoint : callable
        ``(a, b) -> A^T a + K^T b``.
    """

    shape: tuple[int, ...]
    apply: Callable[[Tensor], tuple[Tensor, Tensor]]
    adjoint: Callable[[Tensor, Tensor], Tensor]

    @property
    def unknowns(self) -> int:
        return torch.Size(self.shape).numel()


def dense_ranks(system: Operators, like: Tensor) -> Ranks:
    """Return the numerical ranks of both blocks and of the whole.

    Each block is scaled to a largest singular value of 1, as what it says does not depend on
    its unit; singular values count above :data:`TOLERANCE`.
    """
    n = system.unknowns
    columns: tuple[list[Tensor], list[Tensor]] = ([], [])
    grams: tuple[list[Tensor], list[Tensor]] = ([], [])
    sizes = [r.flatten(1).shape[1] for r in system.apply(like.new_zeros(1, *system.shape))]
    keep = n * max(sizes) <= _WHOLE
    together = max(1, int(_ENTRIES / max(*sizes, n)))
    for index in torch.arange(n, device=like.device).split(together):
        unit = like.new_zeros(len(index), n)
        unit[torch.arange(len(index)), index] = 1.0
        rows = system.apply(unit.reshape(-1, *system.shape))
        for i, row in enumerate(rows):
            other = [torch.zeros_like(r) for r in rows]
            other[i] = row
            grams[i].append(system.adjoint(*other).flatten(1))
            if keep:
                columns[i].append(row.flatten(1))
    own = [torch.cat(g).cpu() for g in grams]
    largest = [float(torch.linalg.matrix_norm(g, 2)) if g.any() else 0.0 for g in own]
    whole = [torch.cat(c).cpu() for c in columns] if keep else None

    def rank(blocks: tuple[int, ...]) -> tuple[int, bool]:
        told = [i for i in blocks if largest[i] > 0]
        if not told:
            return 0, True
        gram = torch.stack([own[i] / largest[i] for i in told]).sum(0)
        found = counted((gram + gram.mT) / 2, 1.0)
        if found is None and whole is not None:
            rows = torch.cat([whole[i] / largest[i] ** 0.5 for i in told], 1)
            return count_above(rows, TOLERANCE), True
        # In doubt a direction is open: nobody is told to know what he may not know.
        return _surely(gram) if found is None else found, found is not None

    weight, gradient, joint = rank((0,)), rank((1,)), rank((0, 1))
    return Ranks(weight[0], gradient[0], joint[0], joint[1])


def _surely(gram: Tensor) -> int:
    return int((torch.linalg.eigvalsh((gram + gram.mT) / 2) > 1e-11).sum())


def probed_rank(
    apply: Callable[[Tensor], tuple[Tensor, Tensor]],
    adjoint: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    known: Tensor,
    probes: int = 2,
    iterations: int = 3000,
) -> Tensor:
    """Estimate the rank of each update's system from products with it alone.

    The least-norm solution of ``U x = U x_0`` misses the part of ``x_0`` in the null space:
    of a random ``x_0`` that is on average the null space's share of all dimensions. What
    the solver cannot find in ``iterations`` steps counts as not determined.

    Parameters
    ----------
    apply, adjoint : callable
        As of :class:`Operators`, for N updates with ``probes`` vectors of each, after each
        other: shape (N * probes, ...).
    start : Tensor, shape (N * probes, ...)
        Sets shape, type and device of the vectors.
    known : Tensor, shape like the weight rows
        1 for rows that there are, 0 for others.
    probes, iterations : int

    Returns
    -------
    Tensor, int64, shape (N,)
    """
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(start.shape, generator=generator, dtype=start.dtype).to(start.device)
    weight, gradient = apply(x0)
    scale = rms(weight).flatten() / rms(gradient).flatten() if gradient.numel() else 0 * x0[:, 0]
    scale = per_update(scale, gradient)

    def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
        weight, gradient = apply(x)
        return weight * known, gradient * scale

    def adjoint_scaled(r: tuple[Tensor, ...]) -> Tensor:
        return adjoint(r[0] * known, r[1] * scale)

    rhs = (weight * known, gradient * scale)
    x, _ = cgls(scaled, adjoint_scaled, rhs, torch.zeros_like(x0), 1e-10, iterations)
    share = (x - x0).flatten(1).square().sum(1) / x0.flatten(1).square().sum(1)
    n = x0[0].numel()
    share = share.reshape(-1, probes).cpu()
    # A null space of one dimension has a share of about 1 / n, rarely below a hundredth of it.
    full = (share * n < 1e-2).all(1)
    estimate = (n * (1 - share.mean(1))).round().long().clamp(max=n - 1)
    return torch.where(full, n, estimate)
