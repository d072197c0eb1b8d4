"""From a corner over all positions: the columns that a convolution's shifts tie together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kernels.refusal import Refused

#: A kernel is believed, and a column taken for determined, where singular values exceed those
#: that should be zero by this factor.
GAP = 5.0


#: A node, and the taps that tell its column.
Step = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Relation:
    """Which position of one side of a convolution each tap ties to which of the other side.

    Attributes
    ----------
    reverse : bool
        Whether the nodes are positions of the output and their others those of the input, or the
        other way round.
    nodes : Tensor, shape (n,)
        The positions, without those of an input that no tap reads.
    to : Tensor, shape (taps, n)
        The other side's position, -1 where the tap ties the node to none.
    others : int
        Positions of the other side.
    """

    reverse: bool
    nodes: Tensor
    to: Tensor
    others: int

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, geometry: Geometry, reverse: bool) -> Relation:
        reads = geometry.reads
        if reverse:
            return cls(True, torch.arange(geometry.outputs), reads, geometry.positions)
        to = torch.full((geometry.taps, geometry.positions + 1), -1)
        index = torch.where(reads < 0, geometry.positions, reads)
        to.scatter_(1, index, torch.arange(geometry.outputs).expand_as(reads))
        nodes = geometry.seen.nonzero()[:, 0]
        return cls(False, nodes, to[:, nodes], geometry.outputs)

    @property
    def masks(self) -> list[int]:
        """Which taps tie each node to something, as bits."""
        bits = (self.to >= 0).long() << torch.arange(len(self.to)).unsqueeze(1)
        return [int(m) for m in bits.sum(0)]

    @property
    def anchors(self) -> list[int]:
        """Nodes that alone are silent at all of their silent taps: corners."""
        masks = self.masks
        return [i for i, m in enumerate(masks) if m and sum(not (o & ~m) for o in masks) == 1]

    def silent(self, node: int) -> int:
        """Return how many taps tie a node to nothing."""
        return int((self.to[:, node] < 0).sum())

    @lru_cache(maxsize=256)  # noqa: B019  # relations are themselves cached
    def plan(self, anchor: int) -> tuple[Step, ...] | None:
        """Return in which order the columns follow from an anchor's, and by which taps.

        ``None`` where some never do: with a stride, shifts reach a position from one side
        only, and polynomials of the shift are solutions beside the truth.
        """
        masks, to = self.masks, self.to.T.tolist()
        known = set(to[anchor])
        left = [i for i in range(len(to)) if i != anchor]
        steps: list[Step] = []
        while not {o for row in to for o in row} <= known:
            usable = {i: tuple(t for t, o in enumerate(to[i]) if o in known | {-1}) for i in left}
            ready = {i: t for i, t in usable.items() if _determined(t, masks)}
            if not ready:
                return None
            most = max(map(len, ready.values()))
            chosen = {i: t for i, t in ready.items() if len(t) == most}
            steps += chosen.items()
            known.update(o for i in chosen for o in to[i])
            left = [i for i in left if i not in chosen]
        return tuple(steps)


class Walk:
    """Columns ``x`` of the nodes and ``w`` of their others with ``B_d x = w`` or ``0``.

    Parameters
    ----------
    slices : Tensor, shape (taps, p, q)
        ``B_d``. Full column rank of all columns ``x`` together, ``q`` of them, is supposed.
    relation : Relation
    images : int
        Dimension of the solution.

    Attributes
    ----------
    gap : float
        How far singular values fall at the anchor's kernel.
    others : Tensor, shape (p, others, images)
        What :meth:`fill` found.

    Raises
    ------
    Refused
        No kernel of that dimension, or a column that the others do not determine.
    """

    def __init__(self, slices: Tensor, relation: Relation, images: int):
        self.slices, self.relation, self.images = slices, relation, images
        self.others = slices.new_zeros(slices.shape[1], relation.others, images)
        self._known = torch.zeros(relation.others, dtype=torch.bool)
        self._factors: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.gap, self._noise = 0.0, 0.0
        for anchor in relation.anchors:
            if relation.plan(anchor) is not None:
                self._try(anchor)
        if self.gap < GAP:
            raise Refused(
                f"blind convolution: at a corner singular values fall by {self.gap:.1f} after "
                f"the last {images}, {GAP} is asked for"
            )

    def _try(self, anchor: int) -> None:
        """Begin at this anchor if its kernel is clearer than those so far."""
        silent = (self.relation.to[:, anchor] < 0).nonzero()[:, 0]
        stacked = self.slices[silent.to(self.slices.device)].flatten(0, 1)
        if len(stacked) < stacked.shape[1] - self.images:
            return
        if len(stacked) > stacked.shape[1]:
            stacked = torch.linalg.qr(stacked, mode="r").R
        _, s, vh = torch.linalg.svd(stacked, full_matrices=True)
        s = torch.cat([s, s.new_zeros(vh.shape[0] - len(s))])
        rank = len(s) - self.images
        # Where rows are missing zeros are exact: then rounding in double is the noise.
        noise = float(s[rank].maximum(1e-15 * self.slices.norm()))
        least = float(s[rank - 1]) if rank else float(self.slices.norm())
        if least / noise > self.gap:
            self.gap, self._noise = least / noise, noise
            self._anchor, self._first = anchor, vh[rank:].mT

    def fill(self) -> None:
        """Find every column, those first that most equations tell."""
        self._learn(self._anchor, self._first)
        for node, taps in self.relation.plan(self._anchor) or ():
            self._learn(node, self._solve(node, taps))

    def _factor(self, taps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the QR factors of the stacked slices, which many positions share."""
        if taps not in self._factors:
            stacked = self.slices[list(taps)].flatten(0, 1)
            q, r = torch.linalg.qr(stacked)
            least = float(torch.linalg.svdvals(r)[-1]) if len(r) == r.shape[1] else 0.0
            if least <= GAP * self._noise:
                raise Refused(
                    "blind convolution: a position is not determined by its neighbours "
                    f"(singular value {least:.1e} under noise {self._noise:.1e})"
                )
            self._factors[taps] = q, r
        return self._factors[taps]

    def _solve(self, node: int, taps: tuple[int, ...]) -> Tensor:
        q, r = self._factor(taps)
        to = [int(self.relation.to[t, node]) for t in taps]
        zero = torch.zeros_like(self.others[:, 0])
        right = torch.cat([self.others[:, o] if o >= 0 else zero for o in to])
        return torch.linalg.solve_triangular(r, q.mT @ right, upper=True)

    def _learn(self, node: int, column: Tensor) -> None:
        """Enter what the taps make of a node's column."""
        for tap, other in enumerate(self.relation.to[:, node].tolist()):
            if other >= 0 and not self._known[other]:
                self.others[:, other] = self.slices[tap] @ column
                self._known[other] = True


def _determined(taps: tuple[int, ...], masks: list[int]) -> bool:
    """Whether no node is silent at all of these taps."""
    used = sum(1 << t for t in taps)
    return all(m & used for m in masks)
