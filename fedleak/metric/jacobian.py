"""How an update changes with the images behind it: its Jacobian, layer by layer.

A fully connected layer or a convolution has the gradient ``G = E^T X``, with ``X`` what the
layer sees and ``E`` what comes back, row by row for each of T positions (pixels times images).
Its derivative ``E^T dX + dE^T X`` needs the derivatives of ``X`` and ``E`` alone, which are far
smaller than ``G`` in a large network; and where T is small, few of its coordinates say all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedleak.errors import UnsupportedModelError
from fedleak.replay import Gradients, Replay

#: Derivatives in this many directions are taken together, at most.
_TOGETHER = 64
#: Numbers that the derivatives of one call may hold together; sets how many directions.
_ENTRIES = 6e7
#: Rows of all layers together, per unknown, beyond which large layers are sketched.
ROWS_PER_UNKNOWN = 4

#: Entries of gradients that are no products of two factors, times unknowns, up to which all
#: their derivatives are taken.
WHOLE_ENTRIES = 2e10


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


class UpdateJacobian:
    """The Jacobian of a batch's update at some images.

    Parameters
    ----------
    replay : Replay
        The client's step.
    images : Tensor, shape (B, C, H, W)
    labels : Tensor, int64, shape (B,)

    Attributes
    ----------
    gradient : dict
        The update itself, by parameter.
    """

    def __init__(self, replay: Replay, images: Tensor, labels: Tensor):
        self.replay, self.labels = replay, labels.to(replay.device)
        self.images = images.to(replay.device, replay.dtype)
        made = replay(self.images.unsqueeze(0), self.labels.unsqueeze(0)).gradients
        self.gradient = {k: g[0] for k, g in made.items()}
        self._layers = dict(_factored(replay))
        with torch.no_grad(), self._watched(None) as seen:
            replay.model(self.images)
        self._shapes = {k: [out for _, out in v] for k, v in seen.items()}
        self._layers = {k: v for k, v in self._layers.items() if k in self._shapes}
        self._direct = dict(replay.parameters)
        self.here = self._parts(self.images)
        for name in [k for k in self._layers if not self._is_product(k)]:
            del self._layers[name]
        own = {_parameter(k, kind) for k in self._layers for kind in ("weight", "bias")}
        self._direct = {k: p for k, p in replay.parameters.items() if k not in own}

    @property
    def affordable(self) -> bool:
        """Whether all rows can be taken in minutes: few gradients come whole, entry by entry."""
        whole = sum(p.numel() for p in self._direct.values())
        return whole * self.images.numel() <= WHOLE_ENTRIES

    def _is_product(self, name: str) -> bool:
        """Say whether a layer's gradient is what its calls explain: nothing else uses it."""
        x, e = _seen(name, self._layers[name], self.here, lead=False)
        full = self.gradient.get(_parameter(name, "weight"))
        if full is None:
            return True
        rest = (e.mT @ x).reshape(full.shape) - full
        return float(rest.norm()) <= 1e-3 * float(full.norm())

    @contextmanager
    def _watched(self, added: Mapping[str, list[Tensor]] | None) -> Iterator[dict[str, list]]:
        """Note each layer's inputs and output shapes; add ``added`` to its outputs."""
        seen: dict[str, list] = {}

        def hook(name: str) -> Callable[..., Tensor | None]:
            def watch(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
                calls = seen.setdefault(name, [])
                calls.append((args[0], out.shape))
                return None if added is None else out + added[name][len(calls) - 1]

            return watch

        with ExitStack() as stack:
            for name, module in self._layers.items():
                handle = module.register_forward_hook(hook(name))
                stack.callback(handle.remove)
            yield seen

    def _parts(self, images: Tensor) -> dict[str, Any]:
        """Return each layer's inputs and the cotangents of its outputs, and other gradients."""
        added = {
            k: [images.new_zeros(shape) for shape in shapes] for k, shapes in self._shapes.items()
        }

        def loss(added: dict, direct: Gradients) -> tuple[Tensor, dict]:
            parameters = {**self.replay.parameters, **direct}
            with self._watched(added) as seen:
                logits = functional_call(self.replay.model, parameters, (images,))
            inputs = {k: [x for x, _ in calls] for k, calls in seen.items()}
            return F.cross_entropy(logits, self.labels), inputs

        (back, direct), inputs = grad(loss, argnums=(0, 1), has_aux=True)(added, self._direct)
        return {"inputs": inputs, "back": back, "direct": direct}

    def blocks(self, errors: Mapping[str, Tensor], seed: int = 0) -> list[Block]:
        """Return the rows of every parameter, in units of their errors.

        Parameters
        ----------
        errors : dict of str to Tensor
            Standard deviation of the error of each entry of the update, broadcastable to the
            parameter; ``inf`` where an entry says nothing.
        seed : int
            Draws the random combinations where there are too many rows to keep.

        Raises
        ------
        UnsupportedModelError
            If an operator of the model has no forward derivative of its gradient.
        """
        n = self.images.numel()
        with torch.no_grad():
            readers = [
                reader
                for name, layer in self._layers.items()
                for reader in self._readers(name, layer, errors)
            ]
            readers += [
                _Direct(name, _uniform(errors[name], p), p.numel())
                for name, p in self._direct.items()
            ]
        readers = [r for r in readers if r.entries]
        _share_rows(readers, ROWS_PER_UNKNOWN * n, seed)
        for reader in readers:
            reader.allocate(n)
        per_direction = sum(r.size for r in readers) + 4 * self._activations()
        together = int(max(1, min(_TOGETHER, _ENTRIES / max(per_direction, 1))))
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivative
                self._fill(readers, together)
        except (NotImplementedError, RuntimeError) as error:
            if "forward AD" not in str(error) and "not implemented" not in str(error):
                raise
            raise UnsupportedModelError(
                f"the metric takes derivatives of the update, which this model has not: {error}"
            ) from error
        return [r.block() for r in readers]

    def _fill(self, readers: Sequence[_Reader], together: int) -> None:
        n = self.images.numel()

        def directional(t: Tensor) -> Any:
            return jvp(self._parts, (self.images,), (t,))[1]

        for index in torch.arange(n, device=self.images.device).split(together):
            units = F.one_hot(index, n).to(self.images).reshape(-1, *self.images.shape)
            change = vmap(directional)(units)
            with torch.no_grad():
                for reader in readers:
                    reader.read(index, change)

    def _activations(self) -> int:
        return sum(x.numel() for v in self.here["inputs"].values() for x in v)

    def _readers(
        self, name: str, layer: nn.Module, errors: Mapping[str, Tensor]
    ) -> Iterator[_Reader]:
        x, e = _seen(name, layer, self.here, lead=False)
        for kind in ("weight", "bias"):
            parameter = getattr(layer, kind)
            full = _parameter(name, kind)
            if parameter is None or full not in self.replay.parameters:
                continue
            spread = _uniform(errors[full], parameter)
            positions, inputs, outputs = x.shape[-2], x.shape[-1], e.shape[-1]
            few = 2 * positions * (inputs + outputs) < inputs * outputs
            if kind == "bias":
                yield _Bias(full, name, spread, layer, parameter.numel())
            elif few and spread.numel() == 1:
                yield _Reduced(full, name, spread, layer, x, e)
            else:
                yield _Full(full, name, spread, layer, x, e)


def _uniform(spread: Tensor, parameter: Tensor) -> Tensor:
    """Return one number where all entries have the same error, else one for each."""
    first = spread.flatten()[:1]
    return first if bool((spread == first).all()) else spread.expand(parameter.shape)


def _parameter(layer: str, kind: str) -> str:
    return f"{layer}.{kind}" if layer else kind


def _factored(replay: Replay) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers whose gradient is a product of what they see and what comes back."""
    owners: dict[int, int] = {}
    for p in replay.model.parameters():
        owners[id(p)] = 0
    for module in replay.model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] += 1
    for name, module in replay.model.named_modules():
        plain = type(module) is nn.Linear or (
            type(module) is nn.Conv2d
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )
        # A weight that modules share has the sum of their gradients.
        if plain and all(owners[id(p)] == 1 for p in module.parameters(recurse=False)):
            yield name, module


def _seen(name: str, layer: nn.Module, parts: dict[str, Any], lead: bool) -> tuple[Tensor, Tensor]:
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
    # (K, B, groups, channels, rows, columns, kh, kw)
    x = x.permute(0, 2, 1, 4, 5, 3, 6, 7)
    return x.reshape(len(x), groups, batch * x.shape[3] * x.shape[4], -1)


def _outputs(layer: nn.Module, e: Tensor) -> Tensor:
    """Return cotangents of a layer's outputs, shape (K, groups, T, outputs)."""
    if not isinstance(layer, nn.Conv2d):
        return e.reshape(len(e), 1, -1, e.shape[-1])
    e = e.unflatten(2, (layer.groups, -1)).flatten(-2)  # (K, B, groups, outputs, positions)
    return e.permute(0, 2, 1, 4, 3).flatten(2, 3)


class _Reader(ABC):
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


class _Direct(_Reader):
    """A parameter whose gradient is taken as it is."""

    def __init__(self, name: str, spread: Tensor, entries: int):
        super().__init__(name, name.rpartition(".")[0], spread, entries)

    def coordinates(self, change: dict[str, Any]) -> Tensor:
        return change["direct"][self.name]


class _Bias(_Reader):
    """The bias of a layer: the sum of what came back."""

    def __init__(self, name: str, layer: str, spread: Tensor, module: nn.Module, entries: int):
        super().__init__(name, layer, spread, entries)
        self.module = module

    def coordinates(self, change: dict[str, Any]) -> Tensor:
        return sum(_outputs(self.module, e).sum(2) for e in change["back"][self.layer])  # type: ignore[return-value]


class _Full(_Reader):
    """Every entry of a weight: ``E^T dX + dE^T X``."""

    def __init__(
        self, name: str, layer: str, spread: Tensor, module: nn.Module, x: Tensor, e: Tensor
    ):
        entries = e.shape[1] * e.shape[3] * x.shape[3]
        super().__init__(name, layer, spread, entries)
        self.module, self.x, self.e = module, x, e

    def coordinates(self, change: dict[str, Any]) -> Tensor:
        dx, de = _seen(self.layer, self.module, change, lead=True)
        return self.e.mT @ dx + de.mT @ self.x


class _Reduced(_Full):
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
        dx, de = _seen(self.layer, self.module, change, lead=True)
        known = de @ self.p
        inside = (self.e @ self.p).mT @ dx + known.mT @ self.x
        outside = (de - known @ self.p.mT).mT @ (self.x @ self.q)
        return torch.cat([inside.flatten(1), outside.flatten(1)], 1)


def _share_rows(readers: Sequence[_Reader], most: int, seed: int) -> None:
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
