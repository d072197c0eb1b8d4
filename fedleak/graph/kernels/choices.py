r"""Which entry of each max pool's window was chosen: integers beside a linear system.

The gradient of a convolution below a max pool is ``G_c = sum_p e_c(p) X_{s(c, p)}``: of every
window ``p`` the patch of the input that the chosen entry ``s`` saw, times a derivative that is
known. With the choices given the input solves a linear system, and with the input given each
filter's gradient, of many numbers, tells its choices. So they are found in turn, from an estimate
of the input (an image that was matched to the layers above): the input by least squares under the
residual of each filter, so that filters whose choices are right come to rule, and near the
estimate, nearer for images that make the known maxima; the choices one window after the other, by
the residual and by the known maximum. Where that ends without explaining every gradient, the input
has often come nearer all the same, and images matched to it are a better estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak import deadline
from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kernels.refusal import EXPLAINED
from fedleak.graph.kernels.rows import cotangent_matrix

#: How far, in units of what the residual says, an estimate may be off; how many rounds begin with
#: choices in part; tried one after the other.
_TRIES = ((1.0, 0), (10.0, 8))
#: Rounds at most, sweeps over the windows in each, new weights of the filters in each.
_ROUNDS, _SWEEPS, _WEIGHTS = 60, 3, 4
#: Part of the median filter's gradient up to which a try has come near.
_NEAR = 1e-2
#: Rounds without a smaller residual after which a try is given up.
_PATIENCE = 8


@dataclass(frozen=True, eq=False)
class Pooled:
    """A convolution below a max pool whose output and cotangent are known.

    Attributes
    ----------
    gradient : Tensor, shape (C_out, C_in, kh, kw)
        Of the weight.
    geometry : Geometry
    windows : Tensor of int, shape (windows, k)
        Of every output of the pool the positions of the convolution's output that it compares;
        positions of all images are numbered on.
    derivative : Tensor, shape (C_out, windows)
        Of the loss by the convolution's output at the chosen entry; zero where none is active.
    value : Tensor, shape (C_out, windows)
        The pool's output.
    entries : callable
        Takes an input (B, C_in, H, W) and returns what the pool compares, (B, C_out, H', W').
    """

    gradient: Tensor
    geometry: Geometry
    windows: Tensor
    derivative: Tensor
    value: Tensor
    entries: Callable[[Tensor], Tensor]

    @property
    def images(self) -> Tensor:
        """The image of every window, (windows,)."""
        return self.windows[:, 0] // self.geometry.outputs

    @property
    def active(self) -> Tensor:
        return self.derivative != 0

    def compared(self, x: Tensor) -> Tensor:
        """Return the entries of every window, (C_out, windows, k)."""
        return self.entries(x).transpose(0, 1).flatten(1)[:, self.windows]

    def patches(self, x: Tensor) -> Tensor:
        """Return what every entry's filter saw, (windows, k, C_in * taps)."""
        taken = self.geometry.patches(x)  # (B, C_in, taps, outputs)
        return taken.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)[self.windows]

    def cotangent(self, shares: Tensor) -> Tensor:
        """Return the derivative by the convolution's output, (B, C_out, H', W')."""
        filters, outputs = len(self.gradient), self.geometry.outputs
        images = int(self.windows.max()) // outputs + 1
        e = self.gradient.new_zeros(filters, images * outputs)
        index = self.windows.flatten().expand(filters, -1)
        e.scatter_add_(1, index, (shares * self.derivative[..., None]).flatten(1))
        return e.reshape(filters, images, *self.geometry.out).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Resolved:
    """What :func:`resolve_choices` found.

    Attributes
    ----------
    cotangent : Tensor, shape (B, C_out, H', W')
        Derivative of the loss by the convolution's output.
    input : Tensor, shape (B, C_in, H, W)
        As the rows tell it, near the estimate where they leave directions open.
    worst, median : float
        The part of a filter's gradient that is not explained.
    """

    cotangent: Tensor
    input: Tensor
    worst: float
    median: float

    @property
    def explained(self) -> bool:
        """Whether the choices explain every filter's gradient: then they are the true ones."""
        return self.worst <= EXPLAINED


def resolve_choices(pooled: Pooled, start: Tensor) -> Resolved:
    """Find the choices of a max pool from an estimate of the convolution's input.

    Parameters
    ----------
    pooled : Pooled
    start : Tensor, shape (B, C_in, H, W)
        The estimate.
    """
    best: Resolved | None = None
    for reach, soft in _TRIES:
        search = _Search(pooled, start, reach)
        search.run(soft)
        cotangent = pooled.cotangent(search.shares)
        found = Resolved(cotangent, search.x, search.worst, search.median)
        if best is None or found.explained or found.median < best.median:
            best = found
        if best.median < _NEAR:  # explained, or what is open are a few choices
            break
    assert best is not None
    return best


class _Search:
    """Where the alternation stands."""

    def __init__(self, pooled: Pooled, start: Tensor, reach: float):
        self.pooled, self.x, self.reach = pooled, start.clone(), reach
        self.flat = pooled.gradient.flatten(1)
        self.size = self.flat.square().mean(1)
        self.live = pooled.active.any(1) & (self.size > 1e-18 * self.size.max())
        self.floor = 1e-14 * float(self.size.max())
        k = pooled.windows.shape[1]
        self.shares = pooled.active.to(start)[..., None].expand(-1, -1, k) / k
        self.least = 1e-14 * float(pooled.value.square().mean())
        self.worst = self.median = float("inf")

    def run(self, soft: int) -> None:
        """Alternate as long as less and less of the filters' gradients is left."""
        best, since = float("inf"), 0
        for round_ in range(_ROUNDS):
            if deadline.passed():
                break
            self.choose(round_ < soft)
            self.solve(round_ < soft)
            since = 0 if self.median < 0.95 * best else since + 1
            best = min(best, self.median)
            if self.worst <= EXPLAINED or (since > _PATIENCE and round_ > soft):
                break

    def choose(self, soft: bool) -> None:
        """Renew every window's shares: all on one entry, or by how probable each is."""
        e, active = self.pooled.derivative, self.pooled.active
        patches, entries = self.pooled.patches(self.x), self.pooled.compared(self.x)
        off = (self.pooled.value[..., None] - entries).square()
        if not soft:
            self.shares = _one(entries.argmax(2), entries.shape[2]) * active[..., None]
        self.spread = self.by_image(self.shares * off) / self.by_image(self.shares).clamp_min(1)
        self.spread.clamp_min_(self.least)
        by_value = off / (2 * self.spread[self.pooled.images])[:, None]
        rest = self.flat - torch.einsum("cps,psd->cd", self.shares * e[..., None], patches)
        energies = patches.square().sum(2)
        for _ in range(_SWEEPS):
            noise = rest.square().mean(1).clamp_min(self.floor)[:, None]
            for p, patch in enumerate(patches):
                each = e[:, p, None]
                without = rest + (self.shares[:, p] * each) @ patch
                by_rows = (each.square() * energies[p] - 2 * each * (without @ patch.mT)) / (
                    2 * noise
                )
                likely = -by_rows - by_value[:, p]
                fresh = likely.softmax(1) if soft else _one(likely.argmax(1), len(patch))
                fresh = fresh * active[:, p, None]
                rest = without - (fresh * each) @ patch
                self.shares[:, p] = fresh
        noise = rest.square().mean(1)
        if soft:  # what the choices still leave open
            doubt = (self.shares * (1 - self.shares)).sum(2)
            mixed = (patches - patches.mean(1, keepdim=True)).square().mean()
            noise = noise + (e.square() * doubt).sum(1) * mixed
        self.noise = noise.clamp_min(self.floor)

    def by_image(self, entries: Tensor) -> Tensor:
        """Return the sum over the windows of each image, (B,)."""
        total = entries.new_zeros(len(self.x))
        return total.index_add(0, self.pooled.images, entries.sum((0, 2)))

    def solve(self, soft: bool) -> None:
        """Renew the input, and what part of the filters' gradients is left."""
        geometry, images = self.pooled.geometry, len(self.x)
        matrix = cotangent_matrix(self.pooled.cotangent(self.shares), geometry)
        right = self.pooled.gradient.flatten(2).mT  # (C_out, taps, C_in)
        x = self.x.transpose(0, 1).flatten(1).mT  # (B * positions, C_in)
        size, near = float(x.square().mean().sqrt()), x
        trust = (self.spread / self.spread.mean()).sqrt().repeat_interleave(geometry.positions)
        for _ in range(1 if soft else _WEIGHTS):
            weight = self.noise.rsqrt()[:, None, None]
            rows, wanted = (matrix * weight).flatten(0, 1), (right * weight).flatten(0, 1)
            part = (self.noise / self.size.clamp_min(self.floor)).sqrt().clamp_max(1)
            damping = (self.reach * float(part[self.live].median()) * size * trust) ** -2
            gram = rows.mT @ rows
            gram.diagonal().add_(damping)
            x = torch.linalg.solve(gram, rows.mT @ wanted + damping[:, None] * near)
            left = (matrix @ x - right).square().mean((1, 2))
            if not soft:
                self.noise = left.clamp_min(self.floor)
        self.x = x.mT.unflatten(1, (images, -1)).transpose(0, 1).reshape(self.x.shape).clamp_min(0)
        parts = (left / self.size.clamp_min(1e-300)).sqrt()[self.live]
        self.worst, self.median = float(parts.max()), float(parts.median())


def _one(index: Tensor, count: int) -> Tensor:
    return F.one_hot(index, count).double()
