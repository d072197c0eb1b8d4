"""What is to be expected of images: the bound of large updates against the dense value."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedleak import Observation
from fedleak.attacks import certainty
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.targets.local_training import module_target
from tests.conftest import client_gradient


def setting(seed: int, kernels: int, error: float):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, kernels, 3, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(4))
    image = torch.rand(1, 8, 8)
    model(image[None])
    gradient = client_gradient(model, image, 1)
    evidence = Evidence.gather([Observation.from_gradient(model, gradient, (1, 8, 8))], "cpu")
    evidence = evidence.with_labels(torch.tensor([[1]])).with_errors(
        {n: (error * g.square().mean().sqrt()).expand_as(g) for n, g in evidence.gradient.items()}
    )
    return module_target(evidence), image[None, None].double()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from([0.3, 0.03, 0.003]))
def test_bound_is_the_dense_value(seed: int, kernels: int, error: float) -> None:
    target, image = setting(seed, kernels, error)
    ((dense,),) = certainty.at_most_db(target, image, -math.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certainty, "_UNKNOWNS", 0)
        ((bound,),) = certainty.at_most_db(target, image, -math.inf)
        ((early,),) = certainty.at_most_db(target, image, dense + 6)
    # Signs instead of every pixel: 64 of them tell a mean to a decibel or two.
    assert abs(bound - dense) < 2.5
    assert bound - 1e-6 <= early < dense + 6


def test_too_few_steps_settle_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    target, image = setting(0, 6, 0.003)
    monkeypatch.setattr(certainty, "_UNKNOWNS", 0)
    monkeypatch.setattr(certainty, "_MOST", 4)
    assert math.isnan(certainty.at_most_db(target, image, 20.0)[0][0])
