"""What every layer of a chain can do, forwards, backwards and inverted.

Notation (Chen & Campbell 2022, section 3; ``N`` updates of one model at once):
``x`` is a layer's input, ``z`` its output, ``e = dL/dz`` and ``D = dL/dx``.
The attacks and the metric ask a layer, and never what kind of layer it is: a new kind is
one file. What it does not say of itself has a default that is right, or a refusal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from scipy.sparse import csr_matrix, diags
from torch import Tensor, nn
from torch.func import jacrev

from fedleak.errors import UnsupportedModelError
from fedleak.registry import Registry

Shape = tuple[int, ...]
Gradients = dict[str, Tensor]
T = TypeVar("T")

#: Entries of a Jacobian that a layer without one of its own may have.
_JACOBIAN = 4e7


@dataclass
class Above:
    """What is known of a layer's output, and of its parameters' gradients, for N updates.

    Attributes
    ----------
    value, cotangent : Tensor, shape (N * batch, *out_shape)
        ``z`` and ``e = dL/dz``: the images of one update after each other.
    deviation : Tensor, shape (N * batch, *out_shape)
        Standard deviation of ``value``, infinite where it is not known.
    gradients : dict
        The update by parameter name, shape (N, *parameter).
    errors : dict
        Standard deviations of its entries, alike, where a known defence tells them.
    noise : Tensor, shape (N,)
        Standard deviation of the update's entries relative to their root mean square, where
        ``errors`` does not say it.
    batch : int
        Images of each update.
    """

    value: Tensor
    cotangent: Tensor
    deviation: Tensor
    gradients: Gradients
    errors: Gradients
    noise: Tensor
    batch: int = 1


@dataclass
class Equations:
    """How the system was solved that gave a layer's input.

    Attributes
    ----------
    rank : Tensor, int64, shape (N,)
        Of ``batch * unknowns`` where the input is determined.
    exact : bool
        Whether the rank is that of this very system, or a count of its constraints.
    residual : Tensor, shape (N,)
        ``||U x - v|| / ||v||``.
    """

    rank: Tensor
    exact: bool
    residual: Tensor


@dataclass
class Descent:
    """What a layer's output tells of its input.

    Attributes
    ----------
    value : Tensor, shape (N * batch, *in_shape)
    deviation : Tensor, alike, or None
        Standard deviation of ``value``, infinite where it is a guess. None: as large a part
        of it as above.
    equations : Equations or None
        None where no system was solved.
    """

    value: Tensor
    deviation: Tensor | None = None
    equations: Equations | None = None


class Layer(ABC):
    """One layer ``z = f(x)`` of a chain.

    Attributes
    ----------
    name : str
        Dotted name of the module, as in ``named_modules()``.
    in_shape, out_shape : tuple of int
        Shapes of one input and one output, without the batch dimension.
    kind : str
        What tables call this kind of layer; empty for the name of its class.
    reshapes : bool
        Whether the output is the input, in another shape.
    ranked : bool
        Whether the layer has gradient rows, and so a system ``[A; K(e)]`` that the metric ranks.
    """

    kind: str = ""
    reshapes: bool = False
    ranked: bool = False

    def __init__(self, name: str, in_shape: Shape, out_shape: Shape):
        self.name, self.in_shape, self.out_shape = name, in_shape, out_shape

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return ``z``, shape (N, *out_shape), for ``x``, shape (N, *in_shape)."""

    @abstractmethod
    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        """Return ``D = dL/dx`` from ``e = dL/dz``; differentiable in all arguments."""

    def gradients(self, x: Tensor, e: Tensor) -> Gradients:
        """Return ``dL/dparameter`` of each update by name, shape (N, *parameter)."""
        return {}

    @property
    def unknowns(self) -> int:
        """Number of entries of one input, ``n_i`` of the paper."""
        return math.prod(self.in_shape)

    def descend(self, above: Above, start: Tensor) -> Descent:
        """Return what the output, and the gradients of the parameters, tell of the input.

        Parameters
        ----------
        above : Above
        start : Tensor, shape (N * batch, *in_shape)
            What is nearest to is taken, where the input is not determined.

        Raises
        ------
        UnsupportedModelError
            If this kind of layer has no way back.
        """
        raise UnsupportedModelError(
            f"layer {self.name!r} ({type(self).__name__}) does not say how its input follows from "
            "its output (Layer.descend). The hybrid attack matches such a model as a whole"
        )

    def pull_back(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        """Return ``dL/dx`` at an input that :meth:`descend` found."""
        return self.backward(x, z, e)

    def jacobian(self, x: Tensor, z: Tensor) -> csr_matrix:
        """Return ``dz / dx`` of one image, shape (outputs, inputs), zero where ``z`` is lost.

        Parameters
        ----------
        x, z : Tensor, shapes (1, *in_shape) and (1, *out_shape)

        Raises
        ------
        UnsupportedModelError
            If it is large, and this kind of layer has none of its own.
        """
        if float(x.numel()) * z.numel() > _JACOBIAN:
            raise UnsupportedModelError(
                f"layer {self.name!r} ({type(self).__name__}) has {x.numel()} inputs and "
                f"{z.numel()} outputs: too many for a Jacobian that is written out "
                "(Layer.jacobian)"
            )
        whole = jacrev(self.forward)(x).reshape(z.numel(), x.numel())
        return csr_matrix(whole.detach().cpu().numpy())

    def to(self, device: torch.device) -> Layer:
        """Move the layer's own tensors to ``device``, in place."""
        for key, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, key, value.to(device))
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: {self.in_shape} -> {self.out_shape})"


class Pointwise(Layer):
    """An activation, a normalisation or a reshape: each output has one input of its own.

    Attributes
    ----------
    name, in_shape, out_shape
        As of :class:`Layer`.
    rounding : float
        Standard deviation of the client's float32 rounding, relative to the output.
    """

    rounding = 0.0

    @abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """Return the ``x`` with ``f(x) = z``; ``z`` outside the range is clipped to it."""

    def lost(self, z: Tensor) -> Tensor | None:
        """Return where ``z`` does not tell ``x``, a mask like ``z``; None for nowhere."""
        return None

    def jacobian(self, x: Tensor, z: Tensor) -> csr_matrix:
        lost = self.lost(z)
        slope = self.backward(x, z, torch.ones_like(z)).flatten()
        if lost is not None:
            slope = slope.masked_fill(lost.flatten(), 0)
        return diags(slope.cpu().numpy()).tocsr()

    def descend(self, above: Above, start: Tensor) -> Descent:
        return Descent(*self.undo(above.value, above.deviation))

    def settle(self, z: Tensor, deviation: Tensor) -> Tensor:
        """Return ``z`` with what is at a bound of the range, within its error, put on it."""
        return z

    def undo(self, z: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x`` and its standard deviation, from ``z`` and its.

        Where ``x`` is lost, any ``x`` with ``f(x) = z`` is returned, and its deviation is
        infinite.
        """
        z = self.settle(z, deviation)
        x = self.inverse(z)
        slope = self.backward(x, z, torch.ones_like(z))
        deviation = torch.hypot(deviation, self.rounding * z.abs())
        deviation = deviation.reshape(x.shape) / slope.abs().clamp_min(1e-12)
        lost = self.lost(z)
        if lost is not None:
            deviation = deviation.masked_fill(lost.reshape(x.shape), torch.inf)
        return x, deviation


#: Makes a layer: (name, module, in_shape, out_shape) -> Layer.
Reader = Callable[[str, Any, Shape, Shape], Layer]


class LayerRegistry(Registry[Reader]):
    """From the kind of a module to its layer; open to other packages through entry points.

    Names are those of classes, ``torch.nn.GroupNorm`` or ``my_package.layers.Mine``.
    """

    def register(self, name: str | type[nn.Module], *more: type[nn.Module]) -> Callable[[T], T]:
        """Return a decorator that enters a reader, or a class of layers that is one."""

        def enter(reader: T) -> T:
            for kind in (name, *more):
                key = kind if isinstance(kind, str) else class_name(kind)
                super(LayerRegistry, self).register(key)(reader)  # type: ignore[arg-type]
            return reader

        return enter

    def reader_of(self, module: nn.Module) -> Reader | None:
        """Return what reads this very kind of module; a subclass may compute something else."""
        name = class_name(type(module))
        if name not in self:
            return None
        return self[name]


def class_name(kind: type[nn.Module]) -> str:
    """Return the name that a class of modules is imported by."""
    short = kind.__name__
    own = getattr(nn, short, None) is kind
    return f"torch.nn.{short}" if own else f"{kind.__module__}.{kind.__qualname__}"


LAYERS = LayerRegistry("kind of layer", "fedleak.layers")
