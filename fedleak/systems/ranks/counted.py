"""The rank of a convolution's system ``U = [A; K(e)]`` for generic weights, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.systems.ranks.structure import reach, stride_classes
from fedleak.systems.windows import Windows


def counted_rank(windows: Windows, used: Tensor, known: Tensor) -> int:
    """Return the rank that generic weights and a generic ``e`` give.

    Let ``k`` be the rank of one input channel's block of ``K``, ``u`` the pixels that the
    kernels cover, ``C`` and ``F`` the channels in and out. Then ``K`` has rank ``C k``, and
    what is left to ``A`` are the ``C (u - k)`` dimensions of its null space. The rows of
    ``A`` and ``K`` share the relations ``<e_f, A x|_g> = <W_g, K(e_f) x>``: on that null
    space the ``P`` outputs of each filter lie across from ``rank(e) = min(F, P)`` directions.
    They also lie in the span of the null space's shifts by the kernel's offsets. The least
    of these counts bounds the rank from above, and generic systems reach it.

    Exact on the usual layers. It over-estimates where padding cuts off whole patches (a
    kernel as large as the stride), and by a few dimensions where the equations are about as
    many as the unknowns: :func:`fedleak.systems.ranks.convolution.convolution_ranks` judges.

    Parameters
    ----------
    windows : Windows
    used, known : Tensor of bool, shape (groups, filters, positions)
        Where ``e`` is not zero, and outputs that have a weight row: filters of zeros have no
        gradient rows, and missing outputs break relations, too.
    """
    channels = windows.in_shape[0] // len(used)
    classes = stride_classes(windows)
    rank = 0
    for own, told in zip(used, known, strict=True):
        live = int(own.any(1).sum())
        blocks = [min(live * offsets, pixels) for offsets, pixels in classes]
        free = sum(pixels for _, pixels in classes) - sum(blocks)
        counts = told.sum(1) - _relations(own, told)
        weight = int(counts.clamp(0, reach(windows, live)).sum())
        rank += channels * sum(blocks) + min(channels * free, weight)
    return rank


def _relations(used: Tensor, known: Tensor) -> Tensor:
    """Return how many combinations of the ``e_f`` vanish where a filter's outputs are hidden.

    Both arguments have shape (filters, positions), the result (filters,).
    """

    def generic_rank(e: Tensor) -> Tensor:
        return torch.minimum(e.any(-1).sum(-1), e.any(-2).sum(-1))

    return generic_rank(used) - generic_rank(used & ~known.unsqueeze(1))


def counted_batch_rank(windows: Windows, used: Tensor, known: Tensor) -> int:
    """Return the rank that a batch's system has for generic weights.

    As :func:`counted_rank`, with weight rows of each image's own and the gradient rows
    shared: ``sum_b K(e_b) x_b = dL/dW``.

    Parameters
    ----------
    windows : Windows
    used, known : Tensor of bool, shape (B, groups, filters, positions)
    """
    batch, groups = used.shape[:2]
    channels = windows.in_shape[0] // groups
    classes = stride_classes(windows)
    covered = sum(pixels for _, pixels in classes)
    rank = 0
    for g in range(groups):
        live = used[:, g].any(2).any(0)
        block = sum(min(int(live.sum()) * o, batch * pixels) for o, pixels in classes)
        missed = torch.einsum("bfp,bgp->fg", used[:, g].double(), (~known[:, g]).double())
        relations = int((missed[live] == 0).sum())
        weight = int(known[:, g].flatten(1).sum(1).clamp(max=channels * covered).sum())
        joint = min(batch * channels * covered, weight + channels * block - relations)
        rank += max(channels * block, weight, joint)
    return rank
