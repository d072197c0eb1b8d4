"""Maximum a posteriori by Gauss-Newton with dense algebra, batched over updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fedleak import deadline
from fedleak.solvers.gaussian import Gaussian, Measurements, Rows

#: Rows or columns of the Jacobian that are computed together.
_TOGETHER = 32
#: Rows that evidence is weighed on, at most: weighing all of them costs more than the rest.
EVIDENCE_ROWS = 800

Residual = Callable[[Tensor], Tensor]


def jacobian(residual: Residual, x: Tensor) -> Tensor:
    """Return the Jacobian of every update's residual at once.

    Parameters
    ----------
    residual : callable
        ``(N, n) -> (N, m)``; row ``i`` of the result depends on row ``i`` alone.
    x : Tensor, shape (N, n)

    Returns
    -------
    Tensor, shape (N, m, n)
        By columns (forward mode) where there are fewer of them, else by rows.

    Raises
    ------
    TimeLimitError
        If the time allowed passes meanwhile.
    """
    count, n = x.shape
    value, pull = vjp(residual, x)  # type: ignore[misc]
    m = value.shape[1]
    out = x.new_empty(count, m, n)

    def unit(i: Tensor, size: int) -> Tensor:
        return torch.nn.functional.one_hot(i, size).to(x).unsqueeze(0).expand(count, -1)

    if m <= n:

        def row(i: Tensor) -> Tensor:
            return pull(unit(i, m))[0]

        for rows in torch.arange(m, device=x.device).split(_TOGETHER):
            deadline.check()
            out[:, rows] = vmap(row)(rows).transpose(0, 1)
        return out

    def column(i: Tensor) -> Tensor:
        return jvp(residual, (x,), (unit(i, n).clone(),))[1]

    for columns in torch.arange(n, device=x.device).split(_TOGETHER):
        deadline.check()
        out[:, :, columns] = vmap(column)(columns).permute(1, 2, 0)
    return out


class GaussNewton:
    """Minimise ``||residual(x) / deviation||^2 + prior.energy(x)`` for each update.

    Parameters
    ----------
    residual : callable
        ``(N, n) -> (N, m)``, zero at the truth.
    start : Tensor, shape (N, n)
    constant : Tensor, shape (N, m, n), optional
        The Jacobian, where it is the same everywhere and known.

    Attributes
    ----------
    x : Tensor, shape (N, n)
        The best point so far.
    """

    def __init__(self, residual: Residual, start: Tensor, constant: Tensor | None = None):
        self.residual, self.x = residual, start.contiguous()  # an expanded one has no tangents
        self._constant = constant
        self.linearise()

    def linearise(self) -> None:
        """Take the Jacobian where we are."""
        known = self._constant
        self._rows = Rows(jacobian(self.residual, self.x) if known is None else known)
        self._focused: tuple[Tensor, Rows] | None = None

    def _target(self) -> Tensor:
        """Return what the linearised rows should give."""
        return (self._rows.jacobian @ self.x.unsqueeze(2))[:, :, 0] - self.residual(self.x)

    def choose(
        self,
        priors: Sequence[Gaussian],
        deviation: Tensor,
        focus: Tensor | None = None,
        known: dict[Gaussian, Tensor] | None = None,
    ) -> Tensor:
        """Return the index of the prior with the greatest evidence, for each update.

        Parameters
        ----------
        priors : sequence of Gaussian
        deviation : Tensor, shape (N, m)
        focus : Tensor, shape (n,), optional
            Where there are many rows, but no more than unknowns, evidence is weighed on those
            that depend most on the unknowns of the greatest focus. Rows that overlap tell
            smoothness; as many rows drawn at random lie apart, and do not. Where there are
            more rows than unknowns, only all of them tell the finest detail.
        known : dict, optional
            Evidence of priors that were weighed before, at the same point and with the same
            deviation; what is weighed now is added.
        """
        known = {} if known is None else known
        rows, target, deviation = self._weighed(deviation, focus)
        for prior in priors:
            if prior not in known:
                known[prior] = Measurements(rows, deviation, prior).log_evidence(target)
        found = [known[prior] for prior in priors]
        return torch.stack(found).nan_to_num(-torch.inf).argmax(0)

    def _weighed(self, deviation: Tensor, focus: Tensor | None) -> tuple[Rows, Tensor, Tensor]:
        """Return the rows that evidence is weighed on, their target and deviation."""
        target = self._target()
        m, n = self._rows.jacobian.shape[1:]
        if focus is None or not EVIDENCE_ROWS < m <= n:
            rows = self._rows
        else:
            if self._focused is None:
                squares = self._rows.jacobian.square()
                share = (squares @ focus) / squares.sum(2).clamp_min(1e-300)
                share = share.masked_fill(deviation.isinf(), -1.0)
                index = share.topk(EVIDENCE_ROWS, 1).indices
                part = self._rows.jacobian.take_along_dim(index.unsqueeze(2), 1)
                self._focused = index, Rows(part)
            index, rows = self._focused
            target, deviation = target.gather(1, index), deviation.gather(1, index)
        return rows, target, deviation

    def descend(self, prior: Gaussian, deviation: Tensor, steps: int = 6) -> Measurements:
        """Step to the posterior mean, and on with the same Jacobian while that pays.

        The Jacobian costs far more than a residual, so it is kept (the chord method) as
        long as each step still takes a good part off the objective.
        """
        measured = Measurements(self._rows, deviation, prior)
        best = self._objective(self.x, prior, deviation)
        going = torch.ones_like(best, dtype=torch.bool)
        for _ in range(steps):
            step = measured.posterior_mean(self._target()) - self.x
            going &= self._line_search(step, prior, deviation, best, going)
            value = self._objective(self.x, prior, deviation)
            going &= value < best * (1 - 1e-2)
            best = value
            if not bool(going.any()) or deadline.passed():
                break
        return measured

    def _line_search(
        self, step: Tensor, prior: Gaussian, deviation: Tensor, best: Tensor, going: Tensor
    ) -> Tensor:
        """Take the first of ever shorter steps that goes down; say which updates took one."""
        length = torch.ones_like(best)
        done = ~going
        for _ in range(8):
            trial = self.x + length.unsqueeze(1) * step
            down = ~done & (self._objective(trial, prior, deviation) < best)
            self.x = torch.where(down.unsqueeze(1), trial, self.x)
            done = done | down
            if bool(done.all()):
                break
            length = torch.where(down, length, length / 2)
        return done & going

    def _objective(self, x: Tensor, prior: Gaussian, deviation: Tensor) -> Tensor:
        data = (self.residual(x) / deviation).square().sum(1)
        return (data + prior.energy(x)).nan_to_num(torch.inf)
