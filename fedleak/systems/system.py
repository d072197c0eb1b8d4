"""Layers with a linear system for their input: what it is, what it ranks, and its solution."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from fedleak.errors import UnsupportedModelError
from fedleak.precision import FORWARD, GRADIENT
from fedleak.solvers import cgls
from fedleak.solvers.least_squares import Inverse
from fedleak.systems.base import Above, Descent, Equations, Gradients, Layer, Shape
from fedleak.systems.ranks.blocks import EXACT, Effort, Ranks, selection
from fedleak.systems.ranks.operators import (
    DENSE_UNKNOWNS,
    PROBED_UNKNOWNS,
    Operators,
    dense_ranks,
    probed_rank,
)
from fedleak.tensors import per_update, rms

#: Memory for the solver's matrices, in entries, by device: it sets how many updates are solved
#: together.
_ENTRIES = {"cpu": 3e7, "cuda": 2e9}
#: Attacks rank systems exactly up to this many unknowns.
EXACT_UNKNOWNS = 600


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

    Attributes
    ----------
    name, in_shape, out_shape
        As of :class:`Layer`.
    weight_name : str or None
        The parameter whose gradient makes the gradient rows; None where there are none.
    """

    weight_name: str | None = None

    @abstractmethod
    def apply(self, x: Tensor, e: Tensor) -> Rows:
        """Return ``U x``: ``A x`` and ``K(e) x``."""

    @abstractmethod
    def adjoint(self, rows: Rows, e: Tensor) -> Tensor:
        """Return ``U^T rows = A^T rows.weight + K(e)^T rows.gradient``."""

    @abstractmethod
    def target(self, z: Tensor, gradient: Tensor) -> Rows:
        """Return the system's right side ``[z - c; vec(dL/dW)]``."""

    def descend(self, above: Above, start: Tensor) -> Descent:
        z, e = above.value, above.cotangent
        if self.weight_name is None:
            gradient, errors = z.new_zeros(len(above.noise), 0), None
        else:
            gradient, errors = (
                above.gradients[self.weight_name],
                above.errors.get(self.weight_name),
            )
        # Of what is withheld no row is left: as of an error of zero.
        told = errors is None or bool(errors.isfinite().any())
        known = above.deviation.isfinite()
        rank, exact = self.ranks(e if told else 0 * e, known, above.batch)
        deviations = row_deviations(z, above.deviation, gradient, above.noise, errors)
        x, residual = solve_layer(self, z, e, gradient, deviations, start)
        return Descent(x, None, Equations(rank, exact, residual))

    @property
    def solver_entries(self) -> int:
        """Memory that :meth:`regularised_inverse` takes for one image, in float64 entries."""
        return 0

    def regularised_inverse(
        self, e: Tensor, a: Tensor, k: Tensor, adjoint: Callable[[tuple[Tensor, ...]], Tensor]
    ) -> Inverse | None:
        """Return ``(U^T U + d)^-1 U^T`` of the weighted system, for a small ``d``.

        What a layer knows of its structure, so that the solver ends in a few steps; None where
        it knows nothing, or the work would not pay. Arguments as of
        :func:`fedleak.systems.direct.inverse_of`.
        """
        return None

    def ranks(self, e: Tensor, known: Tensor, batch: int = 1) -> tuple[Tensor, bool]:
        """Return the rank of the system for each update, and whether it is exact.

        Small systems are ranked exactly. Of large ones the constraints are counted, where the
        layer can (:meth:`counted_rank`); else they are probed, and what the solver does not
        find counts as open.

        Parameters
        ----------
        e : Tensor, shape (N * batch, *out_shape)
        known : Tensor of bool, shape (N * batch, *out_shape)
            Outputs that have a weight row.
        batch : int
            Images of each update, which share their gradient rows; more than one are counted.

        Returns
        -------
        ranks : Tensor, int64, shape (N,)
        exact : bool

        Raises
        ------
        UnsupportedModelError
            If the system is too large for a layer that cannot count.
        """
        if batch > 1:
            parts = zip(e.split(batch), known.split(batch), strict=True)
            return torch.tensor([self.batch_rank(*part) for part in parts]), False
        exact = self.unknowns <= EXACT_UNKNOWNS
        generic = (known & (e != 0)).flatten(1).all(1)
        ranks = torch.zeros(len(e), dtype=torch.int64)
        if bool(generic.any()):  # generic errors give one rank for all
            ranks[generic.cpu()] = self._rank(e[generic][0], None, exact)
        for n in (~generic).nonzero().flatten().tolist():
            ranks[n] = self._rank(e[n], known[n], exact)
        return ranks, exact

    def _rank(self, e: Tensor, known: Tensor | None, exact: bool) -> int:
        if exact:
            return self.exact_rank(e, known)
        counted = self.counted_rank(e, known)
        if counted is not None:
            return counted
        known = torch.ones_like(e, dtype=torch.bool) if known is None else known
        return int(self.probed_rank(e.unsqueeze(0), known.unsqueeze(0)))

    def exact_rank(self, e: Tensor, known: Tensor | None = None) -> int:
        """Return the numerical rank of ``U = [A; K(e)]`` for one ``e``.

        Parameters
        ----------
        e : Tensor, shape (*out_shape)
        known : Tensor of bool, shape (*out_shape), optional
            Outputs that have a weight row; default: all.
        """
        return self.block_ranks(e, None if known is None else selection(known)).joint

    def block_ranks(
        self, e: Tensor, rows: csr_matrix | None = None, effort: Effort = EXACT
    ) -> Ranks:
        """Return the numerical ranks of the system's two blocks, and of both, for one ``e``.

        Parameters
        ----------
        e : Tensor, shape (*out_shape)
            ``dL/dz`` of one example.
        rows : csr_matrix, shape (equations, outputs), optional
            What is known of the layer's outputs; default: every output.
        effort : Effort
            Beyond it, a layer that can count does, and the result says so.

        Returns
        -------
        Ranks
            Numbers of singular values above ``1e-7`` times the largest of their block.

        Raises
        ------
        UnsupportedModelError
            If the system is too large for a layer without a structure of its own.
        """
        if self.unknowns > DENSE_UNKNOWNS:
            raise self._too_large(self.unknowns, DENSE_UNKNOWNS, "block_ranks")
        e = e.detach()
        return dense_ranks(self.operators(e.unsqueeze(0), rows), e)

    def counted_rank(self, e: Tensor | None = None, known: Tensor | None = None) -> int | None:
        """Return the rank of a generic system in closed form; None where there is none.

        Parameters
        ----------
        e : Tensor, shape (*out_shape), optional
            ``dL/dz``: where it is zero there are no gradient rows.
        known : Tensor of bool, shape (*out_shape), optional
            Outputs that have a weight row.
        """
        return None

    def batch_rank(self, e: Tensor, known: Tensor) -> int:
        """Return the rank of a batch's system, whose images share the gradient rows.

        Parameters
        ----------
        e : Tensor, shape (B, *out_shape)
        known : Tensor of bool, shape (B, *out_shape)
        """
        unknowns = len(e) * self.unknowns
        system = self.operators(e, selection(known))
        if unknowns <= DENSE_UNKNOWNS:
            return dense_ranks(system, e).joint
        if unknowns > PROBED_UNKNOWNS:
            raise self._too_large(unknowns, PROBED_UNKNOWNS, "batch_rank")
        ones = e.new_ones(())
        start = e.new_zeros(2, *system.shape)
        return int(probed_rank(system.apply, system.adjoint, start, ones))

    def probed_rank(self, e: Tensor, known: Tensor, probes: int = 2) -> Tensor:
        """Estimate the rank of each update's system from products with it alone.

        Parameters
        ----------
        e, known : Tensor, shape (N, *out_shape)

        Returns
        -------
        Tensor, int64, shape (N,)
        """
        if self.unknowns > PROBED_UNKNOWNS and self.counted_rank() is None:
            raise self._too_large(self.unknowns, PROBED_UNKNOWNS, "counted_rank")
        many, mask = (v.repeat_interleave(probes, 0) for v in (e, known.to(e)))

        def apply(x: Tensor) -> tuple[Tensor, Tensor]:
            rows = self.apply(x, many)
            return rows.weight, rows.gradient

        def adjoint(weight: Tensor, gradient: Tensor) -> Tensor:
            return self.adjoint(Rows(weight, gradient), many)

        start = e.new_zeros(len(many), *self.in_shape)
        return probed_rank(apply, adjoint, start, mask, probes)

    def operators(self, e: Tensor, rows: csr_matrix | None = None) -> Operators:
        """Return products with the system of one update's images.

        Parameters
        ----------
        e : Tensor, shape (B, *out_shape)
        rows : csr_matrix, shape (equations, B * outputs), optional
            What is known of the outputs; default: all.
        """
        shape = (len(e), *self.in_shape)

        def apply(x: Tensor) -> tuple[Tensor, Tensor]:
            made = self.apply(x.flatten(0, 1), e.repeat(len(x), *[1] * len(self.out_shape)))
            weight = made.weight.reshape(len(x), -1)
            if rows is not None:
                weight = torch.from_numpy((rows @ weight.cpu().numpy().T).T.copy()).to(e)
            return weight, made.gradient.unflatten(0, (len(x), len(e))).sum(1)

        def adjoint(weight: Tensor, gradient: Tensor) -> Tensor:
            if rows is not None:
                weight = torch.from_numpy((rows.T @ weight.cpu().numpy().T).T.copy()).to(e)
            made = Rows(weight.reshape(-1, *self.out_shape), gradient.repeat_interleave(len(e), 0))
            each = e.repeat(len(weight), *[1] * len(self.out_shape))
            return self.adjoint(made, each).unflatten(0, (-1, len(e)))

        return Operators(shape, apply, adjoint)

    def _too_large(self, unknowns: int, most: int, method: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"layer {self.name!r} ({type(self).__name__}) has {unknowns} unknowns; a kind of layer "
            f"that does not count its rank itself ({method}) is ranked up to {most}. The hybrid "
            "attack matches such a model as a whole"
        )


class Affine(System):
    """A system with parameters, and so with gradient rows: convolutions, dense layers.

    Everything rests on the patch matrix ``P(x)``, shape (fan_in, positions): the layer
    computes ``A x = W P(x)`` and its weight gradient is ``K(e) x = e P(x)^T``. So one
    gathering of patches and two small matrix products apply the whole system
    ``U = [A; K(e)]``, and their adjoints apply ``U^T``. ``U`` itself is never built.

    Attributes
    ----------
    name, in_shape, out_shape
        As of :class:`Layer`.
    weight : Tensor, float64, shape (groups, out / groups, fan_in)
    bias : Tensor or None, float64, shape (out,)
    weight_name, bias_name : str
        Names in ``named_parameters()``.
    weight_shape : tuple of int
        Shape of the parameter in the model.
    """

    ranked = True
    #: Whether what is open in it counts in c(M).
    counts = True
    weight_name: str

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

    def split(self, z: Tensor) -> Tensor:
        """Return outputs by filter and position, (N, groups, out / groups, positions)."""
        return z.reshape(z.shape[0], *self.weight.shape[:2], -1)

    def join(self, p: Tensor) -> Tensor:
        """Return outputs as the layer makes them, the inverse of :meth:`split`."""
        return p.reshape(-1, *self.out_shape)

    @property
    def _shift(self) -> Tensor:
        """The bias, to be added to outputs by filter and position."""
        assert self.bias is not None
        return self.bias.reshape(1, *self.weight.shape[:2], 1)

    def apply(self, x: Tensor, e: Tensor) -> Rows:
        p = self.patches(x)
        return Rows(
            self.join(self.weight @ p),
            (self.split(e) @ p.mT).reshape(-1, *self.weight_shape),
        )

    def adjoint(self, rows: Rows, e: Tensor) -> Tensor:
        gradient = rows.gradient.reshape(-1, *self.weight.shape)
        p = self.weight.mT @ self.split(rows.weight) + gradient.mT @ self.split(e)
        return self.scatter(p)

    def forward(self, x: Tensor) -> Tensor:
        z = self.weight @ self.patches(x)
        return self.join(z if self.bias is None else z + self._shift)

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return self.scatter(self.weight.mT @ self.split(e))

    def gradients(self, x: Tensor, e: Tensor) -> Gradients:
        gradient = self.split(e) @ self.patches(x).mT
        out = {self.weight_name: gradient.reshape(-1, *self.weight_shape)}
        if self.bias is not None:
            out[self.bias_name] = self.split(e).sum(3).flatten(1)
        return out

    def target(self, z: Tensor, gradient: Tensor) -> Rows:
        if self.bias is not None:
            z = self.join(self.split(z) - self._shift)
        return Rows(z, gradient)


def row_deviations(
    z: Tensor,
    deviation: Tensor,
    gradient: Tensor,
    noise: Tensor,
    errors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the standard deviations of a system's weight rows and gradient rows.

    Parameters
    ----------
    z, deviation : Tensor, shape (N * B, *out_shape)
        The layer's output and the standard deviation carried over from above, infinite
        where nothing is known; the rounding of the client's own forward pass is added.
    gradient : Tensor, shape (N, *weight_shape), or (N, 0) of a layer without parameters
        Shared by the B images of an update.
    noise : Tensor, shape (N,)
    errors : Tensor, shape (N, *weight_shape), optional
        Those of the gradient's entries, where a known defence tells them.
    """
    rounding = FORWARD * torch.hypot(0.5 * rms(z), z)
    of_z = torch.hypot(deviation, rounding)
    if errors is not None:
        return of_z, torch.hypot(errors, GRADIENT * rms(gradient))
    of_gradient = per_update(noise.clamp_min(GRADIENT), gradient) * rms(gradient)
    return of_z, of_gradient


def solve_layer(
    layer: System,
    z: Tensor,
    e: Tensor,
    gradient: Tensor,
    deviations: tuple[Tensor, Tensor],
    start: Tensor,
) -> tuple[Tensor, Tensor]:
    """Solve one layer's system; return the solution nearest ``start`` and its residual.

    The B images of an update have weight rows of their own, and share the gradient rows:
    ``sum_b K(e_b) x_b = G``.

    Parameters
    ----------
    layer : System
    z, e : Tensor, shape (N * B, *out_shape)
    gradient : Tensor, shape (N, *weight_shape)
    deviations : tuple of Tensor
        From :func:`row_deviations`.
    start : Tensor, shape (N * B, *in_shape)

    Returns
    -------
    x : Tensor, shape (N * B, *in_shape)
    residual : Tensor, shape (N,)
    """
    count, batch = len(gradient), len(z) // len(gradient)
    together = _ENTRIES[z.device.type] / max(1, layer.solver_entries * batch)
    found = []
    for some in torch.arange(count).split(max(1, min(count, int(together)))):
        own, of = (slice(k * int(some[0]), k * (int(some[-1]) + 1)) for k in (1, batch))
        part = deviations[0][of], deviations[1][own]
        found.append(_solve_together(layer, z[of], e[of], gradient[own], part, start[of]))
    x, residual = zip(*found, strict=True)
    return torch.cat(x), torch.cat(residual)


def _solve_together(
    layer: System,
    z: Tensor,
    e: Tensor,
    gradient: Tensor,
    deviations: tuple[Tensor, Tensor],
    start: Tensor,
) -> tuple[Tensor, Tensor]:
    """Solve the systems of as many updates as fit, see :func:`solve_layer`."""
    of_z, of_gradient = deviations
    shape = (len(gradient), len(z) // len(gradient))
    # Rows are weighted by the inverse of their deviation, the most exact weight row by 1;
    # a row of infinite deviation drops out.
    own = of_z.flatten(1).amin(1)
    own = torch.where(own.isinf(), 1.0, own)
    least = own.reshape(shape).amin(1)
    each = least.repeat_interleave(shape[1])
    a, k = per_update(each, of_z) / of_z, per_update(least, of_gradient) / of_gradient
    target = layer.target(z, gradient.masked_fill(of_gradient.isinf(), 0.0))
    # What is known less well of an image than of the others has small rows; its unknowns are
    # counted in larger units, so that the system stays as well conditioned as one image's.
    unit = (own / each).reshape(-1, *[1] * len(layer.in_shape))

    def apply(y: Tensor) -> tuple[Tensor, Tensor]:
        rows = layer.apply(y.flatten(0, 1) * unit, e)
        return (rows.weight * a).unflatten(0, shape), rows.gradient.unflatten(0, shape).sum(1) * k

    def adjoint(rows: tuple[Tensor, ...]) -> Tensor:
        each = (rows[1] * k).repeat_interleave(shape[1], 0)
        back = layer.adjoint(Rows((rows[0].flatten(0, 1)) * a, each), e)
        return (back * unit).unflatten(0, shape)

    rhs = ((target.weight * a).unflatten(0, shape), target.gradient * k)
    inverse = None
    if k.numel() == shape[0]:
        each = k.reshape(-1, 1) * unit.reshape(shape)
        inverse = layer.regularised_inverse(e, a * per_update(unit.flatten(), a), each, adjoint)
    y, residual = cgls(apply, adjoint, rhs, (start / unit).unflatten(0, shape), inverse=inverse)
    return y.flatten(0, 1) * unit, residual
