"""Defences that leave out a part of the network: Soteria, and layers that are not sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.defences.base import DEFENCES, Defence, Tensors
from fedleak.defences.pruning import smallest
from fedleak.errors import InvalidInputError, UnknownNameError


def layers_of(names: Sequence[str]) -> list[str]:
    """Return the layers of these parameters, in order."""
    return list(dict.fromkeys(n.rpartition(".")[0] or n for n in names))


@DEFENCES.register("withhold")
@dataclass(frozen=True)
class Withholding(Defence):
    """Send zeros for all parameters of some layers.

    Parameters
    ----------
    layers : tuple of str
        Names of modules or parameters (``conv1``, ``features.0``, ``fc.bias``), or ``first``
        and ``last``: the layers of the first and last parameter. 0 alone is no layer, so
        that of a network whose first layer is called 0 it is ``first``.
    """

    layers: tuple[str, ...] = ()
    unit = "names of layers, with commas between; or first, last"

    def _withheld(self, names: Sequence[str]) -> list[str]:
        order = layers_of(names)
        ends = {"first": order[:1], "last": order[-1:]}
        wanted = [w for layer in self.layers for w in ends.get(layer, [layer])]
        return [n for n in names if any(n == w or n.startswith(f"{w}.") for w in wanted)]

    def check(self, names: Sequence[str]) -> None:
        order = layers_of(names)
        for layer in self.layers:
            found = any(n == layer or n.startswith(f"{layer}.") for n in names)
            if not found and layer not in ("first", "last"):
                raise UnknownNameError("layer to withhold", layer, ["first", "last", *order])
        if len(self._withheld(names)) == len(names):
            raise InvalidInputError(
                f"defence 'withhold' of {', '.join(self.layers)} leaves nothing of the update"
            )

    def __call__(self, update: Tensors, generator: torch.Generator) -> Tensors:
        withheld = self._withheld(list(update))
        return {k: torch.zeros_like(v) if k in withheld else v for k, v in update.items()}

    def errors(self, received: Tensors) -> Tensors:
        withheld = self._withheld(list(received))
        return {
            k: v.new_tensor(torch.inf if k in withheld else 0.0, dtype=torch.float64)
            for k, v in received.items()
        }


@DEFENCES.register("soteria")
@dataclass(frozen=True)
class Soteria(Defence):
    """Leave out a part of the representation from a fully connected layer's gradient.

    Sun et al., "Soteria", CVPR 2021, section 4: of the layer's input ``r``, the features with
    the largest ``|r_i| / ||d r_i / d image||`` are set to zero, where they enter the gradient.
    The norm of a column of the weight's gradient is ``|r_i|`` times the same for all
    features, so that a function of the update knows the numerator; the sensitivities, which
    take the model and the images, are taken for equal here.

    Parameters
    ----------
    share : float
        Fraction of the layer's input features that are left out, in [0, 1).
    layer : str
        The fully connected layer; by default the last one.
    """

    share: float = 0.0
    layer: str = ""
    unit = "fraction of the fully connected layer's input features left out"

    def __post_init__(self) -> None:
        self.demand("share", maximum=1.0)

    def _weight(self, sizes: dict[str, int]) -> str | None:
        """Return the name of the layer's weight, given each tensor's number of dimensions."""
        dense = [n for n, dims in sizes.items() if dims == 2]
        if self.layer:
            dense = [n for n in dense if n == f"{self.layer}.weight"]
        return dense[-1] if dense else None

    def check(self, names: Sequence[str]) -> None:
        if self.layer and f"{self.layer}.weight" not in names:
            raise UnknownNameError("layer for Soteria", self.layer, layers_of(names))

    def __call__(self, update: Tensors, generator: torch.Generator) -> Tensors:
        name = self._weight({k: v.dim() for k, v in update.items()})
        if name is None:
            raise InvalidInputError("defence 'soteria' needs a fully connected layer")
        drop = smallest(-_columns(update[name]), self.share, by_size=False)
        return {**update, name: update[name].masked_fill(drop, 0.0)}

    def errors(self, received: Tensors) -> Tensors:
        out = {k: v.new_zeros((), dtype=torch.float64) for k, v in received.items()}
        name = self._weight({k: v.dim() for k, v in received.items()})
        if name is not None:
            lost = smallest(_columns(received[name]), self.share)
            error = torch.zeros_like(received[name]).masked_fill(lost, torch.inf)
            out[name] = error
        return out


def _columns(weight: Tensor) -> Tensor:
    return weight.double().norm(dim=0)
