"""What the attacks recover, and what they refuse."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fedleak.attacks
from fedleak.attacks import (
    HybridAttack,
    LinearAttack,
    Reconstruction,
    make_attack,
    resolve_device,
    run_attack,
)
from fedleak.data import load_data
from fedleak.defences import DefenceSpec, defend
from fedleak.errors import InvalidInputError, UnknownNameError, UnsupportedModelError
from fedleak.models import build_model
from fedleak.observation import Observation
from fedleak.quality import score
from fedleak.systems import Chain
from fedleak.threat import ThreatModel
from tests.conftest import CIFAR10, client_gradient

Observe = Callable[[nn.Module, Tensor, int], Observation]
QUICK = HybridAttack(steps=60)


def _psnr(result: Reconstruction, truth: Tensor) -> float:
    return score(result.images[0], truth).psnr_db


@pytest.mark.parametrize("attack", ["linear", "hybrid"])
def test_full_rank_photos_are_recovered_to_rounding(
    attack: str, observe: Observe, photos: Tensor
) -> None:
    """cnn2-v1 on natural images, float32 gradients: what is left is float32 rounding."""
    model = build_model("cnn2-v1", (3, 32, 32), 10, seed=10)
    labels = [3, 0, 7, 9]
    observations = [observe(model, x, y) for x, y in zip(photos, labels, strict=True)]
    results = make_attack(attack)(observations)
    assert [int(r.labels) for r in results] == labels
    assert min(_psnr(r, x) for r, x in zip(results, photos, strict=True)) > 135
    assert max(r.fit for r in results) < 1e-6


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="no CIFAR-10 beside the checkout")
@pytest.mark.parametrize(("file", "label"), [("truck/00001.png", 9), ("deer/00003.png", 4)])
@pytest.mark.parametrize("seed", [0, 10])
def test_cifar_is_recovered_to_140_db(file: str, label: int, seed: int, observe: Observe) -> None:
    from torchvision.io import decode_image

    image = decode_image(str(CIFAR10 / file)).float() / 255
    model = build_model("cnn2-v1", (3, 32, 32), 10, seed=seed)
    for attack in (LinearAttack(), HybridAttack()):
        (result,) = attack([observe(model, image, label)])
        assert _psnr(result, image) >= 140
        assert int(result.labels) == label


@pytest.mark.parametrize(
    "activation", [nn.Tanh, nn.Sigmoid, nn.Identity, lambda: nn.LeakyReLU(0.3)]
)
def test_every_activation_and_a_bias(activation: Callable[[], nn.Module], observe: Observe) -> None:
    """The convolution's bias is large: forgetting it would show."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), activation(), nn.Conv2d(6, 8, 3, padding=1), activation(),
        nn.Flatten(), nn.Linear(8 * 36, 10),
    )  # fmt: skip
    with torch.no_grad():
        model[0].bias.fill_(0.7)
        model[2].bias.fill_(-0.6)
    train, _ = load_data("digits")
    x, y = train.batch(range(3))
    results = LinearAttack()([observe(model, x[i], int(y[i])) for i in range(3)])
    for i, result in enumerate(results):
        assert _psnr(result, x[i]) > 90
        assert [layer["unknowns"] for layer in result.details["layers"]] == [64, 216]


def test_geometry_beyond_the_paper(observe: Observe) -> None:
    """Groups, dilation, padding, a rectangular image and kernel, two connected layers."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 12, (2, 3), padding=(1, 1), groups=2), nn.Tanh(),
        nn.Conv2d(12, 24, 2, dilation=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(24 * 6 * 7, 40), nn.Tanh(), nn.Linear(40, 5),
    )  # fmt: skip
    image = torch.rand(2, 7, 9)
    (result,) = LinearAttack()([observe(model, image, 2)])
    assert _psnr(result, image) > 80


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [("cnn2-v2", 30), ("cnn3-v1", 20), ("cnn3-v2", 17), ("cnn4-v1", 20), ("cnn4-v2", 25)],
)
def test_deficient_networks_of_the_paper(
    name: str, least: float, observe: Observe, photos: Tensor
) -> None:
    """Far above the published figures, on average over photographs."""
    model = build_model(name, (3, 32, 32), 10, seed=3)
    observations = [observe(model, x, 1) for x in photos]
    found = [_psnr(r, x) for r, x in zip(HybridAttack()(observations), photos, strict=True)]
    base = [_psnr(r, x) for r, x in zip(LinearAttack()(observations), photos, strict=True)]
    assert sum(found) / len(found) > least
    assert sum(found) / len(found) > sum(base) / len(base) + 5


@pytest.mark.parametrize("name", ["cnn2-v2", "cnn3-v1"])
def test_hybrid_never_fits_worse_than_linear(name: str, observe: Observe, photos: Tensor) -> None:
    model = build_model(name, (3, 32, 32), 10, seed=3)
    observations = [observe(model, x, 1) for x in photos[:2]]
    pairs = zip(QUICK(observations), LinearAttack()(observations), strict=True)
    for ours, linear in pairs:
        assert ours.fit <= max(linear.fit, 1e-6)


def test_attacked_together_or_alone(observe: Observe) -> None:
    """A batch of updates gives what each gives alone."""
    train, _ = load_data("digits")
    x, y = train.batch(range(4))
    model = build_model("cnn2-v2", (1, 8, 8), 10, seed=0)
    clean = [observe(model, x[i], int(y[i])) for i in range(4)]
    noisy = [
        Observation.from_gradient(
            model, defend(o.gradient, DefenceSpec("noise", 0.1), i), (1, 8, 8)
        )
        for i, o in enumerate(clean)
    ]
    mixed = [clean[0], noisy[1], clean[2], noisy[3]]
    together = HybridAttack()(mixed)
    for one, result in zip(mixed, together, strict=True):
        (alone,) = HybridAttack()([one])
        torch.testing.assert_close(result.images, alone.images, atol=1e-5, rtol=0)


def test_noise_level_is_seen_in_the_update(observe: Observe) -> None:
    """Clean updates read as clean; noise is estimated within a factor of two."""
    train, _ = load_data("digits")
    x, y = train.batch(range(1))
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    clean = observe(model, x[0], int(y[0]))
    assert LinearAttack()([clean])[0].details["noise"] < 1e-6
    for strength in (1e-3, 1e-2, 1e-1):
        update = defend(clean.gradient, DefenceSpec("noise", strength), 1)
        noisy = Observation.from_gradient(model, update, (1, 8, 8))
        found = LinearAttack()([noisy])[0].details["noise"]
        assert strength / 2 < found < strength * 3


@pytest.mark.parametrize("name", ["cnn2-v1", "cnn2-v2"])
def test_a_confident_model_leaks_as_much(name: str, observe: Observe) -> None:
    """At a tiny loss rounding is a large part of p - y; the update is clean all the same."""
    train, _ = load_data("digits")
    x, y = train.batch(range(6))
    model = build_model(name, (1, 8, 8), 10, seed=0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(300):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
    assert loss.item() < 2e-3
    seen = [observe(model, x[i], int(y[i])) for i in range(6)]
    results = HybridAttack()(seen)
    assert min(_psnr(r, x[i]) for i, r in enumerate(results)) > 100
    assert max(r.details["noise"] for r in results) < 1e-5


def test_a_known_label_is_used(observe: Observe) -> None:
    train, _ = load_data("digits")
    x, y = train.batch(range(1))
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    seen = observe(model, x[0], int(y[0]))
    wrong = ((int(y[0]) + 1) % 10,)
    told = seen.with_terms(labels=wrong, threat=ThreatModel(labels=True))
    (result,) = LinearAttack()([told])
    assert int(result.labels) == (int(y[0]) + 1) % 10


def test_attacks_are_deterministic_and_ignore_random_state(observe: Observe) -> None:
    train, _ = load_data("digits")
    x, y = train.batch(range(1))
    model = build_model("cnn3-v1", (1, 8, 8), 10, seed=0)
    seen = observe(model, x[0], int(y[0]))
    first = QUICK([seen])[0]
    torch.manual_seed(123)
    random.seed(5)
    assert torch.equal(QUICK([seen])[0].images, first.images)


def test_an_attack_cannot_reach_the_truth() -> None:
    """No module of the attacks imports data or scoring: there is no way to peek."""
    folder = Path(fedleak.attacks.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            for name in names:
                assert not name.startswith(("fedleak.quality", "fedleak.data", "simulations"))


def noisy(seen: Observation) -> Observation:
    """Return an observation of nothing but noise."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        k: torch.randn(g.shape, generator=generator, dtype=g.dtype)
        for k, g in seen.gradient.items()
    }
    return replace(seen, gradient=drawn)


def test_images_that_cannot_be_told_apart_are_refused(observe: Observe) -> None:
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    seen = observe(model, torch.rand(1, 8, 8), 1)
    for images, words in ((10, "mixes 10 images; .* at most 9 apart"), (4, "4 images of a batch")):
        batch = noisy(seen).with_terms(num_images=images)
        with pytest.raises(UnsupportedModelError, match=words):
            LinearAttack()([batch])


def test_layers_that_are_not_what_they_seem() -> None:
    """Each would be attacked as another network, and come out wrong with status ok."""
    twice = nn.Conv2d(1, 1, 3, padding=1)
    frozen = nn.Conv2d(1, 4, 3, padding=1)
    frozen.weight.requires_grad_(False)
    tail = [nn.Tanh(), nn.Flatten(), nn.Linear(64, 4)]
    wide = [nn.Linear(8, 5), nn.Flatten(), nn.Linear(40, 4)]
    for layers, words in (
        ([twice, nn.Tanh(), twice, *tail], "used twice"),
        ([frozen, nn.Tanh(), nn.Flatten(), nn.Linear(256, 4)], "frozen 'weight'"),
        ([nn.Dropout(0.3), *tail], "dropout with p=0.3"),
        (wide, "put a Flatten before it"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            Chain.read(nn.Sequential(*layers), (1, 8, 8))


def test_a_result_that_is_no_image_is_a_failure(observe: Observe) -> None:
    seen = observe(build_model("cnn2-v1", (1, 8, 8), 10), torch.rand(1, 8, 8), 1)
    for images, words in (
        (torch.full((1, 1, 8, 8), torch.nan), "diverged"),
        (torch.zeros(1, 3, 8, 8), "shape"),
    ):
        made = Reconstruction(images, torch.tensor([1]), 0.0)
        (outcome,) = run_attack(lambda o, m=made: [m], [seen])
        assert outcome.reconstruction is None
        assert words in outcome.reason


def test_one_bad_update_costs_only_itself(observe: Observe) -> None:
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    good = observe(model, torch.rand(1, 8, 8), 1)
    bad = noisy(good).with_terms(num_images=2)
    first, second, third = run_attack(LinearAttack(), [good, bad, good])
    assert first.reconstruction is not None
    assert third.reconstruction is not None
    assert second.reconstruction is None
    assert "2 images of a batch could not be told apart" in second.reason


def test_an_attack_that_raises_is_reported(observe: Observe) -> None:
    def broken(observations: object) -> list[Reconstruction]:
        raise ZeroDivisionError("oops")

    seen = observe(build_model("cnn2-v1", (1, 8, 8), 10), torch.rand(1, 8, 8), 1)
    (outcome,) = run_attack(broken, [seen])
    assert outcome.reconstruction is None
    assert outcome.reason == "ZeroDivisionError: oops"


def test_bad_options() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'hybrid'"):
        make_attack("hybird")
    with pytest.raises(InvalidInputError, match=r"Known: prior, public, prior_options, steps"):
        make_attack("hybrid", stepz=3)
    for name, options in (
        ("steps", {"steps": 1.5}),
        ("steps", {"steps": 0}),
        ("precision", {"precision": float("nan")}),
        ("mean", {"prior_options": {"mean": float("nan")}}),
        ("sigma", {"prior_options": {"sigma": "wide"}}),
        ("rho", {"prior_options": {"rho": 1.0}}),
        ("sigma", {"prior_options": {"sigma": -1.0}}),
        ("Known: rho, power, colour", {"prior_options": {"hue": 1.0}}),
        ("did you mean 'gaussian'", {"prior": "gausian"}),
        ("--public FOLDER", {"prior": "gaussian:learned"}),
    ):
        with pytest.raises(InvalidInputError, match=name):
            make_attack("hybrid", **options)
    with pytest.raises(InvalidInputError, match="device 'tpu9'"):
        LinearAttack(device="tpu9")([_any()])


def _any() -> Observation:
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    return Observation.from_gradient(
        model, client_gradient(model, torch.rand(1, 8, 8), 1), (1, 8, 8)
    )


def test_auto_takes_the_processor_for_few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("auto", 3072).type == "cpu"
    assert resolve_device("auto", 10 * 3072).type == "cuda"
    assert resolve_device("cuda", 3072).type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_agrees_with_cpu(observe: Observe, photos: Tensor) -> None:
    model = build_model("cnn2-v1", (3, 32, 32), 10, seed=10)
    seen = [observe(model, x, 1) for x in photos]
    for a, b in zip(LinearAttack("cuda")(seen), LinearAttack("cpu")(seen), strict=True):
        torch.testing.assert_close(a.images, b.images, atol=1e-6, rtol=0)
