"""The rows of the Jacobian of an update, read parameter by parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Block:
    """The rows of one parameter in the Jacobian of the update.

    Attributes
    ----------
    name : str
        The parameter.
    layer : str
        The module that it belongs to.
    rows : Tensor, shape (r, n)
        ``r`` coordinates of the parameter's gradient, each in units of its error, derived
        by the ``n`` pixels.
    entries : int
        Entries of the gradient that say anything.
    sketched : bool
        Whether ``r`` random combinations stand for more coordinates.
    """

    name: str
    layer: str
    rows: Tensor
    entries: int
    sketched: bool = False


def uniform(spread: Tensor, parameter: Tensor) -> Tensor:
    """Return one number where all entries have the same error, else one for each."""
    first = spread.flatten()[:1]
    return first if bool((spread == first).all()) else spread.expand(parameter.shape)


def matrices(
    name: str, layer: nn.Module, parts: dict[str, Any], lead: bool
) -> tuple[Tensor, Tensor]:
    """Return what a layer saw and got back as matrices.

    Shapes (K, groups, T, inputs) and (K, groups, T, outputs), with K derivatives beside each
    other where ``lead`` says so, else 1.
    """
    inputs, back = parts["inputs"][name], parts["back"][name]
    if not lead:
        inputs, back = ([v.unsqueeze(0) for v in values] for values in (inputs, back))
    x = torch.cat([_patches(layer, v) for v in inputs], 2)
    return x, torch.cat([_outputs(layer, v) for v in back], 2)


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the patches that a layer sees, shape (K, groups, T, inputs)."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(len(x), 1, -1, x.shape[-1])
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    assert not isinstance(layer.padding, str)
    (ph, pw), batch, groups = layer.padding, x.shape[1], layer.groups
    # Views of strides, copied once: F.unfold takes three times as long.
    x = F.pad(x.unflatten(2, (groups, -1)), (pw, pw, ph, ph))
    x = x.unfold(4, dh * (kh - 1) + 1, sh).unfold(5, dw * (kw - 1) + 1, sw)[..., ::dh, ::dw]
    # Axes now: K, B, groups, channels, rows, columns, kh, kw.
    x = x.permute(0, 2, 1, 4, 5, 3, 6, 7)
    return x.reshape(len(x), groups, batch * x.shape[3] * x.shape[4], -1)


def _outputs(layer: nn.Module, e: Tensor) -> Tensor:
    """Return cotangents of a layer's outputs, shape (K, groups, T, outputs)."""
    if not isinstance(layer, nn.Conv2d):
        return e.reshape(len(e), 1, -1, e.shape[-1])
    e = e.unflatten(2, (layer.groups, -1)).flatten(-2)  # (K, B, groups, outputs, positions)
    return e.permute(0, 2, 1, 4, 3).flatten(2, 3)


class Reader(ABC):
    """Reads the rows of one parameter from derivatives of what the layers saw and got back.

    Parameters
    ----------
    name, layer : str
        The parameter, and its module.
    spread : Tensor
        Standard deviation of the error of each entry: one for all, or one for each.
    entries : int
        Of the parameter.
    """

    def __init__(self, name: str, layer: str, spread: Tensor, entries: int):
        self.name, self.layer = name, layer
        told = spread.isfinite().flatten()
        self.entries = entries if spread.numel() == 1 and bool(told) else int(told.sum())
        self.index = None if bool(told.all()) else told.nonzero().flatten()
        self.weight = 1 / spread.flatten()[told]
        self.size = self.kept = self.entries
        self.signs: Tensor | None = None

    @abstractmethod
    def coordinates(self, change: dict[str, Any]) -> Tensor:
        """Return the derivatives of all coordinates, shape (K, ...)."""

    def sketch(self, kept: int, generator: torch.Generator) -> None:
        """Keep ``kept`` sums of coordinates with random signs."""
        self.kept = kept
        signs = torch.randint(0, 2, (self.size,), generator=generator, dtype=torch.int8)
        self.signs = (2 * signs - 1).to(self.weight)

    def allocate(self, n: int) -> None:
        self.rows = self.weight.new_empty(self.kept, n)

    def read(self, index: Tensor, change: dict[str, Any]) -> None:
        """Write the columns ``index`` of the rows."""
        found = self.coordinates(change).flatten(1)
        if self.index is not None:
            found = found[:, self.index]
        found = found * self.weight
        if self.signs is not None:
            found = F.pad(found * self.signs, (0, -self.size % self.kept))
            found = found.reshape(len(found), -1, self.kept).sum(1)
        self.rows[:, index] = found.T

    def block(self) -> Block:
        return Block(self.name, self.layer, self.rows, self.entries, self.signs is not None)


class Direct(Reader):
    """A parameter whose gradient is taken as it is."""

    def __init__(self, name: str, spread: Tensor, entries: int):
        super().__init__(name, name.rpartition(".")[0], spread, entries)

    def coordinates(self, change: dict[str, Any]) -> Tensor:
        return change["direct"][self.name]


class Bias(Reader):
    """The bias of a layer: the sum of what came back."""

    def __init__(self, name: str, layer: str, spread: Tensor, module: nn.Module, entries: int):
        super().__init__(name, layer, spread, entries)
        self.module = module

    def coordinates(self, change: dict[str, Any]) -> Tensor:
        return sum(_outputs(self.module, e).sum(2) for e in change["back"][self.layer])  # type: ignore[return-value]


class Full(Reader):
    """Every entry of a weight: ``E^T dX + dE^T X``."""

    def __init__(
        self, name: str, layer: str, spread: Tensor, module: nn.Module, x: Tensor, e: Tensor
    ):
        entries = e.shape[1] * e.shape[3] * x.shape[3]
        super().__init__(name, layer, spread, entries)
        self.module, self.x, self.e = module, x, e

    def coordinates(self, change: dict[str, Any]) -> Tensor:
        dx, de = matrices(self.layer, self.module, change, lead=True)
        return self.e.mT @ dx + de.mT @ self.x


class Reduced(Full):
    """A weight whose gradient has few positions: its coordinates in their span.

    With orthonormal bases ``P`` of ``E^T`` and ``Q`` of ``X^T``, ``P^T dG`` and
    ``(1 - P P^T) dG Q`` have the same inner products as ``dG``.
    """

    def __init__(
        self, name: str, layer: str, spread: Tensor, module: nn.Module, x: Tensor, e: Tensor
    ):
        super().__init__(name, layer, spread, module, x, e)
        self.p, self.q = torch.linalg.qr(e.mT)[0], torch.linalg.qr(x.mT)[0]
        groups, outputs, inputs = e.shape[1], e.shape[3], x.shape[3]
        self.size = groups * (self.p.shape[3] * inputs + outputs * self.q.shape[3])
        self.kept = self.size

    def coordinates(self, change: dict[str, Any]) -> Tensor:
        dx, de = matrices(self.layer, self.module, change, lead=True)
        known = de @ self.p
        inside = (self.e @ self.p).mT @ dx + known.mT @ self.x
        outside = (de - known @ self.p.mT).mT @ (self.x @ self.q)
        return torch.cat([inside.flatten(1), outside.flatten(1)], 1)


def share_rows(readers: Sequence[Reader], most: int, seed: int) -> None:
    """Sketch the largest parameters where there are more than ``most`` rows in all."""
    generator = torch.Generator().manual_seed(seed)
    left, sizes = most, sorted(r.size for r in readers)
    for done, size in enumerate(sizes):
        level = left // (len(sizes) - done)
        if size > level:  # this one and all larger ones share what is left
            break
        left -= size
    else:
        return
    for reader in readers:
        if reader.size > level:
            reader.sketch(max(level, 1), generator)
