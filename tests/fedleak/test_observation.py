"""Updates that can and cannot be used."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from fedleak.errors import InvalidInputError, InvalidUpdateError
from fedleak.models import build_model
from fedleak.observation import Observation
from tests.conftest import client_gradient

MODEL = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
IMAGE = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_weights_give_the_gradient_of_a_step() -> None:
    gradient = client_gradient(MODEL, IMAGE, 3)
    trained = copy.deepcopy(MODEL)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter -= 0.1 * gradient[name]
    seen = Observation.from_weights(MODEL, trained.state_dict(), 0.1, (1, 8, 8))
    for name, value in gradient.items():
        torch.testing.assert_close(seen.gradient[name].float(), value, atol=1e-5, rtol=1e-4)


def test_steps_times_batch_is_the_number_of_images() -> None:
    state = {k: v + 1 for k, v in MODEL.state_dict().items()}
    seen = Observation.from_weights(MODEL, state, 0.1, (1, 8, 8), local_steps=3, batch_size=4)
    assert seen.images == 12


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


def test_bad_protocol() -> None:
    with pytest.raises(InvalidInputError, match="learning rate 0"):
        Observation.from_weights(MODEL, MODEL.state_dict(), 0, (1, 8, 8))
