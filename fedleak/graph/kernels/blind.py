"""The input of a convolution from its weight's gradient alone.

With ``E`` the derivative of the loss by the output and ``H`` the input, both by position and both
unknown, the gradient's slice at tap ``d`` is ``G_d = E S_d H``, where the 0/1 matrix ``S_d``
picks what the tap reads. Let ``U`` and ``V`` be bases of the gradient's column and row spaces,
``G_d = U B_d V``, ``E = U W``. Where there are no more input positions (times images) than
channels, ``H = X^-1 V``, and

    B_d x_j = w_p   where tap d reads input position j at output position p,
    B_d x_j = 0     where it never reads j:

linear and homogeneous in the columns of ``X`` and ``W``. Only multiples of the truth solve them,
for a batch mixtures of its images, the same at all positions. Labels, loss and the layers above
do not enter. Where there are no more output positions than filters, the same holds with the roles
of ``E`` and ``H`` exchanged, whatever the number of input channels.

A corner is read by fewer taps than every other position: its column is the common kernel of the
taps that never read it. The others follow one by one (:class:`Walk`). Then both factors are
solved in turn by least squares until the residual is the gradient's rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.graph.kernels.bilinear import normalised, polish, solve_factor
from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kernels.refusal import EXPLAINED, Refused
from fedleak.graph.kernels.walk import Relation, Walk
from fedleak.precision import HALF

#: A rank is believed where singular values fall by this factor there.
GAP = 5.0


@dataclass(frozen=True)
class BlindCriterion:
    """What decides whether a convolution's gradient alone tells its input.

    Attributes
    ----------
    outputs : int
        Positions of the output times images.
    inputs : int
        Positions of the input that are read, times images.
    out_channels, in_channels : int
    by_outputs : bool
        The output side suffices: no more output positions than filters, and the
        taps that look beyond the border at one corner have enough rows.
    by_inputs : bool
        The same of the input side.
    """

    outputs: int
    inputs: int
    out_channels: int
    in_channels: int
    by_outputs: bool
    by_inputs: bool

    @property
    def holds(self) -> bool:
        return self.by_outputs or self.by_inputs

    @property
    def reason(self) -> str:
        """Why not, or an empty string."""
        if self.holds:
            return ""
        return (
            f"{self.outputs} output positions times images for {self.out_channels} filters, "
            f"{self.inputs} input positions for {self.in_channels} channels, or no corner "
            "that fewer taps read"
        )


def blind_criterion(
    geometry: Geometry, out_channels: int, in_channels: int, images: int = 1
) -> BlindCriterion:
    """Say whether a convolution's gradient alone can tell its input, for so many images.

    A property of the architecture; that the factors have full rank is looked at by
    :func:`blind_convolution`.
    """
    outputs, inputs = images * geometry.outputs, images * int(geometry.seen.sum())
    whole = geometry.groups == 1 and geometry.mode == "zeros"

    def suffices(reverse: bool) -> bool:
        full, other = (outputs, inputs) if reverse else (inputs, outputs)
        channels, others = (out_channels, in_channels) if reverse else (in_channels, out_channels)
        if full > channels:
            return False
        relation = Relation.of(geometry, reverse)
        rows = min(other, others)
        return any(
            relation.plan(a) is not None and relation.silent(a) * rows >= full - images
            for a in relation.anchors
        )

    return BlindCriterion(
        outputs, inputs, out_channels, in_channels, whole and suffices(True),
        whole and suffices(False),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class BlindConvolution:
    """An input and the derivative by the output, up to one mixture of the images.

    With the truth ``x`` and ``e`` there is one ``M`` (B, B) with ``x = M inputs`` and
    ``e = M^-T cotangents``, the same at all positions and channels. For one image it is a number.

    Attributes
    ----------
    inputs : Tensor, float64, shape (B, C_in, H, W)
        Orthogonal, of unit mean square; zero at positions that no tap reads. For one image of
        positive sum.
    cotangents : Tensor, float64, shape (B, C_out, H_out, W_out)
    residual : float
        ``||G - E S H|| / ||G||``.
    error : float
        Estimate of the relative error of ``inputs``, beside the mixture.
    gap : float
        The least of: how far singular values fall at the rank of either factor, and at the
        kernel that the walk begins with.
    rank : int
        Of ``E``: below its positions under batch normalisation in training mode.
    """

    inputs: Tensor
    cotangents: Tensor
    residual: float
    error: float
    gap: float
    rank: int


def blind_convolution(gradient: Tensor, geometry: Geometry, images: int = 1) -> BlindConvolution:
    """Recover the input of a convolution from its weight's gradient.

    Parameters
    ----------
    gradient : Tensor, shape (C_out, C_in, kh, kw)
    geometry : Geometry
    images : int
        In the batch.

    Returns
    -------
    BlindConvolution

    Raises
    ------
    InvalidInputError
        The gradient does not fit the geometry.
    Refused
        The criterion does not hold, a rank or a kernel shows no gap, or the solution does not
        explain the gradient.
    """
    out, channels = gradient.shape[:2]
    if tuple(gradient.shape[2:]) != geometry.kernel or images < 1:
        raise InvalidInputError(
            f"a gradient of shape {tuple(gradient.shape)} of {images} images; the geometry's "
            f"kernel is {geometry.kernel}, and there is at least one image"
        )
    criterion = blind_criterion(geometry, out, channels, images)
    if not criterion.holds:
        raise Refused(f"blind convolution: {criterion.reason}")
    g = gradient.double().flatten(2)
    left, fall_left = column_space(g.flatten(1), criterion.outputs, images)
    right, fall_right = column_space(g.transpose(0, 1).flatten(1), criterion.inputs)
    # Both factors lie in these spaces, to first order in the noise: nothing else need be fitted.
    small = torch.einsum("or,oct,cs->rst", left, g, right)
    walk = _best_walk(small.permute(2, 0, 1), geometry, images, criterion)
    walk.fill()
    factor = walk.others.permute(2, 0, 1)  # (B, channels, positions)
    if walk.relation.reverse:
        x = factor.unflatten(2, geometry.size)
        e = solve_factor(small, geometry, inputs=x)
    else:
        e = factor.unflatten(2, geometry.out)
        x = solve_factor(small, geometry, cotangents=e)
    x, e, linearised = polish(small, geometry, x, e)
    inputs = torch.einsum("cr,brhw->bchw", right, x)
    cotangents = torch.einsum("cr,brhw->bchw", left, e)
    off = g - geometry.gradient(inputs, cotangents)
    residual = float(off.norm() / g.norm())
    if not residual <= EXPLAINED:
        raise Refused(
            f"blind convolution: what was found leaves {residual:.1e} of the gradient "
            f"unexplained, {EXPLAINED:.0e} is asked for"
        )
    level = max(float(off.square().mean().sqrt()), HALF * float(g.square().mean().sqrt()))
    error = linearised.error(level, channels - right.shape[1])
    gap = min(fall_left, fall_right, walk.gap)
    return BlindConvolution(*normalised(inputs, cotangents), residual, error, gap, left.shape[1])


def column_space(matrix: Tensor, most: int, fewer: int = 0) -> tuple[Tensor, float]:
    """Return a basis of the column space, of rank ``most`` or less, and how far values fall there.

    The singular value after ``most`` is noise; where there is none, float32's rounding is taken
    for it. Of the ranks down to ``fewer`` less it is the one after which values fall most:
    normalisation in training mode takes a rank of ``E`` for each constant it removes, and
    the rounding of that stands a little above the noise.
    """
    u, s = _leading(matrix, most + 1)
    noise = (s[most] if len(s) > most else HALF / 3 * s[0]).maximum(1e-15 * s[0])
    above = torch.cat([s[:most], noise.reshape(1)]).maximum(noise)
    falls = above[:-1] / above[1:].clamp_min(1e-300)
    rank = int((s[:most] > GAP * noise).sum())
    if not rank:
        raise Refused("blind convolution: the gradient is zero, or as large as its noise")
    if rank >= most - fewer:
        first = max(0, most - fewer - 1)
        rank = first + 1 + int(falls[first:].argmax())
    return u[:, :rank], float(above[rank - 1] / noise)


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` left singular vectors and values, or all if there are fewer.

    By subspace iteration where they are few of many (Halko, Martinsson & Tropp 2011): noise's
    values are far below, so two rounds leave nothing of it.
    """
    width = count + 8
    if 2 * width < len(matrix) and len(matrix) <= matrix.shape[1]:
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(len(matrix), width, generator=generator, dtype=torch.float64)
        basis = basis.to(matrix)
        for _ in range(3):
            basis = torch.linalg.qr(matrix.mT @ torch.linalg.qr(basis).Q).Q
            basis = matrix @ basis
        basis = torch.linalg.qr(basis).Q
        r = torch.linalg.qr((basis.mT @ matrix).mT, mode="r").R
        u, s, _ = torch.linalg.svd(r.mT)
        return (basis @ u)[:, :count], s[:count]
    if matrix.shape[1] > len(matrix):
        matrix = torch.linalg.qr(matrix.mT, mode="r").R.mT
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :count], s[:count]


def _best_walk(slices: Tensor, geometry: Geometry, images: int, criterion: BlindCriterion) -> Walk:
    """Return the walk that begins with the clearest kernel."""
    walks, refused = [], []
    for reverse, holds in ((False, criterion.by_inputs), (True, criterion.by_outputs)):
        relation = Relation.of(geometry, reverse)
        full, wanted = slices.shape[1 if reverse else 2], images * len(relation.nodes)
        if full != wanted:
            refused.append(Refused(f"blind convolution: rank {full} of {wanted}"))
        if not holds or full != wanted:
            continue
        try:
            walks.append(Walk(slices.mT if reverse else slices, relation, images))
        except Refused as error:
            refused.append(error)
    if not walks:
        raise refused[0]
    return max(walks, key=lambda walk: walk.gap)
