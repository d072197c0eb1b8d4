"""A time limit that loops consult; the clock is the test's own, so nothing here hangs on time."""

import math

import pytest
import torch

from fedleak import deadline, events
from fedleak.errors import InvalidInputError, TimeLimitError
from fedleak.solvers import cgls, lbfgs


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told, or that goes one second on each look."""

    class Clock:
        now, tick = 0.0, 0.0

        def __call__(self):
            self.now += self.tick
            return self.now

    own = Clock()
    monkeypatch.setattr(deadline, "_now", own)
    return own


def test_without_a_limit_nothing_ends():
    assert deadline.left() == math.inf
    assert not deadline.passed()
    deadline.check()


@pytest.mark.parametrize("none", [0, math.inf])
def test_no_seconds_are_no_limit(none, clock):
    with deadline.limit(none) as allowed:
        clock.now = 1e9
        assert not deadline.passed()
    assert not allowed.hit


def test_the_limit_ends_what_asks(clock):
    with deadline.limit(60) as allowed:
        clock.now = 59.0
        deadline.check()
        assert (deadline.left(), allowed.hit) == (1.0, False)
        clock.now = 60.0
        with pytest.raises(TimeLimitError, match="60 s"):
            deadline.check()
        assert allowed.hit
    assert deadline.left() == math.inf


def test_the_earlier_of_two_limits_counts(clock):
    with deadline.limit(10) as outer:
        with deadline.limit(100) as inner:
            clock.now = 10.0
            assert deadline.passed()
        assert inner.hit
        assert outer.hit
    clock.now = 0.0
    with deadline.limit(100) as outer:
        with deadline.limit(10) as inner:
            clock.now = 10.0
            assert deadline.passed()
        assert inner.hit
        assert not outer.hit
        assert deadline.left() == 90.0


def test_one_after_the_other_gets_its_part(clock):
    with deadline.limit(30) as whole:
        for n in range(3):
            with deadline.part(1 / (3 - n)) as own:
                assert deadline.left() == 10.0
                clock.now += 10.0
                assert deadline.passed()
            assert own.hit
    assert whole.hit


def test_nothing_left_has_no_part(clock):
    with deadline.limit(30):
        clock.now = 31.0
        with deadline.part(0.5):
            assert deadline.passed()


@pytest.mark.parametrize("bad", [-1, math.nan, "60", True, None])
def test_what_is_no_limit_is_refused(bad):
    with pytest.raises(InvalidInputError, match="time limit"), deadline.limit(bad):
        pass


def test_steps_end_early(clock):
    clock.tick = 1.0
    with deadline.limit(5.5) as allowed:
        done = list(events.steps(100, "counting"))
    assert done == [0, 1, 2, 3, 4]
    assert allowed.hit


def _quadratic(x):
    return x.square().sum(1), 2 * x


def test_lbfgs_returns_the_best_so_far(clock):
    start = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 100.0], dtype=torch.float64)

    def objective(x):
        return (weights * x.square()).sum(1), 2 * weights * x

    clock.tick = 1.0
    with deadline.limit(4.5):
        _, cut = lbfgs(objective, start, 100)
    clock.tick = 0.0
    _, full = lbfgs(objective, start, 100)
    assert full < 1e-6 < cut < objective(start)[0]


def test_least_squares_returns_the_best_so_far(clock):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 30, 20, generator=generator, dtype=torch.float64)
    v = torch.randn(1, 30, generator=generator, dtype=torch.float64)

    def solve():
        return cgls(
            lambda x: ((a @ x.unsqueeze(2))[:, :, 0],),
            lambda r: (a.mT @ r[0].unsqueeze(2))[:, :, 0],
            (v,), torch.zeros(1, 20, dtype=torch.float64),
        )  # fmt: skip

    _, full = solve()
    clock.tick = 1.0
    with deadline.limit(1.5):
        _, cut = solve()
    assert full < cut < 1
