"""Dense linear measurements and Gauss-Newton, against closed forms and scipy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from fedleak.priors import GaussianPrior
from fedleak.solvers import Gaussian, GaussNewton, KroneckerGaussian, Measurements, jacobian
from fedleak.solvers.gaussian import Rows, cholesky


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _covariance(n: int, seed: int) -> Tensor:
    root = _random(n, n, seed=seed)
    return root @ root.T / n + 0.1 * torch.eye(n, dtype=torch.float64)


def _gaussian(n: int, seed: int = 0) -> Gaussian:
    return Gaussian(_random(n, seed=seed + 50), _covariance(n, seed))


def _deviation(count: int, m: int) -> Tensor:
    return 0.05 + 0.2 * _random(count, m, seed=7).abs()


SIZES = [(3, 6), (6, 6), (9, 6)]  # the first two by the dual form, the last by the primal one


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 3), st.integers(0, 1000), st.booleans())
@settings(max_examples=30, deadline=None)
def test_posterior_is_the_closed_form(m: int, n: int, count: int, seed: int, even: bool) -> None:
    """``(J^T D^-2 J + S^-1)^-1``, whatever the numbers of rows and unknowns."""
    rows, prior = _random(count, m, n, seed=seed), _gaussian(n, seed)
    deviation = torch.full((count, m), 0.1, dtype=torch.float64) if even else _deviation(count, m)
    target = _random(count, m, seed=seed + 1)
    measured = Measurements(Rows(rows), deviation, prior)
    assert measured.dual == (m <= n)
    mean, covariance = measured.posterior_mean(target), measured.covariance()
    for i in range(count):
        weighted = rows[i].T / deviation[i].square()
        inverse = torch.linalg.inv(prior.covariance)
        expected = torch.linalg.inv(weighted @ rows[i] + inverse)
        at = expected @ (weighted @ target[i] + inverse @ prior.mean)
        torch.testing.assert_close(covariance[i], expected, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(mean[i], at, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_each_update_may_have_its_own_prior(m: int, n: int) -> None:
    rows, deviation, target = _random(2, m, n), _deviation(2, m), _random(2, m, seed=1)
    priors = [_gaussian(n, 1), _gaussian(n, 2)]
    together = Measurements(Rows(rows), deviation, Gaussian.stack(priors))
    for i, prior in enumerate(priors):
        alone = Measurements(Rows(rows[i : i + 1]), deviation[i : i + 1], prior)
        one = slice(i, i + 1)
        torch.testing.assert_close(
            together.posterior_mean(target)[one], alone.posterior_mean(target[one])
        )
        torch.testing.assert_close(together.covariance()[one], alone.covariance())
        torch.testing.assert_close(
            together.log_evidence(target)[one], alone.log_evidence(target[one])
        )
    assert Gaussian.stack([priors[0]] * 3) is priors[0]


def _profiled(rows: Tensor, deviation: Tensor, prior: Gaussian, target: Tensor) -> Tensor:
    """Return the log density of the target, at the scale that makes it greatest."""
    covariance = rows @ prior.covariance @ rows.T + deviation.square().diag()
    rest = target - rows @ prior.mean
    scale = rest @ torch.linalg.solve(covariance, rest) / len(rest)
    normal = torch.distributions.MultivariateNormal(torch.zeros_like(rest), scale * covariance)
    return normal.log_prob(rest)


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_evidence_is_the_density_of_the_target(m: int, n: int) -> None:
    """Up to what no prior changes; the scale that it takes is indeed the best."""
    rows, deviation, target = _random(2, m, n), _deviation(2, m), _random(2, m, seed=1)
    priors = [_gaussian(n, seed) for seed in range(3)]
    shared = Rows(rows)
    ours = torch.stack([Measurements(shared, deviation, p).log_evidence(target) for p in priors])
    expected = torch.stack(
        [
            torch.stack([_profiled(rows[i], deviation[i], p, target[i]) for i in range(2)])
            for p in priors
        ]
    )
    torch.testing.assert_close(ours - ours[0], expected - expected[0], atol=1e-8, rtol=1e-8)
    # The profiled scale: no other one gives a greater density.
    prior = priors[0]
    covariance = rows[0] @ prior.covariance @ rows[0].T + deviation[0].square().diag()
    rest = target[0] - rows[0] @ prior.mean
    for scale in (0.1, 0.5, 1.0, 2.0, 10.0):
        normal = torch.distributions.MultivariateNormal(torch.zeros_like(rest), scale * covariance)
        assert float(normal.log_prob(rest)) <= float(expected[0, 0]) + 1e-9


def test_evidence_is_the_same_by_both_forms() -> None:
    """The same rows in the dual and in the primal form, forced by hand; duplicates too."""
    base = _random(1, 3, 6)
    rows = torch.cat([base, base], 1)  # six rows of rank three
    deviation, target = _deviation(1, 6), _random(1, 6, seed=1)
    priors = [_gaussian(6, seed) for seed in range(2)]
    for system in (rows, _random(1, 6, 6, seed=5)):
        dual = [Measurements(Rows(system), deviation, p) for p in priors]
        assert all(d.dual for d in dual)
        # A seventh unknown-free row is no information: it makes the system primal.
        more = torch.cat([system, torch.zeros(1, 1, 6, dtype=torch.float64)], 1)
        wide = torch.cat([deviation, torch.ones(1, 1, dtype=torch.float64)], 1)
        also = torch.cat([target, torch.zeros(1, 1, dtype=torch.float64)], 1)
        primal = [Measurements(Rows(more), wide, p) for p in priors]
        assert not any(p.dual for p in primal)
        for d, p in zip(dual, primal, strict=True):
            torch.testing.assert_close(d.posterior_mean(target), p.posterior_mean(also))
            torch.testing.assert_close(d.covariance(), p.covariance(), atol=1e-9, rtol=1e-6)
            # One more row only adds to the count that the profiled scale is taken over.
            constant = 2 * d._factor.diagonal(dim1=1, dim2=2).log().sum()
            square = 6 * torch.exp((-2 * d.log_evidence(target) - constant) / 6)
            expected = -0.5 * (7 * (square / 7).log() + constant)
            torch.testing.assert_close(p.log_evidence(also), expected, atol=1e-7, rtol=1e-8)


def test_evidence_finds_the_prior_that_drew_the_truth() -> None:
    """Colour, whatever the contrast of the image: the scale is profiled out."""
    priors = [GaussianPrior((3, 5, 5), colour=c) for c in (0.0, 0.7, 0.98)]
    rows = _random(3, 60, 75)
    drawn = [p.root(_random(1, *p.latent_shape, seed=3)).reshape(75) for p in priors]
    centre = priors[0].dense().mean
    for scale in (0.3, 1.0, 3.0):
        x = torch.stack([centre + scale * d for d in drawn])
        solver = GaussNewton(
            lambda z, x=x: (rows @ (z - x)[:, :, None])[:, :, 0], centre.expand(3, -1)
        )
        deviation = torch.full((3, 60), 1e-3, dtype=torch.float64)
        assert solver.choose([p.dense() for p in priors], deviation).tolist() == [0, 1, 2]


def _kronecker(colour: Tensor, space: Gaussian) -> KroneckerGaussian:
    mean = _random(len(colour) * len(space.mean), seed=4)
    return KroneckerGaussian(mean, colour, space)


@pytest.mark.parametrize("m", [5, 12])
def test_kronecker_grams_are_the_dense_ones(m: int) -> None:
    """For priors that share ``space``, for others, and for colours that do not commute."""
    space, other = _gaussian(4, 1), _gaussian(4, 2)
    eye, ones = torch.eye(3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)
    colours = [eye + ones, eye + 0.3 * ones, _covariance(3, 8), _covariance(3, 9), eye]
    rows = Rows(_random(2, m, 12))
    for space_ in (space, other, space):
        for colour in colours:
            prior = _kronecker(colour, space_)
            dense = rows.jacobian @ torch.kron(colour, space_.covariance) @ rows.jacobian.mT
            torch.testing.assert_close(rows.gram(prior), dense, atol=1e-9, rtol=1e-9)
            matrix = Gaussian(prior.mean, prior.covariance)
            torch.testing.assert_close(rows.gram(matrix), dense, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(prior.times(rows.jacobian), matrix.times(rows.jacobian))
            torch.testing.assert_close(prior.precision, matrix.precision, atol=1e-8, rtol=1e-7)
            torch.testing.assert_close(prior.log_det, matrix.log_det)
            x = _random(2, 12, seed=6)
            torch.testing.assert_close(prior.energy(x), matrix.energy(x))


def test_a_family_of_colours_shares_its_products() -> None:
    """The spatial products, which cost most, are made once for all colours."""
    family = GaussianPrior((3, 4, 4)).family(0)
    spaces = {id(p.dense().space) for p in family if isinstance(p.dense(), KroneckerGaussian)}
    assert len(family) == 3
    assert len(spaces) == 1


@pytest.mark.parametrize("even", [True, False])
def test_normal_matrices(even: bool) -> None:
    """``J^T W J`` again and again: what is kept from before is not what was asked then."""
    rows = Rows(_random(2, 7, 4))
    for level in (1.0, 4.0, 0.5):
        weights = torch.full((2, 7), level, dtype=torch.float64)
        weights[1] *= 3.0
        if not even:
            weights[:, 2] = 9.0
        expected = rows.jacobian.mT @ torch.diag_embed(weights) @ rows.jacobian
        torch.testing.assert_close(rows.normal(weights), expected)


def test_cholesky_lifts_only_what_rounding_left_negative() -> None:
    """A singular matrix beside a good one: the good one's factor is its own."""
    good = _covariance(4, 1)
    flat = torch.ones(4, 4, dtype=torch.float64)
    flat[0, 0] -= 1e-15
    together = cholesky(torch.stack([good, flat]))
    assert torch.equal(together[0], torch.linalg.cholesky(good))
    torch.testing.assert_close(together[1] @ together[1].T, flat, atol=1e-5, rtol=0)
    assert bool(together.isfinite().all())


@pytest.mark.parametrize(("m", "n"), [(3, 5), (5, 5), (7, 5), (70, 140), (140, 70)])
@pytest.mark.parametrize("count", [1, 3])
def test_jacobian_is_that_of_autograd(m: int, n: int, count: int) -> None:
    """By rows and by columns, in one piece or more, each update its own."""
    weight = _random(m, n) / n**0.5
    offset = _random(count, m, seed=1)

    def residual(x: Tensor) -> Tensor:
        return (x @ weight.T + 0.1 * x.square().sum(1, keepdim=True) + offset).tanh()

    x = 0.5 * _random(count, n, seed=2)
    found = jacobian(residual, x)
    assert found.shape == (count, m, n)
    full = torch.func.jacrev(residual)(x)  # (count, m, count, n)
    for i in range(count):
        torch.testing.assert_close(found[i], full[i, :, i])


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_a_linear_problem_takes_one_step(m: int, n: int) -> None:
    rows, prior, deviation = _random(2, m, n), _gaussian(n), _deviation(2, m)
    target = _random(2, m, seed=1)
    solver = GaussNewton(lambda x: (rows @ x[:, :, None])[:, :, 0] - target, _random(2, n, seed=9))
    solver.descend(prior, deviation, steps=1)
    expected = Measurements(Rows(rows), deviation, prior).posterior_mean(target)
    torch.testing.assert_close(solver.x, expected, atol=1e-8, rtol=1e-8)


class _Curved:
    """A mildly nonlinear problem for three updates."""

    def __init__(self, m: int, n: int, count: int = 3):
        self.weight, self.count = _random(m, n, seed=11) / n**0.5, count
        self.prior = Gaussian(torch.zeros(n, dtype=torch.float64), _covariance(n, 12))
        truth = 0.7 * _random(count, n, seed=13)
        self.values = self.made(truth) + 0.05 * _random(count, m, seed=14)
        self.deviation = torch.full((count, m), 0.1, dtype=torch.float64)
        self.start = torch.zeros(count, n, dtype=torch.float64)

    def made(self, x: Tensor) -> Tensor:
        z = x @ self.weight.T
        return z.tanh() + 0.1 * z.square()

    def solver(self, rows: slice = slice(None)) -> GaussNewton:
        return GaussNewton(lambda x: self.made(x) - self.values[rows], self.start[rows])

    def objective(self, x: Tensor) -> Tensor:
        data = ((self.made(x) - self.values) / self.deviation).square().sum(1)
        return data + self.prior.energy(x)


@pytest.mark.parametrize(("m", "n"), [(4, 7), (12, 5)])
def test_a_nonlinear_problem_comes_to_the_maximum(m: int, n: int) -> None:
    """Where scipy's BFGS ends, and never uphill on the way."""
    problem = _Curved(m, n)
    solver = problem.solver()
    before = problem.objective(solver.x)
    for _ in range(15):
        solver.descend(problem.prior, problem.deviation)
        after = problem.objective(solver.x)
        assert bool((after <= before).all())
        before = after
        solver.linearise()
    for i in range(problem.count):

        def value(u: object, i: int = i) -> float:
            x = problem.start.clone()
            x[i] = torch.as_tensor(u)
            return float(problem.objective(x)[i])

        best = minimize(value, problem.start[i].numpy(), method="BFGS", options={"gtol": 1e-6})
        assert float(before[i]) == pytest.approx(best.fun, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(solver.x[i], torch.as_tensor(best.x), atol=5e-3, rtol=0)


def test_together_as_alone() -> None:
    problem = _Curved(4, 7)
    together = problem.solver()
    for _ in range(3):
        together.descend(problem.prior, problem.deviation)
        together.linearise()
    for i in range(problem.count):
        one = slice(i, i + 1)
        alone = problem.solver(one)
        for _ in range(3):
            alone.descend(problem.prior, problem.deviation[one])
            alone.linearise()
        torch.testing.assert_close(together.x[one], alone.x, atol=1e-9, rtol=0)


def test_never_uphill_even_where_it_overflows() -> None:
    """A residual that is infinite or NaN beside the start, and one whose step overshoots."""
    start = torch.tensor([[0.5], [3.0]], dtype=torch.float64)

    def residual(x: Tensor) -> Tensor:
        walled = torch.where(x.abs() > 4, torch.nan, x.atan() * 5)
        return torch.cat([walled, 0 * x], 1)

    wide = Gaussian(torch.zeros(1, dtype=torch.float64), torch.full((1, 1), 1e6).double())
    deviation = torch.ones(2, 2, dtype=torch.float64)
    solver = GaussNewton(residual, start)

    def objective(x: Tensor) -> Tensor:
        return residual(x).square().sum(1) + wide.energy(x)

    before = objective(start)
    for _ in range(4):
        solver.descend(wide, deviation)
        after = objective(solver.x)
        assert bool((after <= before).all())
        before = after
        solver.linearise()
    assert bool(solver.x.isfinite().all())
    assert float(before.max()) < 1e-3


def test_a_kronecker_gaussian_is_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(3)

    def positive(n: int) -> Tensor:
        root = torch.randn(n, n, generator=generator, dtype=torch.float64)
        return root @ root.T + torch.eye(n, dtype=torch.float64)

    colour, space = positive(3), positive(5)
    mean = torch.randn(15, generator=generator, dtype=torch.float64)
    product = KroneckerGaussian(mean, colour, Gaussian(mean[:5], space))
    dense = Gaussian(mean, torch.kron(colour, space))
    x = torch.randn(4, 15, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(product.energy(x), dense.energy(x))
    torch.testing.assert_close(product.precision, dense.precision)
    torch.testing.assert_close(product.log_det, dense.log_det)
    torch.testing.assert_close(product.factor @ product.factor.T, dense.covariance)
    torch.testing.assert_close(product.times(x.unsqueeze(0)), dense.times(x.unsqueeze(0)))


def test_evidence_is_weighed_on_the_rows_in_focus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is that of a solver which has these rows alone, for each update its own."""
    monkeypatch.setattr("fedleak.solvers.gauss_newton.EVIDENCE_ROWS", 5)
    rows, start = _random(2, 12, 20), torch.zeros(2, 20, dtype=torch.float64)
    focus = torch.linspace(0, 1, 20, dtype=torch.float64)
    in_focus = torch.stack([torch.randperm(12)[:5] for _ in range(2)])
    rows[:, :, 10:] *= 1e-3
    for i in range(2):
        rows[i, in_focus[i]] = rows[i, in_focus[i]].flip(1)
    target, deviation = _random(2, 12, seed=1), _deviation(2, 12)
    priors = [_gaussian(20, seed) for seed in range(6)]

    def solver(a: Tensor, b: Tensor) -> GaussNewton:
        return GaussNewton(lambda x: (a @ x.unsqueeze(2))[:, :, 0] - b, start)

    found = solver(rows, target).choose(priors, deviation, focus)
    part = rows.take_along_dim(in_focus.unsqueeze(2), 1), target.gather(1, in_focus)
    expected = solver(*part).choose(priors, deviation.gather(1, in_focus))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("m", [300, 601])
def test_products_of_many_rows(m: int) -> None:
    """By halves, and with mostly zero rows, the products are the plain ones."""
    rows = _random(2, m, 12) * (_random(2, m, 12, seed=1) > 1.8)
    prior = _kronecker(_covariance(3, 8), _gaussian(4, 1))
    dense = rows @ prior.covariance @ rows.mT
    torch.testing.assert_close(Rows(rows).gram(prior), dense, atol=1e-9, rtol=1e-9)
    plain = Gaussian(prior.mean, prior.covariance)
    torch.testing.assert_close(Rows(rows).gram(plain), dense, atol=1e-9, rtol=1e-9)
    weights = torch.ones(2, 12, dtype=torch.float64)
    torch.testing.assert_close(Rows(rows.mT).normal(weights), rows @ rows.mT)
