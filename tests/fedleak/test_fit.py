"""``fit`` means one thing: near 0 at the truth, large elsewhere, for every client and defence."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak import LocalTraining, Observation, Reconstruction, ThreatModel, parse_defence
from fedleak.attacks import Evidence, run_attack
from fedleak.data import load_data
from fedleak.defences import defend

SHAPE = (1, 8, 8)


def digits(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    return load_data("digits")[0].batch(range(start, start + count))


def _plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 10))


def _batch_norm() -> nn.Sequential:
    layers = list(_plain())
    return nn.Sequential(layers[0], nn.BatchNorm2d(6), *layers[1:]).train()


def _instance_norm() -> nn.Sequential:
    layers = list(_plain())
    return nn.Sequential(layers[0], nn.InstanceNorm2d(6, affine=True), *layers[1:]).train()


MODELS = {"plain": _plain, "batch norm": _batch_norm, "instance norm": _instance_norm}


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    made = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    return dict(zip(names, made, strict=True))


def fits(seen: Observation, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Return the fit of the truth, of other digits and of grey, the labels known."""
    told = seen.with_terms(labels=tuple(y.tolist()), threat=_with_labels(seen.threat))
    evidence = Evidence.gather([told], "cpu")
    grey, other = torch.full_like(x, 0.5), digits(len(x), 40)[0]
    each = [float(evidence.fit(images.double()[None])) for images in (x, other, grey)]
    return each[0], each[1], each[2]


def _with_labels(threat: ThreatModel) -> ThreatModel:
    return ThreatModel(**{**vars(threat), "labels": True})


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_at_the_truth_and_elsewhere(name: str, images: int) -> None:
    torch.manual_seed(0)
    model, (x, y) = MODELS[name](), digits(images)
    seen = Observation.from_gradient(model, gradient(model, x, y), SHAPE, images)
    truth, other, grey = fits(seen, x, y)
    assert truth < 1e-6
    assert min(other, grey) > 0.1


@pytest.mark.parametrize("rate", [1.0, 0.01])
@pytest.mark.parametrize("name", MODELS)
def test_shared_weights_with_and_without_the_learning_rate(name: str, rate: float) -> None:
    torch.manual_seed(0)
    model, (x, y) = MODELS[name](), digits(2)
    moved = {k: -rate * g for k, g in gradient(model, x, y).items()}
    weights = {k: v + moved.get(k, 0.0) for k, v in model.state_dict().items()}
    for threat in (ThreatModel(), ThreatModel(learning_rate=False, local_steps=False)):
        seen = Observation.from_weights(
            model, weights, LocalTraining(rate, 2), SHAPE, threat=threat
        )
        truth, other, grey = fits(seen, x, y)
        assert truth < 1e-3
        assert min(other, grey) > 0.1


@pytest.mark.parametrize(
    ("defence", "most"),
    [("clip:0.05", 1e-6), ("prune:0.9", 1e-6), ("quantise:8", 0.02), ("noise:0.1", 0.04),
     ("sign:1", 1e-6), ("clip:0.1+noise:0.1", 0.05), ("withhold:0", 1e-6)],
)  # fmt: skip
def test_under_a_known_defence(defence: str, most: float) -> None:
    torch.manual_seed(0)
    model, (x, y), spec = _plain(), digits(2), parse_defence(defence)
    sent = defend(gradient(model, x, y), spec, 0)
    seen = Observation.from_gradient(model, sent, SHAPE, 2, defence=spec)
    truth, other, grey = fits(seen, x, y)
    assert truth < most
    assert min(other, grey) > 0.1


def test_the_factor_is_told() -> None:
    torch.manual_seed(0)
    model, (x, y), spec = _plain(), digits(2), parse_defence("clip:0.05")
    clean = gradient(model, x, y)
    norm = float(sum(g.square().sum() for g in clean.values()) ** 0.5)
    seen = Observation.from_gradient(model, defend(clean, spec, 0), SHAPE, 2, defence=spec)
    told = seen.with_terms(labels=tuple(y.tolist()), threat=_with_labels(seen.threat))
    _, factor = Evidence.gather([told], "cpu").compare(x.double()[None])
    assert float(factor) == pytest.approx(0.05 / norm, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_fit_that_is_no_number_is_a_failure(value: float) -> None:
    model, (x, y) = _plain(), digits(1)
    seen = Observation.from_gradient(model, gradient(model, x, y), SHAPE)

    def attack(observations: object) -> list[Reconstruction]:
        return [Reconstruction(x.double(), y, value)]

    cast: Callable[..., list[Reconstruction]] = attack
    (outcome,) = run_attack(cast, [seen])  # type: ignore[arg-type]
    assert outcome.reconstruction is None
    assert "no number" in outcome.reason
