"""Attacks within limits, in the round or beside it; the training is the same in any case."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fedleak import deadline, events, memory
from fedleak.attacks import Attack, LinearAttack, Reconstruction, run_attack
from fedleak.errors import InvalidInputError, UnknownNameError
from fedleak.observation import Observation
from simulations.server_app import make_strategy
from simulations.task import make_model
from strategies import Leak
from strategies.leak import log_leak
from strategies.work import Limits, _Narrator
from tests.strategies.test_malicious_server import attacker, same, scenario, train


@dataclass(frozen=True)
class Endless(Attack):
    """Searches for ever if it is let; what it has then explains as much as it is told to."""

    fit: float = 0.3
    fatal: bool = False

    def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        for _ in events.steps(10**12, "searching"):
            if self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        images = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
        return [Reconstruction(images, torch.tensor([7]), self.fit) for _ in observations]


def leaks_of(described: Any, **options: Any) -> tuple[list[Leak], Any]:
    leaks: list[Leak] = []
    strategy = attacker(described, make_strategy(described), on_leak=leaks.append, **options)
    return leaks, train(described, strategy)


def test_at_the_limit_the_best_so_far_is_told_and_the_training_goes_on() -> None:
    described = scenario()
    leaks, result = leaks_of(described, attack=Endless(), seconds=0.02)
    assert same(result, train(described, make_strategy(described)))
    assert len(leaks) == 9
    assert all("time: stopped at the limit of" in leak.reason for leak in leaks)
    assert {leak.status for leak in leaks} == {"doubtful"}


def test_what_explains_nothing_at_the_limit_has_failed_but_the_labels_are_told() -> None:
    leaks, _ = leaks_of(scenario(), attack=Endless(fit=1.2), seconds=0.02)
    assert {leak.status for leak in leaks} == {"failed"}
    assert all(leak.reason.startswith("time:") for leak in leaks)
    assert all("labels 7" in leak.reason for leak in leaks)


def test_a_round_has_a_limit_of_its_own() -> None:
    described = scenario()
    leaks, _ = leaks_of(described, attack=Endless(), seconds=0, round_seconds=0.02)
    assert len(leaks) == 9
    assert all("time" in leak.reason for leak in leaks)


@pytest.mark.parametrize(
    "bad",
    [{"seconds": -1}, {"seconds": "60"}, {"round_seconds": float("nan")}, {"memory_gib": True},
     {"seconds": float("inf")}],
)  # fmt: skip
def test_limits_are_checked_at_construction(bad: dict[str, Any]) -> None:
    described = scenario()
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        attacker(described, make_strategy(described), **bad)


def test_the_default_limits_are_those_of_the_documentation() -> None:
    assert (Limits().seconds, Limits().round_seconds) == (60.0, 600.0)


def test_one_that_takes_all_the_time_leaves_the_others_theirs() -> None:
    """Tried alone after they failed together, each has a part of what is left."""

    class Together(Endless):
        def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
            if len(observations) > 1:
                raise RuntimeError("not together")
            return super().reconstruct(observations)

    described = scenario()
    model = make_model(described)
    update = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    seen = [Observation.from_gradient(model, update, (1, 8, 8)) for _ in range(3)]
    outcomes = run_attack(Together(), seen, 0.02)
    assert [o.reconstruction is not None for o in outcomes] == [True] * 3
    assert all("time" in o.reason for o in outcomes)


def test_too_much_memory_is_a_failure_of_its_own() -> None:
    if memory.free() == float("inf"):
        pytest.skip("nobody says here what is free")

    class Hungry(Endless):
        def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
            torch.ones(2**30, dtype=torch.float64)
            return super().reconstruct(observations)

    described = scenario()
    model = make_model(described)
    update = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    (outcome,) = run_attack(Hungry(), [Observation.from_gradient(model, update, (1, 8, 8))],
                            0.02, memory_gib=0.25)  # fmt: skip
    assert outcome.reason.startswith("memory: ")
    assert torch.ones(2**26).sum() == 2**26  # the limit ends with the attack


def test_many_small_things_end_at_the_memory_limit_and_not_in_the_interpreter() -> None:
    """Loops ask before the system refuses a few bytes, which torch does not always survive."""
    if memory._used()[0] == 0:
        pytest.skip("nobody says here what is in use")

    class Creeping(Endless):
        def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
            held = []
            for _ in events.steps(1000, "creeping"):
                held.append(torch.ones(2**20))
            raise AssertionError("4 GB were taken")

    described = scenario()
    model = make_model(described)
    update = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    seen = [Observation.from_gradient(model, update, (1, 8, 8))]
    (outcome,) = run_attack(Creeping(), seen, 0, memory_gib=0.05)
    assert outcome.reason == (
        "memory: the attack takes more than is allowed or free (more than the 0.05 GiB allowed)"
    )


def test_what_lacks_memory_is_found_below_the_sentence_about_it() -> None:
    error = ValueError("the model cannot take images")
    error.__cause__ = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert memory.exhausted(error)
    assert not memory.exhausted(ValueError("the memory of an allocator"))


def test_in_the_background_comes_the_same_as_in_the_round() -> None:
    described = scenario()
    waited, _ = leaks_of(described)
    leaks, result = leaks_of(described, attack_in="background")
    assert same(result, train(described, make_strategy(described)))
    assert [(x.server_round, x.nodes, x.status) for x in leaks] == [
        (x.server_round, x.nodes, x.status) for x in waited
    ]
    for one, other in zip(leaks, waited, strict=True):
        assert one.reconstruction is not None
        assert other.reconstruction is not None
        assert torch.equal(one.reconstruction.images, other.reconstruction.images)


@pytest.mark.slow
def test_in_the_background_a_process_that_dies_costs_what_it_had() -> None:
    described = scenario()
    leaks, result = leaks_of(described, attack=Endless(fatal=True), attack_in="background")
    assert same(result, train(described, make_strategy(described)))
    assert len(leaks) == 9
    assert all("SIGKILL" in leak.reason for leak in leaks)


def test_in_the_background_what_waits_too_long_has_failed() -> None:
    described = scenario()
    leaks, _ = leaks_of(
        described, attack=Endless(), attack_in="background", seconds=0, round_seconds=1e-3
    )
    assert len(leaks) == 9
    assert all("time" in leak.reason for leak in leaks)


def test_the_background_refuses_at_construction_what_it_cannot_do() -> None:
    class Local(Endless):
        pass

    described = scenario()
    with pytest.raises(InvalidInputError, match="another process"):
        attacker(described, make_strategy(described), attack=Local(), attack_in="background")
    with pytest.raises(UnknownNameError, match="did you mean 'background'"):
        attacker(described, make_strategy(described), attack_in="backgroud")


def test_a_long_search_tells_labels_first_then_how_long_it_takes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="flwr"), deadline.limit(60):
        tell = _Narrator(3, [(11,), (12,)])
        tell("labels", {"labels": [[4, 5], [6, 6]]})
        assert not caplog.messages  # most attacks are over before it is worth a line
        tell("step", {"doing": "matching", "done": 1, "total": 1000})
    assert caplog.messages[:2] == [
        "round 3, nodes (11,): labels [4, 5]; images are looked for",
        "round 3, nodes (12,): labels [6, 6]; images are looked for",
    ]
    assert "matching, step 1 of 1000: 17 min to go, but it ends in" in caplog.messages[2]


@pytest.mark.parametrize(
    ("fit", "words", "not_said"),
    [
        (1e-7, "reconstructed images of classes [3]", "guess"),
        (0.3, "rough guess", "reconstructed"),
        (0.7, "no images", "reconstructed"),
        (float("nan"), "no images", "reconstructed"),
    ],
)
def test_the_log_says_no_more_than_the_fit_bears_out(
    fit: float,
    words: str,
    not_said: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    found = Reconstruction(torch.zeros(1, 1, 8, 8), torch.tensor([3]), fit)
    with caplog.at_level(logging.INFO, logger="flwr"):
        log_leak(Leak(1, (2,), found))
        log_leak(Leak(1, (2,), replace(found, doubts=("of another client",)), "of another client"))
    said, doubtful = caplog.messages
    assert words in said
    assert not_said not in said
    assert "reconstructed" not in doubtful


def test_with_no_time_at_all_every_client_has_its_leak() -> None:
    leaks, _ = leaks_of(scenario(), attack=LinearAttack(), seconds=1e-9)
    assert len(leaks) == 9
    assert {leak.status for leak in leaks} == {"failed"}
    assert all(leak.reason.startswith("time:") for leak in leaks)
