"""What every layer of a chain can do, forwards, backwards and inverted.

Notation (Chen & Campbell 2022, section 3; ``N`` updates of one model at once):
``x`` is a layer's input, ``z`` its output, ``e = dL/dz`` and ``D = dL/dx``.
The attack, gradient matching and the metric all use these same operators, so a new
kind of layer is one file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
Gradients = dict[str, Tensor]


class Layer(ABC):
    """One layer ``z = f(x)`` of a chain.

    Attributes
    ----------
    name : str
        Dotted name of the module, as in ``named_modules()``.
    in_shape, out_shape : tuple of int
        Shapes of one input and one output, without the batch dimension.
    """

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

    def binds(self, x: Tensor, z: Tensor, known: Tensor) -> Tensor:
        """Return which entries of ``x`` the ``known`` entries of ``z`` tie down.

        Parameters
        ----------
        x : Tensor, shape (N, *in_shape)
        z : Tensor, shape (N, *out_shape)
        known : Tensor of bool, shape (N, *out_shape)

        Returns
        -------
        Tensor of bool, shape (N, *in_shape)
            One entry for each equation; all of them where the layer has a system of its own.
        """
        return torch.ones_like(x, dtype=torch.bool)

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

    def binds(self, x: Tensor, z: Tensor, known: Tensor) -> Tensor:
        lost = self.lost(z)
        return (known if lost is None else known & ~lost).reshape(x.shape)

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


@dataclass
class Rows:
    """Rows of a layer's linear system, or a vector in the space of those rows.

    Attributes
    ----------
    weight : Tensor, shape (N, *out_shape)
        One row for each output: the layer's own equation ``A x = z - c``.
    gradient : Tensor, shape (N, *weight_shape)
        One row for each weight: ``K(e) x = dL/dW``. Shape (N, 0) without parameters.
    """

    weight: Tensor
    gradient: Tensor


class System(Layer):
    """A layer ``z = A x + c``, and so with a linear system ``U x = v`` for its input.

    ``U = [A; K(e)]``; a layer without parameters has the weight rows ``A`` alone.
    """

    @property
    def unknowns(self) -> int:
        """Number of entries of one input, ``n_i`` of the paper."""
        return math.prod(self.in_shape)

    @abstractmethod
    def apply(self, x: Tensor, e: Tensor) -> Rows:
        """Return ``U x``: ``A x`` and ``K(e) x``."""

    @abstractmethod
    def adjoint(self, rows: Rows, e: Tensor) -> Tensor:
        """Return ``U^T rows = A^T rows.weight + K(e)^T rows.gradient``."""

    @abstractmethod
    def target(self, z: Tensor, gradient: Tensor) -> Rows:
        """Return the system's right side ``[z - c; vec(dL/dW)]``."""


class Affine(System):
    """A system with parameters, and so with gradient rows: convolutions, dense layers.

    Everything rests on the patch matrix ``P(x)``, shape (fan_in, positions): the layer
    computes ``A x = W P(x)`` and its weight gradient is ``K(e) x = e P(x)^T``. So one
    gathering of patches and two small matrix products apply the whole system
    ``U = [A; K(e)]``, and their adjoints apply ``U^T``. ``U`` itself is never built.

    Attributes
    ----------
    weight : Tensor, float64, shape (groups, out / groups, fan_in)
    bias : Tensor or None, float64, shape (out,)
    weight_name, bias_name : str
        Names in ``named_parameters()``.
    weight_shape : tuple of int
        Shape of the parameter in the model.
    """

    def __init__(
        self, name: str, in_shape: Shape, out_shape: Shape, weight: Tensor, bias: Tensor | None
    ):
        super().__init__(name, in_shape, out_shape)
        prefix = f"{name}." if name else ""
        self.weight_name, self.bias_name = f"{prefix}weight", f"{prefix}bias"
        self.weight_shape = tuple(weight.shape)
        self.bias = None if bias is None else bias.detach().double()
        self.weight = self.group(weight.detach().double())

    def group(self, weight: Tensor) -> Tensor:
        """Return ``weight`` as (groups, out / groups, fan_in)."""
        return weight.flatten(1).unsqueeze(0)

    @abstractmethod
    def patches(self, x: Tensor) -> Tensor:
        """Return ``P(x)``, shape (N, groups, fan_in, positions)."""

    @abstractmethod
    def scatter(self, p: Tensor) -> Tensor:
        """Return the adjoint of :meth:`patches`, shape (N, *in_shape)."""

    def _grouped(self, e: Tensor) -> Tensor:
        return e.reshape(e.shape[0], *self.weight.shape[:2], -1)

    def apply(self, x: Tensor, e: Tensor) -> Rows:
        p = self.patches(x)
        return Rows(
            (self.weight @ p).reshape(-1, *self.out_shape),
            (self._grouped(e) @ p.mT).reshape(-1, *self.weight_shape),
        )

    def adjoint(self, rows: Rows, e: Tensor) -> Tensor:
        gradient = rows.gradient.reshape(-1, *self.weight.shape)
        p = self.weight.mT @ self._grouped(rows.weight) + gradient.mT @ self._grouped(e)
        return self.scatter(p)

    def forward(self, x: Tensor) -> Tensor:
        z = (self.weight @ self.patches(x)).reshape(-1, *self.out_shape)
        return z if self.bias is None else z + self._spread(self.bias)

    def _spread(self, bias: Tensor) -> Tensor:
        return bias.reshape(-1, *[1] * (len(self.out_shape) - 1))

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return self.scatter(self.weight.mT @ self._grouped(e))

    def gradients(self, x: Tensor, e: Tensor) -> Gradients:
        gradient = self._grouped(e) @ self.patches(x).mT
        out = {self.weight_name: gradient.reshape(-1, *self.weight_shape)}
        if self.bias is not None:
            out[self.bias_name] = e.flatten(2).sum(2) if e.dim() > 2 else e
        return out

    def target(self, z: Tensor, gradient: Tensor) -> Rows:
        return Rows(z if self.bias is None else z - self._spread(self.bias), gradient)
