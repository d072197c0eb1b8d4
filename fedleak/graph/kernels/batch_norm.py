"""The input of a convolution whose output is normalised by its own statistics.

For ``z = conv(x)``, ``z_hat = (z - mean) / sigma`` and ``y = gamma z_hat + beta``, with ``d`` the
derivative of the loss by ``y``, the derivative by ``z`` is

    e = (gamma d - mean(gamma d) - z_hat mean(gamma d z_hat)) / sigma

(Ioffe & Szegedy 2015), means over what is normalised together: in batch normalisation a channel's
positions in all images, where ``mean(d)`` and ``mean(d z_hat)`` are the gradients of beta and
gamma over the count; in group, layer and instance normalisation a group of channels of one image.
``d`` is known from the layer above. ``z_hat`` is known where the activation that follows is
active, and nowhere if a shortcut is added first; ``sigma`` is not. A fixed point: solve ``K(e) x
= G``, take ``z_hat`` and ``sigma`` from ``conv(x)``, and again. The scale of ``x`` is hidden by
the normalisation but for its eps; :func:`image_factors` finds it in the layer below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kernels.refusal import EXPLAINED, Refused
from fedleak.graph.kernels.rows import Rows, RowsSolution, solve_rows

#: Rounds of the fixed point, at most; the relative change that ends them.
_ROUNDS, _SETTLED = 40, 1e-8
#: Values below this share of the root mean square lie at the zero of a ReLU.
_ZERO = 1e-3
#: How often the scale is taken from eps.
_EPSILONS = 2


@dataclass(frozen=True, eq=False)
class Normalised:
    """A convolution, the normalisation of its output by its own statistics, and what is known.

    Attributes
    ----------
    gradient : Tensor, shape (C_out, C_in, kh, kw)
        Of the convolution's weight.
    weight : Tensor, of the same shape
    geometry : Geometry
    derivative : Tensor, shape (B, C_out, H_out, W_out)
        Of the loss by the normalisation's output.
    gamma : Tensor, shape (C_out,)
    gamma_gradient, beta_gradient : Tensor, shape (C_out,), optional
        Used where they tell the means exactly: batch normalisation, and one image.
    groups : int or None
        Channels of one image are normalised in so many groups; None for batch normalisation.
        One for each channel is instance normalisation, one alone layer normalisation of a
        whole image.
    eps : float
        Added to the variances.
    known : Tensor, shape (B, C_out, H_out, W_out), optional
        ``z_hat`` where ``active``.
    active : Tensor of bool, optional
    """

    gradient: Tensor
    weight: Tensor
    geometry: Geometry
    derivative: Tensor
    gamma: Tensor
    gamma_gradient: Tensor | None = None
    beta_gradient: Tensor | None = None
    groups: int | None = None
    eps: float = 1e-5
    known: Tensor | None = None
    active: Tensor | None = None

    def __post_init__(self) -> None:
        if self.groups is not None and self.gradient.shape[0] % self.groups:
            raise InvalidInputError(
                f"{self.groups} groups do not divide {self.gradient.shape[0]} channels"
            )
        if (self.known is None) != (self.active is None):
            raise InvalidInputError("give both known and active, or neither")

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over what is normalised together, as broad as ``x``."""
        if self.groups is None:
            return x.mean((0, 2, 3), keepdim=True).expand_as(x)
        grouped = x.unflatten(1, (self.groups, -1))
        return grouped.mean((2, 3, 4), keepdim=True).expand_as(grouped).flatten(1, 2)

    def start(self) -> Tensor:
        """Return the first guess of ``z_hat``: unknown entries alike, so that means are zero."""
        if self.known is None or self.active is None:
            return torch.zeros_like(self.derivative, dtype=torch.float64)
        kept = torch.where(self.active, self.known.double(), 0.0)
        open_ = self.mean((~self.active).double())
        fill = -self.mean(kept) / open_.clamp_min(1e-12)
        return torch.where(self.active, kept, fill)

    def normalise(self, x: Tensor, inverse: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
        """Return ``z_hat`` of an input, and the deviation that it was divided by, as broad.

        ``inverse`` is that of the square of the number by which ``x`` falls short of the truth.
        """
        geometry = self.geometry
        left, right, top, bottom = geometry.padding
        padded = F.pad(x, (left, right, top, bottom))
        z = F.conv2d(
            padded, self.weight.double(), None, geometry.stride, 0, geometry.dilation,
            geometry.groups,
        )  # fmt: skip
        z = z - self.mean(z)
        sigma = (self.mean(z.square()) + self.eps * inverse).sqrt().clamp_min(1e-300)
        return z / sigma, sigma

    def with_known(self, z_hat: Tensor) -> Tensor:
        if self.known is None or self.active is None:
            return z_hat
        return torch.where(self.active, self.known.double(), z_hat)

    def cotangent(self, z_hat: Tensor, sigma: Tensor) -> Tensor:
        """Return the derivative of the loss by the convolution's output."""
        scaled = self.derivative.double() * self.gamma.double()[:, None, None]
        shift, slope = self.told(self.beta_gradient), self.told(self.gamma_gradient)
        shift = self.mean(scaled) if shift is None else shift
        slope = self.mean(scaled * z_hat) if slope is None else slope
        e = (scaled - shift - z_hat * slope) / sigma
        # Zero at the truth: so what a stride leaves open is exactly open from the first round on.
        return e - self.mean(e * sigma) / sigma

    def told(self, gradient: Tensor | None) -> Tensor | None:
        """Return the mean that a parameter's gradient tells, as broad as the derivative, if so."""
        images = len(self.derivative)
        if gradient is None or (self.groups is not None and images > 1):
            return None
        each = (self.gamma * gradient).double() / (images * self.geometry.outputs)
        return self.mean(each[None, :, None, None].expand_as(self.derivative))


@dataclass(frozen=True, eq=False)
class NormalisedSolution:
    """An input found at the fixed point.

    Attributes
    ----------
    values : Tensor, float64, shape (B, C_in, H, W)
        Up to one positive number for all, or for each image where images are normalised
        apart: of unit mean square.
    cotangents : tuple of Tensor
        Of each part, the derivative by its convolution's output; up to that number's inverse.
    z_hat : tuple of Tensor
        Of each part, its normalised output.
    scale : float
        That number, from what eps leaves of the variances: right to some per cent, and infinite
        where eps tells nothing. :func:`image_factors` finds it exactly.
    residual : float
        ``||K(e) x - G|| / ||G||``.
    error : float
        Estimate of the relative error of ``values``: of the rows and of the last change.
    rounds : int
    lifted : Tensor of bool, shape (B, H, W)
        Positions along which a direction that rows leave open was told by the exact zeros of a
        ReLU.
    unsure : Tensor of bool, shape (C_in,)
        Channels where fewer than two values lie at that zero, so that it may be none.
    """

    values: Tensor
    cotangents: tuple[Tensor, ...]
    z_hat: tuple[Tensor, ...]
    scale: float
    residual: float
    error: float
    rounds: int
    lifted: Tensor
    unsure: Tensor


def solve_normalised(*parts: Normalised, rectified: bool = True) -> NormalisedSolution:
    """Find the input of convolutions that read one tensor, each normalised by its statistics.

    Parameters
    ----------
    *parts : Normalised
        A block's convolution and that of its shortcut.
    rectified : bool
        Whether the input comes from a ReLU: it is not negative, and zeros are exact. With a stride
        the gradient does not change with a constant on the positions that the centre alone
        reads: then every channel's least value there is taken for zero.

    Raises
    ------
    Refused
        Directions are open that zeros do not tell, the rounds do not converge, or the result
        does not explain the gradient.
    """
    point = _Point(parts, rectified)
    rounds = point.settle()
    for _ in range(_EPSILONS):
        if not point.weigh_eps():
            break
        rounds += point.settle()
    found = point.found
    if not found.residual <= EXPLAINED:
        raise Refused(
            f"normalised convolution: {found.residual:.1e} of the gradient is left after "
            f"{rounds} rounds, {EXPLAINED:.0e} is asked for"
        )
    return NormalisedSolution(
        point.x,
        tuple(e * point.size for e in point.cotangents),
        tuple(point.z_hat),
        point.inverse**-0.5 if point.inverse > 0 else float("inf"),
        found.residual,
        (_error_of(found) ** 2 + point.change**2) ** 0.5,
        rounds,
        point.lifted,
        point.unsure,
    )


class _Point:
    """Where the fixed point stands."""

    def __init__(self, parts: Sequence[Normalised], rectified: bool):
        self.parts, self.rectified = parts, rectified
        self.guess = [part.start() for part in parts]
        self.sigma = [torch.ones_like(z) for z in self.guess]
        self.inverse, self.change = 0.0, float("inf")

    def solve(self) -> RowsSolution:
        """Solve for the input with what is thought of ``z_hat`` and ``sigma``."""
        self.cotangents = [
            p.cotangent(z, s) for p, z, s in zip(self.parts, self.guess, self.sigma, strict=True)
        ]
        return solve_rows(
            *(
                Rows(p.gradient, e, p.geometry)
                for p, e in zip(self.parts, self.cotangents, strict=True)
            )
        )

    def _size(self, x: Tensor) -> Tensor:
        """Return the root mean square of what one number is open of: all images, or each."""
        apart = any(p.groups is not None for p in self.parts)
        return x.square().mean((1, 2, 3) if apart else (0, 1, 2, 3), keepdim=True).sqrt()

    def take(self, x: Tensor) -> None:
        """Take ``z_hat`` and ``sigma`` from an input."""
        x = x.clamp_min(0) if self.rectified else x
        fresh = [part.normalise(x, self.inverse) for part in self.parts]
        self.z_hat, self.sigma = [z for z, _ in fresh], [s for _, s in fresh]
        self.guess = [p.with_known(z) for p, z in zip(self.parts, self.z_hat, strict=True)]

    def settle(self) -> int:
        """Go on until nothing changes; return how many rounds that took."""
        before: Tensor | None = None
        for rounds in range(1, _ROUNDS + 1):
            self.found = self.solve()
            x, self.lifted, self.unsure = _lift(self.found, self.rectified)
            self.size = self._size(x)
            self.x = x / self.size
            self.take(self.x)
            last = self.change
            self.change = float("inf") if before is None else _relative(self.x, before)
            before = self.x
            if self.change < _SETTLED or (rounds > 4 and self.change > 0.7 * last):
                break
        return rounds

    def weigh_eps(self) -> bool:
        """Find the scale of the input by what eps does to the residual; return whether it tells.

        Solved rows' residual is linear in the inverse square of the scale, as eps is small.
        """
        if not any(p.eps for p in self.parts):
            return False
        eps = max(p.eps for p in self.parts)
        step = 1e-3 * float(torch.cat([s.square().flatten() for s in self.sigma]).median()) / eps
        kept, here = self.inverse, self._rest()
        self.inverse = kept + step
        self.take(self.x)
        there = self._rest() - here
        share = -float((here * there).sum() / there.square().sum().clamp_min(1e-300))
        self.inverse = max(0.0, kept + share * step)
        self.take(self.x)
        return self.inverse != kept

    def _rest(self) -> Tensor:
        """Return the residual of the rows, each filter's in the unit of its size."""
        found = self.solve()
        rest = [
            (p.geometry.gradient(found.values, e) - p.gradient.double().flatten(2)).flatten(1)
            / Rows(p.gradient, e, p.geometry).scale[:, None]
            for p, e in zip(self.parts, self.cotangents, strict=True)
        ]
        size = found.values.norm()
        return torch.cat([r.flatten() for r in rest]) / size


def _lift(found: RowsSolution, rectified: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Raise each channel along the one open direction until its least value there is zero.

    Returns
    -------
    x : Tensor, shape (B, C_in, H, W)
    support : Tensor of bool, shape (B, H, W)
    unsure : Tensor of bool, shape (C_in,)
    """
    x, null = found.values, found.open
    unsure = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    if not null.shape[2]:
        return x, torch.zeros_like(x[:, 0], dtype=torch.bool), unsure
    if not rectified or null.shape[2] > 1 or len(null) > 1:
        raise Refused(
            f"normalised convolution: {null.shape[2]} directions of every channel are open"
        )
    v = null[0, :, 0]
    v = v * v.sum().sign()
    support = v > 1e-6 * v.max()
    if bool((v < -1e-6 * v.max()).any()):
        raise Refused("normalised convolution: the open direction is of both signs")
    flat = x.transpose(0, 1).flatten(1)  # (C_in, B H W), as the rows number them
    # Along v every entry of the support must rise to zero at least; the last one is at zero.
    need = (-flat[:, support] / v[support]).amax(1)
    flat = flat + need[:, None] * v * support
    at_zero = flat[:, support] < _ZERO * flat.square().mean().sqrt()
    unsure = at_zero.sum(1) < 2
    lifted = flat.unflatten(1, (x.shape[0], -1)).transpose(0, 1).reshape(x.shape)
    return lifted, support.reshape(x[:, 0].shape), unsure


def _error_of(found: RowsSolution) -> float:
    return float(
        (found.deviation.square().mean() / found.values.square().mean().clamp_min(1e-300)).sqrt()
    )


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def image_factors(derivative: Tensor, beta_gradient: Tensor) -> tuple[Tensor, float]:
    """Find a number for each image from the gradient of a normalisation's beta.

    ``beta_gradient = sum_b f_b sum_p derivative[b, :, p]``, one equation for each channel.

    Parameters
    ----------
    derivative : Tensor, shape (B, C, H, W)
        Of the loss by the normalisation's output, each image's up to a number.
    beta_gradient : Tensor, shape (C,)

    Returns
    -------
    factors : Tensor, shape (B,)
    residual : float
        Relative.
    """
    sums = derivative.double().sum((2, 3)).mT  # (C, B)
    right = beta_gradient.double()
    size = sums.norm(dim=0)
    factors = torch.linalg.lstsq(sums / size, right[:, None]).solution[:, 0] / size
    return factors, _relative(sums @ factors, right)


def zero_sum_factors(cotangents: Tensor) -> tuple[Tensor, float]:
    """Find how images weigh against each other where batch normalisation makes sums zero.

    ``sum_b f_b sum_p e[b, :, p] = 0`` for every channel of a convolution before it.

    Parameters
    ----------
    cotangents : Tensor, shape (B, C, H, W)
        Each image's up to a number.

    Returns
    -------
    factors : Tensor, shape (B,)
        Of unit norm, of positive sum.
    residual : float
        Least singular value over the next: small where there is one answer.
    """
    sums = cotangents.double().sum((2, 3)).mT  # (C, B)
    size = sums.norm(dim=0)
    _, s, vh = torch.linalg.svd(sums / size, full_matrices=False)
    factors = vh[-1] / size
    factors = factors / factors.norm()
    return factors * factors.sum().sign(), float(s[-1] / s[-2]) if len(s) > 1 else 0.0


def derivative_above(
    part: Normalised, x: Tensor, cotangent: Tensor, inverse: float | Tensor = 0.0
) -> Tensor:
    """Return the derivative by a normalisation's output from that by its input.

    That needs two means over what is normalised together. The gradients of beta and gamma are
    those of batch normalisation or one image; of groups of several images they are sums, two
    equations for each channel of a group.

    Parameters
    ----------
    part : Normalised
        With both gradients; its ``derivative`` gives the shape alone.
    x : Tensor, shape (B, C_in, H, W)
        The convolution's input, up to a number for all, or for each image where images are
        normalised apart.
    cotangent : Tensor, shape (B, C_out, H_out, W_out)
        The derivative by the convolution's output, up to that number's inverse.
    inverse : float or Tensor, shape (B, 1, 1, 1)
        That of the number's square, by which eps counts; see :meth:`Normalised.normalise`.
    """
    if part.beta_gradient is None or part.gamma_gradient is None:
        raise InvalidInputError("the gradients of gamma and beta are needed")
    z_hat, sigma = part.normalise(x, inverse)
    shift, slope = part.told(part.beta_gradient), part.told(part.gamma_gradient)
    if shift is None or slope is None:
        shift, slope = _group_means(part, z_hat, cotangent * sigma)
    return (cotangent * sigma + shift + z_hat * slope) / part.gamma.double()[:, None, None]


def _group_means(part: Normalised, z_hat: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of each group of several images, as broad as ``rest``.

    ``gamma d = rest + shift + z_hat slope``, summed over images and positions, is gamma times the
    gradient of beta; times ``z_hat``, that of gamma.
    """
    assert part.groups is not None and part.beta_gradient is not None
    assert part.gamma_gradient is not None
    sums = [part.gamma * part.beta_gradient, part.gamma * part.gamma_gradient]
    right = [s.double() - r.sum((0, 2, 3)) for s, r in zip(sums, (rest, rest * z_hat), strict=True)]
    ones, first, second = (z_hat.pow(k).sum((2, 3)).mT for k in range(3))  # (C, B)
    rows = torch.stack([torch.cat([ones, first], 1), torch.cat([first, second], 1)], 1)
    grouped = part.groups, -1
    matrix = rows.unflatten(0, grouped).flatten(1, 2)  # (groups, 2 C / groups, 2 B)
    if matrix.shape[1] < matrix.shape[2]:
        raise Refused(f"{matrix.shape[1]} sums of a group for the means of {len(rest)} images")
    value = torch.stack(right, 1).unflatten(0, grouped).flatten(1, 2).unsqueeze(2)
    means = torch.linalg.lstsq(matrix, value).solution[:, :, 0].unflatten(1, (2, -1))
    each = rest.shape[1] // part.groups
    shift, slope = means.permute(1, 2, 0).repeat_interleave(each, 2)[..., None, None]
    return shift.expand_as(rest), slope.expand_as(rest)


__all__: Sequence[str] = (
    "Normalised",
    "NormalisedSolution",
    "derivative_above",
    "image_factors",
    "solve_normalised",
    "zero_sum_factors",
)
