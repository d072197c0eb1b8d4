"""Solvers against dense linear algebra and known minima."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedleak.solvers import cgls, lbfgs


@given(st.integers(0, 10_000), st.integers(3, 12), st.integers(2, 12), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_cgls_is_least_norm_least_squares(seed: int, rows: int, columns: int, batch: int) -> None:
    """Also rank deficient: the solution is the pseudo-inverse's, for each of the batch."""
    g = torch.Generator().manual_seed(seed)
    rank = max(1, min(rows, columns) - 1)
    u = torch.randn(batch, rows, rank, generator=g, dtype=torch.float64) @ torch.randn(
        batch, rank, columns, generator=g, dtype=torch.float64
    )
    v = torch.randn(batch, rows, generator=g, dtype=torch.float64)
    x, residual = cgls(
        lambda x: ((u @ x[..., None])[..., 0],),
        lambda r: (u.mT @ r[0][..., None])[..., 0],
        (v,),
        torch.zeros(batch, columns, dtype=torch.float64),
    )
    expected = (torch.linalg.pinv(u, rtol=1e-10) @ v[..., None])[..., 0]
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)
    miss = ((u @ x[..., None])[..., 0] - v).norm(dim=1) / v.norm(dim=1)
    torch.testing.assert_close(residual, miss)


def _rosenbrock(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    f = (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)
    (g,) = torch.autograd.grad(f.sum(), x)
    return f.detach(), g


def test_lbfgs_finds_the_minimum_of_each() -> None:
    start = torch.tensor([[-1.2, 1.0, 0.5], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    x, f = lbfgs(_rosenbrock, start, steps=400)
    torch.testing.assert_close(x, torch.ones_like(x), atol=1e-4, rtol=0)
    assert bool((f < 1e-8).all())


def test_lbfgs_solves_each_as_if_alone() -> None:
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together, _ = lbfgs(_rosenbrock, start, steps=400)
    for n in range(3):
        alone, _ = lbfgs(_rosenbrock, start[n : n + 1], steps=400)
        torch.testing.assert_close(together[n], alone[0], atol=1e-4, rtol=0)


def test_lbfgs_never_ends_above_its_start() -> None:
    """Not even where the function is infinite beside the start."""

    def walled(x: Tensor) -> tuple[Tensor, Tensor]:
        f, g = _rosenbrock(x)
        return torch.where(x.abs().amax(1) > 1.5, torch.inf, f), g

    start = torch.tensor([[-1.4, 1.4], [1.4, -1.4]], dtype=torch.float64)
    before, _ = walled(start)
    _, after = lbfgs(walled, start, steps=100)
    assert bool((after <= before).all())
    assert bool(after.isfinite().all())


def test_lbfgs_leaves_early_only_below_the_value_that_is_near() -> None:
    scales = torch.logspace(0, 4, 30, dtype=torch.float64)
    evaluations = []

    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        evaluations.append(1)
        return (scales * x.square()).sum(1) / 2 + 0.5, scales * x

    start = torch.ones(1, 30, dtype=torch.float64)
    _, patient = lbfgs(objective, start, 400)
    many = len(evaluations)
    _, early = lbfgs(objective, start, 400, near=1.0)
    assert len(evaluations) - many < many
    assert float(patient) < float(early) < 1.0
