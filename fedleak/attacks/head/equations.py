"""The equations that tell the images of a batch apart at the head, and their solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak import deadline
from fedleak.client.loss import PLAIN, CanonicalLoss
from fedleak.precision import ENTRY, NOISY, SOFTMAX
from fedleak.solvers.gaussian import cholesky
from fedleak.tensors import per_update

#: ``X -> (r, dr)``: what the layers below demand to be zero, (B, q), each of one image alone,
#: and its derivatives by that image's ``X``, (B, q, F).
Constraint = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Mixture:
    """``E(M)^T M = H``, ``sum E(M) = g``, rows and columns weighted by their rounding."""

    gradient: Tensor  # G (C, F)
    bias: Tensor  # g (C,)
    weight: Tensor  # W (C, F)
    offset: Tensor  # b (C,)
    basis: Tensor  # R (B, F)
    noise: float  # of an entry, relative to their root mean square
    labels: Tensor  # (B,)
    rounding: tuple[float, float] = (0.0, 0.0)  # of an entry of G and of g, beside float32's
    loss: CanonicalLoss = PLAIN

    def __post_init__(self) -> None:
        self.logits = self.basis @ self.weight.mT  # of each basis vector, (B, C)
        self.target = self.gradient @ self.basis.mT  # H (C, B)
        outputs = len(self.bias)
        self.own = self.loss.targets(self.labels, outputs).to(self.bias)  # Y (B, C)
        # E = (mass P - Y) / divisor.
        divisor, mass = (
            self.loss.divisor(self.labels, outputs),
            self.loss.mass(self.labels, outputs),
        )
        self.divisor = divisor.to(self.bias) if isinstance(divisor, Tensor) else divisor
        self.mass = None if mass is None else mass.to(self.bias)  # (B, 1)
        rows = self.gradient.square().mean(1).sqrt()
        self.of_g = (ENTRY * rows).maximum(self.noise * rows.square().mean().sqrt())
        self.of_g = self.of_g.clamp_min(self.rounding[0])
        told = float(self.of_g.mean() / rows.square().mean().sqrt().clamp_min(1e-300))
        self.noisy = max(self.noise, told) > NOISY  # as the difference of weights may be
        self.of_bias = (self.noise * self.bias.square().mean().sqrt()).clamp_min(self.rounding[1])
        self.constraint: Constraint | None = None
        self.demands = self.bias.new_zeros(())
        self.unweigh()

    @property
    def batch(self) -> int:
        return len(self.labels)

    def _counted(self, p: Tensor) -> Tensor:
        """Return probabilities, or changes of them, as they count in ``E``; (..., B, C)."""
        return (p if self.mass is None else self.mass * p) / self.divisor

    def cotangents(self, p: Tensor) -> Tensor:
        """Return ``E`` for the probabilities ``p``, shape (..., B, C)."""
        return ((p if self.mass is None else self.mass * p) - self.own) / self.divisor

    def mean_probabilities(self) -> Tensor:
        """Return what the bias gradient says of the mean over the batch, (C,)."""
        if self.mass is None and self.divisor == self.batch:
            return self.bias + self.own.sum(0) / self.batch
        mass = float(self.batch) if self.mass is None else self.mass.sum()
        return (self.bias * self.divisor + self.own.sum(0)).flatten() / mass

    def probabilities(self, mean: Tensor, shift: Tensor) -> Tensor:
        """Return probabilities whose logits are ``shift`` away from those of ``mean``."""
        return self.loss.link(self.loss.unlink(mean) + shift)

    def unweigh(self) -> None:
        """Weigh all equations alike."""
        self.mix = torch.eye(self.batch).to(self.own)  # whitens the columns of E^T M - H
        self.rows = self.sums = torch.ones_like(self.bias)

    def weigh(self, m: Tensor) -> None:
        """Set the weights by the rounding of the client's softmax and sums, given ``M``."""
        logits = m @ self.logits + self.offset
        p = self.loss.link(logits)
        of_basis = self.of_basis(self.cotangents(p))
        # Of each image's p, relative: rounding, and what noise in its input does to
        # its logits. (Rounding does so too, but less than its size lets expect.)
        spread = (self.weight - self.weight.mean(0)).square().sum(1).mean().sqrt()
        spread = spread * self.noisy
        rounding = SOFTMAX * (1 + logits.abs().amax(1))
        of_p = torch.hypot(rounding, of_basis * spread)
        of_e = self._counted(of_p.unsqueeze(1) * p)
        level = of_e.mean(1, keepdim=True)
        even = torch.eye(len(m)).to(m) * self.of_g.mean().square()
        covariance = (m * level).mT @ (m * level) + even
        self.mix = torch.linalg.inv(cholesky(covariance)).mT
        # Where errors of the softmax are not what limits, neither is their share in each row.
        of_row = torch.hypot(of_e.square().mean(0).sqrt() * rows_rms(m).mean(), self.of_g)
        self.rows = of_row.mean() / of_row
        self.sums = 1 / torch.hypot(of_e.square().sum(0).sqrt(), self.of_bias)
        if self.constraint is not None:
            x = m @ self.basis
            of_x = torch.hypot(of_basis, ENTRY * rows_rms(x))
            change = self.constraint(x)[1].norm(dim=2)
            self.demands = 1 / (change * of_x.unsqueeze(1)).clamp_min(1e-300)

    def of_basis(self, e: Tensor) -> Tensor:
        """Return the standard deviation of each input's entries that no ``M`` can mend, (B,)."""
        return (torch.linalg.pinv(e.mT) * self.of_g).square().sum(1).sqrt()

    def evaluate(self, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return ``P``, ``E``, both residuals and their sum of squares for (K, B, B)."""
        p = self.loss.link(m @ self.logits + self.offset)
        e = self.cotangents(p)
        r1 = ((e.mT @ m - self.target) @ self.mix) * self.rows.unsqueeze(1)
        r2 = (e.sum(1) - self.bias) * self.sums
        value = r1.square().sum((1, 2)) + r2.square().sum(1)
        if self.constraint is not None:
            demanded, _ = self.constraint(m[0] @ self.basis)
            value = value + (demanded * self.demands).square().sum()
        return p, e, r1, r2, value

    def normal(
        self, m: Tensor, p: Tensor, e: Tensor, r1: Tensor, r2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ``J^T J``, (K, B^2, B^2), and ``J^T r``, (K, B^2), without building ``J``."""
        count = len(m)
        # de_b / dm_b, shape (K, B, C, B).
        slopes = self.loss.slopes(p, self.logits)
        change = (slopes if self.mass is None else self.mass.unsqueeze(2) * slopes) / self.divisor
        a, s = change * self.rows.unsqueeze(1), change * self.sums.unsqueeze(1)
        mixed, ew = m @ self.mix, e * self.rows
        flat = a.transpose(1, 2).flatten(2)
        gram = (flat.mT @ flat).unflatten(2, (self.batch, -1)).unflatten(1, (self.batch, -1))
        jtj = gram * (mixed @ mixed.mT)[:, :, None, :, None]
        cross = torch.einsum("xbck,xdc,xbl->xbkdl", a, ew, mixed @ self.mix.mT)
        jtj = jtj + cross + cross.permute(0, 3, 4, 1, 2)
        jtj = jtj + torch.einsum("xbd,kl->xbkdl", ew @ ew.mT, self.mix @ self.mix.mT)
        flat = s.transpose(1, 2).flatten(2)
        jtj = jtj.flatten(3).flatten(1, 2) + flat.mT @ flat
        slope = torch.einsum("xbck,xbj,xcj->xbk", a, mixed, r1)
        slope = slope + torch.einsum("xbc,xcj,kj->xbk", ew, r1, self.mix)
        slope = slope + torch.einsum("xbck,xc->xbk", s, r2)
        if self.constraint is not None:
            r, dr = self.constraint(m[0] @ self.basis)
            by_m = (dr @ self.basis.mT) * self.demands.unsqueeze(2)  # (B, q, B)
            slope = slope + torch.einsum("bqk,bq->bk", by_m, r * self.demands)
            jtj = jtj + torch.block_diag(*(by_m.mT @ by_m))
        return jtj, slope.reshape(count, -1)

    def solve(self, m: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Levenberg-Marquardt from every ``M`` of (K, B, B); return those and the values."""
        damping = torch.full((len(m),), 1e-2).to(m)
        idle = torch.zeros(len(m), dtype=torch.int64, device=m.device)
        p, e, r1, r2, value = self.evaluate(m)
        for _ in range(steps):
            if deadline.passed():
                break
            jtj, slope = self.normal(m, p, e, r1, r2)
            step = damped(jtj, slope, damping)
            trial = m - step.reshape(m.shape)
            p_, e_, r1_, r2_, value_ = self.evaluate(trial)
            down = value_ < value
            gained = down & (value_ < value * (1 - 1e-4))
            idle = torch.where(gained, 0, idle + 1)
            m, p, e, r1, r2, value = (
                torch.where(per_update(down, new), new, old)
                for new, old in zip(
                    (trial, p_, e_, r1_, r2_, value_), (m, p, e, r1, r2, value), strict=True
                )
            )
            damping = torch.where(down, damping * 0.3, damping * 4).clamp(1e-15, 1e8)
            # The best has settled; the others would only come to the same, or to worse.
            if int(idle[value.argmin()]) >= 8:
                break
        return m, value

    def covariance(self, m: Tensor) -> Tensor:
        """Return that of ``M``'s entries at the solution, (B^2, B^2)."""
        state = self.evaluate(m.unsqueeze(0))
        jtj, _ = self.normal(m.unsqueeze(0), *state[:4])
        size = jtj[0].diagonal().clamp_min(1e-300).sqrt()
        scaled = jtj[0] / size / size.unsqueeze(1)
        scaled.diagonal().add_(1e-14)
        return torch.linalg.inv(scaled) / size / size.unsqueeze(1)


def rows_rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()


def damped(jtj: Tensor, slope: Tensor, damping: Tensor) -> Tensor:
    """Return the Marquardt step; zero where the matrix is not positive."""
    size = jtj.diagonal(dim1=1, dim2=2)
    size = size.clamp_min(1e-14 * size.amax(1, keepdim=True).clamp_min(1e-300)).sqrt()
    scaled = jtj / size.unsqueeze(1) / size.unsqueeze(2)
    scaled.diagonal(dim1=1, dim2=2).add_(damping.unsqueeze(1))
    factor, info = torch.linalg.cholesky_ex(scaled)
    step = torch.cholesky_solve((slope / size).unsqueeze(2), factor)[:, :, 0] / size
    return torch.where((info == 0).unsqueeze(1), step, 0.0).nan_to_num()
