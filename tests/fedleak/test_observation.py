"""Updates that can and cannot be used, and what the attacker may know."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedleak import make_attack, run_attack
from fedleak.client.training import LocalTraining
from fedleak.errors import ForbiddenError, InvalidInputError, InvalidUpdateError
from fedleak.models import build_model
from fedleak.observation import Observation
from fedleak.threat import ThreatModel
from tests.conftest import client_gradient

MODEL = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
IMAGE = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_weights_give_the_gradient_of_a_step() -> None:
    gradient = client_gradient(MODEL, IMAGE, 3)
    trained = copy.deepcopy(MODEL)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter -= 0.1 * gradient[name]
    seen = Observation.from_weights(MODEL, trained.state_dict(), LocalTraining(0.1), (1, 8, 8))
    for name, value in gradient.items():
        torch.testing.assert_close(seen.gradient[name].float(), value, atol=1e-5, rtol=1e-4)


Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g.pop("fc.bias"), "no entry 'fc.bias'"),
        (lambda g: g.update({"fc.bias": torch.zeros(3)}), r"shape \(3,\)"),
        (lambda g: g["fc.weight"].fill_(torch.nan), "NaN or infinite"),
        (lambda g: g["fc.weight"][0, 0].fill_(torch.inf), "1 values that are NaN"),
        (lambda g: [v.zero_() for v in g.values()], "every entry of the update is zero"),
    ],
)
def test_unusable_updates_say_why(change: Change, words: str) -> None:
    gradient = {k: v.clone() for k, v in client_gradient(MODEL, IMAGE, 3).items()}
    change(gradient)
    with pytest.raises(InvalidUpdateError, match=words):
        Observation.from_gradient(MODEL, gradient, (1, 8, 8))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.floats(0, 0.95), st.floats(0, 0.1)
)
def test_the_gain_is_what_sgd_moves_by(
    images: int, batch: int, epochs: int, momentum: float, decay: float
) -> None:
    training = LocalTraining(0.5, batch, epochs, momentum, decay)
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimiser = torch.optim.SGD([weight], 0.5, momentum)
    for _ in range(training.steps(images)):
        weight.grad = torch.ones_like(weight)
        optimiser.step()
    assert weight.item() == pytest.approx(-0.5 * training.gain(images))


def test_weight_decay_is_taken_off_one_step() -> None:
    gradient = client_gradient(MODEL, IMAGE, 3)
    trained = copy.deepcopy(MODEL)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter -= 0.1 * (gradient[name] + 0.01 * parameter)
    training = LocalTraining(0.1, weight_decay=0.01)
    seen = Observation.from_weights(MODEL, trained.state_dict(), training, (1, 8, 8))
    for name, value in gradient.items():
        torch.testing.assert_close(seen.gradient[name].float(), value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"learning_rate": 0.0}, r"learning_rate \(0.0\) must be above 0"),
        ({"learning_rate": float("nan")}, "nan"),
        ({"learning_rate": 0.1, "batch_size": 0}, "batch_size must be a whole number from 1"),
        ({"learning_rate": 0.1, "epochs": 1.5}, "epochs must be a whole number from 1, not 1.5"),
        ({"learning_rate": 0.1, "momentum": 1.0}, "momentum must be below 1"),
        ({"learning_rate": "0.1"}, "learning_rate must be a number, not '0.1'"),
        ({"learning_rate": True}, "learning_rate must be a number, not True"),
    ],
)
def test_bad_local_training(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        LocalTraining(**arguments)


def test_a_sum_over_clients_is_the_mean_of_a_larger_batch() -> None:
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = [
        Observation.from_gradient(MODEL, client_gradient(MODEL, x, y), (1, 8, 8), labels=[y])
        for x, y in zip(images, (3, 7), strict=True)
    ]
    total = Observation.sum_of(seen)
    assert (total.num_images, total.clients, total.labels) == (2, 2, (3, 7))
    assert total.threat.view == "sum"
    loss = torch.nn.functional.cross_entropy(MODEL(images), torch.tensor([3, 7]))
    whole = torch.autograd.grad(loss, list(MODEL.parameters()))
    for value, expected in zip(total.gradient.values(), whole, strict=True):
        torch.testing.assert_close(value.float(), expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(InvalidInputError, match="of one model"):
        Observation.sum_of([seen[0], replace(seen[1], model=copy.deepcopy(MODEL))])
    with pytest.raises(InvalidInputError, match="one threat model"):
        Observation.sum_of([seen[0], total])
    with pytest.raises(InvalidInputError, match="at least one client"):
        Observation.sum_of([])
    more = seen[0].with_terms(num_images=2, labels=(3, 3))
    with pytest.raises(InvalidInputError, match="equally many images"):
        Observation.sum_of([seen[0], more])


def test_numbers_of_images_and_clients() -> None:
    gradient = client_gradient(MODEL, IMAGE, 3)
    with pytest.raises(InvalidInputError, match=r"images must be a whole number from 1, not 2\.0"):
        Observation.from_gradient(MODEL, gradient, (1, 8, 8), batch_size=2.0)  # type: ignore[arg-type]
    seen = Observation.from_gradient(MODEL, gradient, (1, 8, 8), batch_size=4)
    with pytest.raises(InvalidInputError, match="is a sum"):
        seen.with_terms(clients=2)
    with pytest.raises(InvalidInputError, match="4 images cannot be those of 3 clients"):
        seen.with_terms(clients=3, threat=ThreatModel(view="sum"))
    assert make_attack("linear")([]) == []


def _weights(**changes: bool) -> Observation:
    state = {k: v + 0.01 for k, v in MODEL.state_dict().items()}
    return Observation.from_weights(
        MODEL,
        state,
        LocalTraining(0.1),
        (1, 8, 8),
        threat=ThreatModel(**changes),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("unknown", ["batch_size", "learning_rate", "local_steps"])
def test_an_attack_that_needs_more_than_is_allowed_is_refused(unknown: str) -> None:
    (outcome,) = run_attack(make_attack("linear"), [_weights(**{unknown: False})])
    assert outcome.reconstruction is None
    assert "attack 'linear' needs" in outcome.reason
    assert f"{unknown} = true" in outcome.reason


def test_a_prior_from_public_images_needs_public_images() -> None:
    attack = make_attack("hybrid", prior="gaussian:learned", public=torch.rand(40, 1, 8, 8))
    with pytest.raises(ForbiddenError, match="public images to learn a prior"):
        attack([_weights(public_images=False)])


def test_every_result_says_under_which_threat_model() -> None:
    (result,) = make_attack("linear")([_weights()])
    assert result.threat == ThreatModel()
    assert "sees each client's update; knows batch size" in str(result.threat)


def test_labels_that_the_threat_model_withholds_are_refused() -> None:
    gradient = client_gradient(MODEL, IMAGE, 3)
    with pytest.raises(InvalidInputError, match="does not let the attacker know them"):
        Observation.from_gradient(MODEL, gradient, (1, 8, 8), labels=[3], threat=ThreatModel())
    with pytest.raises(InvalidInputError, match="view must be 'client' or 'sum'"):
        ThreatModel(view="everything")  # type: ignore[arg-type]


def test_what_is_not_known_is_not_in_the_observation() -> None:
    assert _weights().training == LocalTraining(0.1)
    for unknown in ("learning_rate", "local_steps"):
        assert _weights(**{unknown: False}).training is None
