"""How an update changes with the images behind it: its Jacobian, layer by layer.

A fully connected layer or a convolution has the gradient ``G = E^T X``, with ``X`` what the
layer sees and ``E`` what comes back, row by row for each of T positions (pixels times images).
Its derivative ``E^T dX + dE^T X`` needs the derivatives of ``X`` and ``E`` alone, which are far
smaller than ``G`` in a large network; and where T is small, few of its coordinates say all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from fedleak.client.replay import Gradients, Replay
from fedleak.metric.derivatives import derivable
from fedleak.metric.jacobian_rows import (
    Bias,
    Block,
    Direct,
    Full,
    Reader,
    Reduced,
    matrices,
    share_rows,
    uniform,
)

#: Derivatives in this many directions are taken together, at most.
_TOGETHER = 64
#: Numbers that the derivatives of one call may hold together; sets how many directions.
_ENTRIES = 6e7
#: Rows of all layers together, per unknown, beyond which large layers are sketched.
ROWS_PER_UNKNOWN = 4

#: Entries of gradients that are no products of two factors, times unknowns, up to which all
#: their derivatives are taken.
WHOLE_ENTRIES = 2e10


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
        x, e = matrices(name, self._layers[name], self.here, lead=False)
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

        def forward(added: dict, direct: Gradients) -> tuple[Tensor, dict]:
            parameters = {**self.replay.parameters, **direct}
            with self._watched(added) as seen:
                logits = functional_call(self.replay.model, parameters, (images,))
            return logits, {k: [x for x, _ in calls] for k, calls in seen.items()}

        made = vjp(forward, added, self._direct, has_aux=True)
        logits, pull, inputs = made  # type: ignore[misc]
        back, direct = pull(self.replay.loss.cotangent(logits, self.labels))
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
                Direct(name, uniform(errors[name], p), p.numel())
                for name, p in self._direct.items()
            ]
        readers = [r for r in readers if r.entries]
        share_rows(readers, ROWS_PER_UNKNOWN * n, seed)
        for reader in readers:
            reader.allocate(n)
        per_direction = sum(r.size for r in readers) + 4 * self._activations()
        together = int(max(1, min(_TOGETHER, _ENTRIES / max(per_direction, 1))))
        with derivable():
            self._fill(readers, together)
        return [r.block() for r in readers]

    def _fill(self, readers: Sequence[Reader], together: int) -> None:
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
    ) -> Iterator[Reader]:
        x, e = matrices(name, layer, self.here, lead=False)
        for kind in ("weight", "bias"):
            parameter = getattr(layer, kind)
            full = _parameter(name, kind)
            if parameter is None or full not in self.replay.parameters:
                continue
            spread = uniform(errors[full], parameter)
            positions, inputs, outputs = x.shape[-2], x.shape[-1], e.shape[-1]
            few = 2 * positions * (inputs + outputs) < inputs * outputs
            if kind == "bias":
                yield Bias(full, name, spread, layer, parameter.numel())
            elif few and spread.numel() == 1:
                yield Reduced(full, name, spread, layer, x, e)
            else:
                yield Full(full, name, spread, layer, x, e)


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
