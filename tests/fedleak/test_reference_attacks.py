"""The published attacks that ours are held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedleak.attacks import Evidence, LinearAttack, make_attack, run_attack
from fedleak.attacks.base import placed
from fedleak.attacks.linear import solve_recursively
from fedleak.attacks.published.objectives import cosine_distance, squared_distance, total_variation
from fedleak.defences import DefenceSpec, defend
from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.models import build_model
from fedleak.observation import Observation
from fedleak.quality import score
from fedleak.threat import ThreatModel
from tests.conftest import client_gradient, photo_patches

Observe = Callable[[nn.Module, Tensor, int], Observation]


def _smooth(k: int, size: int = 8) -> Tensor:
    """Return a smooth grey image, another one for every ``k``."""
    t = torch.linspace(0, 1, size)
    return (0.5 + 0.25 * torch.sin(3 * t[:, None] + k) + 0.25 * torch.cos(2 * t + 2 * k))[None]


def _tiny(activation: type[nn.Module] = nn.Sigmoid, seed: int = 0) -> nn.Module:
    """A net as the authors of DLG take it: smooth activations, large weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, stride=2), activation(),
        nn.Conv2d(8, 8, 3, padding=1), activation(), nn.Flatten(), nn.Linear(128, 5),
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def _observe(count: int = 3, **model: Any) -> list[Observation]:
    net = _tiny(**model)
    return [
        Observation.from_gradient(net, client_gradient(net, _smooth(k), k), (1, 8, 8))
        for k in range(count)
    ]


def _deficient() -> list[Observation]:
    """One convolution, so that one objective is minimised, and it is not solvable."""
    model = build_model("cnn2-v2", (1, 16, 16), 10, seed=0)
    return [
        Observation.from_gradient(model, client_gradient(model, _smooth(k, 16), k), (1, 16, 16))
        for k in range(3)
    ]


def _batch(sizes: int = 2) -> Observation:
    """Return one update of several images with different labels."""
    net = _tiny(nn.Tanh)
    images = torch.stack([_smooth(k) for k in range(sizes)])
    loss = nn.functional.cross_entropy(net(images), torch.arange(sizes))
    names, parameters = zip(*net.named_parameters(), strict=True)
    gradient = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    return Observation.from_gradient(net, gradient, (1, 8, 8), batch_size=sizes)


@pytest.mark.parametrize(
    ("name", "few", "many", "factor"),
    [
        ("dlg", {"steps": 1}, {"steps": 3}, 0.3),
        ("idlg", {"steps": 1}, {"steps": 3}, 0.3),
        ("cosine", {"steps": 1}, {"steps": 100}, 0.5),
        ("hybrid-paper", {"steps_fraction": 1e-4}, {"steps_fraction": 0.01}, 0.9),
    ],
)
def test_more_steps_lower_the_objective(
    name: str, few: dict[str, Any], many: dict[str, Any], factor: float
) -> None:
    seen = _deficient() if name == "hybrid-paper" else _observe()
    first, last = make_attack(name, **few)(seen), make_attack(name, **many)(seen)
    for a, b in zip(first, last, strict=True):
        assert a.details["by"] == b.details["by"] == name
        assert a.details["steps"] < b.details["steps"]
        assert b.details["loss"] < factor * a.details["loss"]


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh])
def test_idlg_recovers_a_smooth_image(activation: type[nn.Module]) -> None:
    for k, result in enumerate(make_attack("idlg", steps=20)(_observe(activation=activation))):
        assert int(result.labels) == k
        assert score(result.images[0], _smooth(k)).psnr_db > 100
        assert result.fit < 1e-5


def test_dlg_finds_the_labels_itself() -> None:
    """Also without anything to infer them from, and whatever the threat model grants."""
    told = {"labels": (4,), "threat": ThreatModel(labels=True)}
    seen = [o.with_terms(**told) for o in _observe()]
    results = make_attack("dlg", steps=20)(seen)
    assert [int(r.labels) for r in results] == [0, 1, 2]
    assert min(score(r.images[0], _smooth(k)).psnr_db for k, r in enumerate(results)) > 60


def test_idlg_uses_a_known_label() -> None:
    (seen, *_) = _observe(1)
    told = seen.with_terms(labels=(3,), threat=ThreatModel(labels=True))
    (result,) = make_attack("idlg", steps=1)([told])
    assert int(result.labels) == 3


@pytest.mark.parametrize("name", ["dlg", "idlg", "cosine"])
def test_batches_of_several_images(name: str) -> None:
    (result,) = make_attack(name, steps=20)([_batch()])
    assert result.images.shape == (2, 1, 8, 8)
    assert result.labels.shape == (2,)
    assert math.isfinite(result.fit)


def test_idlg_separates_two_images() -> None:
    (result,) = make_attack("idlg", steps=60)([_batch()])
    assert result.labels.tolist() == [0, 1]
    assert min(score(result.images[k], _smooth(k)).psnr_db for k in range(2)) > 40


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_cosine_stays_in_the_box(steps: int) -> None:
    for result in make_attack("cosine", steps=steps, tv=0.0)(_observe()):
        assert float(result.images.min()) >= 0
        assert float(result.images.max()) <= 1


def test_cosine_restarts_keep_the_nearest_gradient() -> None:
    """The first of several starts is that of a single one; more cannot end further away."""
    seen = _observe(2)
    options = {"steps": 20, "tv": 0.0}
    one = make_attack("cosine", restarts=1, **options)(seen)
    four = make_attack("cosine", restarts=4, **options)(seen)
    for a, b in zip(one, four, strict=True):
        assert b.details["loss"] <= a.details["loss"] * 1.001
    assert any(b.details["loss"] < 0.9 * a.details["loss"] for a, b in zip(one, four, strict=True))


def test_total_variation_smooths() -> None:
    seen = _observe(1)
    rough, smooth = (make_attack("cosine", steps=200, tv=tv)(seen)[0].images for tv in (0.0, 1.0))
    assert total_variation(smooth)[0] < 0.5 * total_variation(rough)[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dlg", {"steps": 1}),
        ("idlg", {"steps": 1}),
        ("cosine", {"steps": 8, "restarts": 2}),
        ("hybrid-paper", {"steps_fraction": 0.002}),
    ],
)
def test_together_or_alone(name: str, options: dict[str, Any]) -> None:
    """Each update has its own start and its own steps, whatever is attacked beside it."""
    seen = placed(_observe())
    together = make_attack(name, **options)(seen)
    for one, result in zip(seen, together, strict=True):
        (alone,) = make_attack(name, **options)([one])
        # Where total variation is level, rounding decides which way Adam goes, 1e-3 a step.
        miss, most = (result.images - alone.images).abs(), 1e-4
        if name == "hybrid-paper":
            miss, most = miss.mean(), 2e-3
        assert float(miss.max()) < most
        assert result.details["loss"] == pytest.approx(alone.details["loss"], rel=1e-2)
    if name != "hybrid-paper":  # it has no start to draw
        other = make_attack(name, seed=1, **options)(seen)[0]
        assert not torch.allclose(other.images, together[0].images, atol=1e-2)


def test_the_last_bit_of_a_gradient_draws_no_other_start() -> None:
    """Another processor rounds otherwise; what is drawn hangs on seed and place alone."""
    seen = _observe()
    noise = torch.Generator().manual_seed(0)
    near = [
        replace(
            o,
            gradient={
                k: g * (1 + 1e-7 * torch.randn(g.shape, generator=noise, dtype=g.dtype))
                for k, g in o.gradient.items()
            },
        )
        for o in seen
    ]
    for name in ("dlg", "idlg", "cosine"):
        attack = make_attack(name, steps=1)
        pairs = zip(attack(seen), attack(near), strict=True)
        assert max(float((a.images - b.images).abs().max()) for a, b in pairs) < 1e-3
        # Twice the same update: each place draws its own.
        first, second = attack([seen[0], seen[0]])
        assert not torch.allclose(first.images, second.images, atol=1e-2)


def test_an_update_that_is_tried_again_alone_keeps_its_start() -> None:
    seen = _observe()
    attack = make_attack("cosine", steps=1)
    broken = replace(seen[0], gradient={})
    expected = attack(seen)
    for outcome, whole in zip(
        run_attack(attack, [broken, *seen[1:]])[1:], expected[1:], strict=True
    ):
        assert outcome.reconstruction is not None, outcome.reason
        torch.testing.assert_close(outcome.reconstruction.images, whole.images, atol=1e-4, rtol=0)


def test_paper_hybrid_fits_better_than_linear_systems_alone(observe: Observe) -> None:
    """Where the layers above the image are deficient, the recursion alone goes astray."""
    model = build_model("cnn3-v1", (3, 20, 20), 10, seed=0)
    images = photo_patches(3, 20)
    seen = [observe(model, x, 1) for x in images]
    paper, linear = make_attack("hybrid-paper", steps_fraction=0.02)(seen), LinearAttack()(seen)
    gains = []
    for a, b, x in zip(paper, linear, images, strict=True):
        assert a.fit < 0.85 * b.fit
        gains.append(score(a.images[0], x).psnr_db - score(b.images[0], x).psnr_db)
        assert a.details["steps"] == 160 + 200
    assert sum(gains) / len(gains) > 2


def test_undetermined_layers_start_from_what_grey_gives(observe: Observe) -> None:
    """Of a grey image everything is known, in every layer: the nearest solution is it."""
    model = build_model("cnn4-v1", (1, 16, 16), 10, seed=0)
    with torch.no_grad():
        model.get_submodule("conv1").bias.fill_(0.8)
    grey = torch.full((1, 16, 16), 0.5)
    evidence = Evidence.gather([observe(model, grey, 2)], "cpu")
    solution = solve_recursively(evidence)
    for value, true in zip(
        solution.values, evidence.chain.features(grey[None].double()), strict=True
    ):
        torch.testing.assert_close(value, true, atol=1e-4, rtol=0)


def test_paper_hybrid_needs_a_chain() -> None:
    with pytest.raises(UnsupportedModelError, match="mixes 2 images"):
        make_attack("hybrid-paper")([_batch()])


def test_paper_hybrid_of_connected_layers_and_of_a_head_alone() -> None:
    """No total variation where there is no space; nothing to correct where all is known."""
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 4))
    alone = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    for model, steps in ((hidden, 10), (alone, 0)):
        gradient = client_gradient(model, _smooth(0), 1)
        seen = Observation.from_gradient(model, gradient, (1, 8, 8))
        (result,) = make_attack("hybrid-paper", steps_fraction=0.001)([seen])
        assert result.details["steps"] == steps
        assert score(result.images[0], _smooth(0)).psnr_db > 30


@pytest.mark.parametrize("name", ["dlg", "idlg", "cosine", "hybrid-paper"])
@pytest.mark.parametrize("defence", ["noise", "prune"])
def test_defended_updates_give_an_image(name: str, defence: str) -> None:
    small = {"steps_fraction": 0.002} if name == "hybrid-paper" else {"steps": 3}
    seen = [
        Observation.from_gradient(
            o.model, defend(o.gradient, DefenceSpec(defence, 0.3), n), o.input_shape
        )
        for n, o in enumerate(_observe(2))
    ]
    for outcome in run_attack(make_attack(name, **small), seen):
        assert outcome.reconstruction is not None, outcome.reason


def test_terms_of_the_objectives() -> None:
    x = torch.tensor([[[[0.0, 1.0], [3.0, 7.0]]], [[[2.0, 2.0], [2.0, 2.0]]]])
    torch.testing.assert_close(total_variation(x), torch.tensor([4.5 + 2.5, 0.0]))
    assert total_variation(torch.rand(3, 7)).tolist() == [0, 0, 0]
    a = {"w": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([[4.0]])}
    b = {"w": torch.tensor([[6.0, 0.0]]), "b": torch.tensor([[8.0]])}
    c = {"w": torch.tensor([[0.0, 2.0]]), "b": torch.tensor([[0.0]])}
    assert float(cosine_distance(a, b)) == pytest.approx(0)
    assert float(cosine_distance(a, c)) == pytest.approx(1)
    assert float(squared_distance(a, b)) == pytest.approx(25)


def test_cosine_of_a_tiny_gradient() -> None:
    """A confident model's gradient is small: its squares must not underflow."""
    (seen, *_) = _observe(1)
    small = {k: g * 1e-25 for k, g in seen.gradient.items()}
    shrunk = Observation.from_gradient(seen.model, small, seen.input_shape)
    (result,) = make_attack("cosine", steps=60, tv=0.0)([shrunk])
    assert result.details["loss"] < 0.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dlg", {"steps": 0}),
        ("dlg", {"steps": 2.0}),
        ("dlg", {"steps": True}),
        ("idlg", {"seed": -1}),
        ("cosine", {"steps": "many"}),
        ("cosine", {"restarts": 0}),
        ("cosine", {"tv": -0.1}),
        ("cosine", {"tv": float("nan")}),
        ("cosine", {"learning_rate": 0}),
        ("hybrid-paper", {"steps_fraction": 0.0}),
        ("hybrid-paper", {"steps_fraction": 1.5}),
        ("hybrid-paper", {"steps_fraction": "half"}),
    ],
)
def test_bad_options(name: str, options: dict[str, Any]) -> None:
    ((option, value),) = options.items()
    with pytest.raises(InvalidInputError) as error:
        make_attack(name, **options)
    assert option in str(error.value)
    assert repr(value) in str(error.value)
