"""Both factors of a convolution's gradient at once, from a start near them."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kernels.refusal import Refused
from fedleak.graph.kernels.rows import NEGLIGIBLE, cotangent_matrix

#: Gauss-Newton steps at most, products with the Jacobian in each, and the fall of the residual
#: that pays for another.
_STEPS, _PRODUCTS, _PAYS = 12, 60, 0.98
#: The normal equations' residual falls by this factor in a step.
_TOLERANCE = 1e-3


class Linearised:
    """``G = E S H``, linearised at a point, in coordinates that make either factor orthonormal."""

    def __init__(self, g: Tensor, x: Tensor, e: Tensor, geometry: Geometry):
        self.x, self.shape = x, (x.shape, e.shape)
        self.by_x, self.r_x = _factor(cotangent_matrix(e, geometry).flatten(0, 1), "input")
        patches = geometry.patches(x).permute(1, 2, 0, 3)  # (C_in, taps, B, outputs)
        self.by_e, self.r_e = _factor(patches.flatten(2).flatten(0, 1), "output")
        self.off = g - geometry.gradient(x, e)
        self.filters, self.channels, self.taps = g.shape

    def apply(self, u: Tensor, v: Tensor) -> Tensor:
        by_x = (self.by_x @ u).unflatten(0, (self.filters, self.taps)).transpose(1, 2)
        return by_x + (self.by_e @ v).mT.unflatten(1, (self.channels, self.taps))

    def adjoint(self, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.by_x.mT @ r.transpose(1, 2).flatten(0, 1), self.by_e.mT @ r.flatten(1).mT

    def solve(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least change of inputs and cotangents that explains ``right`` (CGLS)."""
        r, (su, sv) = right, self.adjoint(right)
        u, v = torch.zeros_like(su), torch.zeros_like(sv)
        pu, pv = su, sv
        size = first = su.square().sum() + sv.square().sum()
        for _ in range(_PRODUCTS):
            if not bool(size > _TOLERANCE**2 * first):
                break
            q = self.apply(pu, pv)
            length = size / q.square().sum()
            u, v, r = u + length * pu, v + length * pv, r - length * q
            su, sv = self.adjoint(r)
            fresh = su.square().sum() + sv.square().sum()
            pu, pv, size = su + fresh / size * pu, sv + fresh / size * pv, fresh
        solve = torch.linalg.solve_triangular
        u, v = solve(self.r_x, u, upper=True), solve(self.r_e, v, upper=True)
        of_x, of_e = self.shape
        x = u.unflatten(0, (of_x[0], -1)).transpose(1, 2).reshape(of_x)
        return x, v.unflatten(0, (of_e[0], -1)).transpose(1, 2).reshape(of_e)

    def error(self, level: float, more: int, seed: int = 0) -> float:
        """Estimate the relative error of the inputs, beside a mixture of the images.

        Parameters
        ----------
        level : float
            Standard deviation of the noise of an entry: one draw of it is solved for.
        more : int
            Channels outside the space that was solved in, each with its noise alone.
        seed : int
            Of the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.off.shape, generator=generator, dtype=torch.float64)
        dx = self.solve(level * noise.to(self.off))[0].flatten(1)
        basis = torch.linalg.qr(self.x.flatten(1).mT).Q
        dx = dx - dx @ basis @ basis.mT
        eye = torch.eye(len(self.r_x)).to(self.r_x)
        inverse = torch.linalg.solve_triangular(self.r_x, eye, upper=True)
        square = dx.square().sum() + more * (level * inverse).square().sum()
        return float(square.sqrt() / self.x.norm())


def _factor(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(matrix)
    size = r.diagonal().abs()
    if len(r) < r.shape[1] or bool(size.min() <= NEGLIGIBLE * size.max()):
        raise Refused(f"blind convolution: gradient rows leave directions of the {what} open")
    return q, r


def solve_factor(
    g: Tensor,
    geometry: Geometry,
    inputs: Tensor | None = None,
    cotangents: Tensor | None = None,
) -> Tensor:
    """Return the one factor of a gradient (C_out, C_in, taps) that explains it with the other."""
    if cotangents is not None:
        matrix = cotangent_matrix(cotangents, geometry).flatten(0, 1)
        right, images, size = g.transpose(1, 2).flatten(0, 1), len(cotangents), geometry.size
    elif inputs is not None:
        matrix = geometry.patches(inputs).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
        right, images, size = g.flatten(1).mT, len(inputs), geometry.out
    else:
        raise ValueError("one of the factors is needed")
    q, r = _factor(matrix, "factor")
    solved = torch.linalg.solve_triangular(r, q.mT @ right, upper=True)
    return solved.unflatten(0, (images, -1)).transpose(1, 2).unflatten(2, size)


def polish(
    g: Tensor, geometry: Geometry, x: Tensor, e: Tensor
) -> tuple[Tensor, Tensor, Linearised]:
    """Fit both factors to a gradient by Gauss-Newton, from a start near them.

    Parameters
    ----------
    g : Tensor, float64, shape (C_out, C_in, taps)
    geometry : Geometry
    x : Tensor, shape (B, C_in, H, W)
    e : Tensor, shape (B, C_out, H_out, W_out)

    Returns
    -------
    x, e : Tensor
    linearised : Linearised
        There.

    Raises
    ------
    Refused
        Gradient rows leave directions of a factor open.
    """
    x, e = normalised(x, e)
    here = Linearised(g, x, e, geometry)
    for _ in range(_STEPS):
        dx, de = here.solve(here.off)
        nx, ne = normalised(x + dx, e + de)
        there = Linearised(g, nx, ne, geometry)
        before, after = float(here.off.norm()), float(there.off.norm())
        if not after < before:
            break
        x, e, here = nx, ne, there
        if after > _PAYS * before:
            break
    return x, e, here


def normalised(x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Mix images so that inputs are orthogonal, of unit mean square; one image's has sum > 0."""
    flat = x.flatten(1)
    q, r = torch.linalg.qr(flat.mT)  # flat = r^T q^T
    scale = flat.shape[1] ** 0.5
    if len(x) == 1 and float(q.sum()) < 0:
        scale = -scale
    return (q.mT * scale).reshape(x.shape), ((r @ e.flatten(1)) / scale).reshape(e.shape)
