"""Weights that a server sends instead of the honest ones, and what comes back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedleak import LocalTraining, Observation, build_model, make_attack
from fedleak.attacks import run_attack
from fedleak.attacks.first_layer import FirstLayer
from fedleak.errors import FedleakError, InvalidInputError, UnknownNameError, UnsupportedModelError
from fedleak.quality import score_batch
from fedleak.tampers import TAMPERS, make_tamper
from fedleak.tampers.hidden import patterns
from fedleak.terms import Terms

SHAPE = (1, 8, 8)


def digits(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Return digits that differ: 8x8 pixels of 17 levels, in [0, 1]."""
    data = load_digits()
    images = torch.tensor(data.images[start : start + count] / 16, dtype=torch.float32)
    return images.unsqueeze(1), torch.tensor(data.target[start : start + count])


def mlp(units: int = 200, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, units), nn.ReLU(), nn.Linear(units, 16), nn.ReLU(),
            nn.Linear(16, 10),
        )  # fmt: skip


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = F.cross_entropy(model(images), labels)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def attacked(
    model: nn.Module, images: Tensor, labels: Tensor, attack: str
) -> tuple[list[float], list[bool], dict[str, object], float]:
    """Return PSNR and right labels of what came back, the details and the fit."""
    seen = Observation.from_gradient(model, gradient(model, images, labels), SHAPE, len(images))
    (result,) = make_attack(attack)([seen])
    scored = [s for s in score_batch(result.images, result.labels, images, labels) if s.quality]
    psnr = [s.quality.psnr_db for s in scored if s.quality]
    return psnr, [s.label == s.label_inferred for s in scored], result.details, result.fit


def tampered(model: nn.Module, name: str, images: int, **options: object) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(make_tamper(name, **options).prepare(model, SHAPE, num_images=images))
    return other


@pytest.mark.parametrize("seed", [0, 1])
def test_peeling_gets_the_whole_batch_certified(seed: int) -> None:
    images, labels = digits(32, 100 * seed)
    model = tampered(mlp(400, seed), "peel", 32)
    psnr, right, details, fit = attacked(model, images, labels, "rows")
    assert len(psnr) == 32
    assert min(psnr) > 80
    assert all(right)
    assert sum(details["certified"]) >= 30  # type: ignore[call-overload]
    assert fit < 1e-4


def test_one_pattern_leaves_images_of_one_brightness_together() -> None:
    images, labels = digits(32)
    bright = images.flatten(1).sum(1)
    alone = sum(int((bright == b).sum()) == 1 for b in bright)
    assert alone < 32  # 17 levels and 64 pixels: some are equally bright, and cannot be parted
    psnr, right, _, fit = attacked(tampered(mlp(400), "imprint", 32), images, labels, "rows")
    assert len(psnr) <= alone
    assert len(psnr) >= 0.6 * alone
    assert min(psnr) > 60
    assert all(right)
    assert fit > 0.05  # says that something is left


def test_traps_are_silent_for_most() -> None:
    images, labels = digits(64)
    psnr, right, _, _ = attacked(tampered(mlp(600), "trap", 64), images, labels, "rows")
    assert len(psnr) >= 0.4 * 64  # Boenisch et al.: about half, for small batches
    assert min(psnr) > 60
    assert all(right)


def test_an_honest_network_shows_small_batches_too() -> None:
    images, labels = digits(16)  # more than there are classes: no head can tell them apart
    psnr, right, details, fit = attacked(mlp(200), images, labels, "rows")
    assert len(psnr) == 16
    assert min(psnr) > 100
    assert all(right)
    assert fit < 1e-5
    assert all(details["certified"])  # type: ignore[call-overload]


def test_the_default_attack_reads_rows_where_they_show_the_whole_batch() -> None:
    images, labels = digits(16)
    psnr, right, details, fit = attacked(mlp(200), images, labels, "hybrid")
    assert (len(psnr), all(right), details["by"]) == (16, True, "rows")
    assert min(psnr) > 100
    assert fit < 1e-5


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["peel", "imprint", "trap", "honest"]))
def test_what_comes_back_is_never_invented(seed: int, name: str) -> None:
    images, labels = digits(24, seed)
    model = mlp(60, seed)  # too few units for all
    model = model if name == "honest" else tampered(model, name, 24)
    psnr, _, _, fit = attacked(model, images, labels, "rows")
    assert all(p > 40 for p in psnr)
    if len(psnr) < 24:
        assert fit > 1e-5


def test_noise_leaves_nothing_rather_than_something_wrong() -> None:
    images, labels = digits(16)
    model = tampered(mlp(200), "peel", 16)
    generator = torch.Generator().manual_seed(0)
    noisy = {
        k: g + 0.1 * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator)
        for k, g in gradient(model, images, labels).items()
    }
    (result,) = make_attack("rows")([Observation.from_gradient(model, noisy, SHAPE, 16)])
    assert len(result.images) == 0
    assert result.fit == pytest.approx(1.0)


def test_weights_that_come_back_keep_the_images() -> None:
    images, labels = digits(16)
    model = tampered(mlp(400), "peel", 16)
    step = gradient(model, images, labels)
    weights = {n: p.detach() - 0.1 * step[n] for n, p in model.named_parameters()}
    seen = Observation.from_weights(model, weights, LocalTraining(0.1, 16), SHAPE)
    (result,) = make_attack("rows")([seen])
    scored = score_batch(result.images, result.labels, images, labels)
    assert all(s.quality and s.quality.psnr_db > 60 for s in scored)


@pytest.mark.parametrize(
    "client",
    [
        LocalTraining(reply="gradient", loss="cross-entropy:label_smoothing=0.1"),
        LocalTraining(reply="gradient", loss="cross-entropy:reduction=sum"),
        LocalTraining(reply="gradient", mean=(0.5,), std=(0.25,)),
    ],
)
def test_rows_of_clients_as_they_are_declared(client: LocalTraining) -> None:
    images, labels = digits(12)
    model = mlp(200)
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = client.criterion.value(model(client.seen(images)), labels)
    sent = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    terms = Terms(input_shape=SHAPE, num_images=12, training=client, shared="gradient")
    (result,) = make_attack("rows")([Observation.of(model, sent, terms)])
    scored = score_batch(result.images, result.labels, images, labels)
    assert all(s.quality and s.quality.psnr_db > 60 for s in scored)
    assert all(s.label == s.label_inferred for s in scored)


def test_rows_need_the_size_of_the_gradient() -> None:
    images, labels = digits(4)
    model = mlp(50)
    client = LocalTraining(0.01, 4, optimiser="adam")
    step = gradient(model, images, labels)
    weights = {n: p.detach() - 0.01 * step[n].sign() for n, p in model.named_parameters()}
    terms = Terms(input_shape=SHAPE, num_images=4, training=client, shared="weights")
    with pytest.raises(UnsupportedModelError, match="signs"):
        make_attack("rows")([Observation.of(model, weights, terms)])


def test_fishing_leaves_one_image_of_a_batch_to_the_exact_attack() -> None:
    images, labels = digits(16)
    counts = torch.bincount(labels, minlength=10)
    label = int((counts == 1).nonzero()[0])
    model = build_model("cnn2-v1", SHAPE, 10, seed=0)
    psnr, right, details, fit = attacked(
        tampered(model, "fishing", 16, label=label), images, labels, "fished"
    )
    assert (len(psnr), right, details["fished"]) == (1, [True], 1)
    assert psnr[0] > 100
    assert fit < 1e-5


def test_fishing_for_a_class_that_is_not_there_finds_nothing() -> None:
    images, labels = digits(10)
    model = build_model("cnn2-v1", SHAPE, 10, seed=0)
    absent = tampered(model, "fishing", 10, label=3)
    keep = labels != 3
    psnr, _, details, _ = attacked(absent, images[keep], labels[keep], "fished")
    assert (psnr, details["fished"]) == ([], 0)


def test_only_the_class_sends_a_gradient_below_the_head() -> None:
    images, labels = digits(20)
    model = tampered(build_model("cnn2-v1", SHAPE, 10, seed=0), "fishing", 20, label=3)
    others = labels != 3
    below = gradient(model, images[others], labels[others])["conv1.weight"]
    assert not below.any()  # exactly
    assert gradient(model, images[~others], labels[~others])["conv1.weight"].any()


def test_an_update_of_an_honest_model_is_not_fished() -> None:
    images, labels = digits(4)
    model = build_model("cnn2-v1", SHAPE, 10, seed=0)
    seen = Observation.from_gradient(model, gradient(model, images, labels), SHAPE, 4)
    with pytest.raises(UnsupportedModelError, match="does not fish"):
        make_attack("fished")([seen])
    model = tampered(model, "fishing", 4, label=int(labels[0]))
    step = {k: 1.3 * g for k, g in gradient(model, images, labels).items()}
    with pytest.raises(FedleakError, match="not the mean gradient"):
        make_attack("fished")([Observation.from_gradient(model, step, SHAPE, 4)])


@pytest.mark.parametrize("name", sorted(TAMPERS))
def test_a_tamper_leaves_the_model_and_torch_as_they_were(name: str) -> None:
    model = mlp(32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    state = make_tamper(name).prepare(model, SHAPE, num_images=8)
    again = make_tamper(name).prepare(model, SHAPE, num_images=8)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(again[k], v) for k, v in state.items())
    assert any(not torch.equal(before[k], v) for k, v in state.items())


def test_fishing_takes_classes_in_turns() -> None:
    model = build_model("cnn2-v1", SHAPE, 10, seed=0)
    fisher = make_tamper("fishing")
    kept = [
        int(fisher.prepare(model, SHAPE, r, c)["fc.weight"].any(1).nonzero())
        for r, c in ((1, 0), (1, 1), (2, 0), (10, 1))
    ]
    assert kept == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (build_model("cnn2-v1", SHAPE, 10), "not fully connected to the pixels"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "fewer than two layers"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)),
            "not followed by a ReLU",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Linear(8, 10)),
            "has no bias",
        ),
    ],
)
def test_a_model_that_does_not_allow_it_is_told_why(model: nn.Module, message: str) -> None:
    for name in ("peel", "imprint", "trap"):
        with pytest.raises(UnsupportedModelError, match=message):
            make_tamper(name).prepare(model, SHAPE)
    with pytest.raises(UnsupportedModelError, match=message):
        FirstLayer.of(model, SHAPE)


def test_weights_that_are_tied_or_too_coarse_are_refused() -> None:
    layer = nn.Linear(64, 64)
    tied = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)
    for name in ("peel", "imprint", "trap", "fishing"):
        with pytest.raises(UnsupportedModelError, match="are tied"):
            make_tamper(name).prepare(tied, SHAPE)
    with pytest.raises(UnsupportedModelError, match=r"float16, do not hold"):
        make_tamper("fishing", margin=1e6).prepare(mlp().half(), SHAPE)


def test_fishing_needs_a_head() -> None:
    model = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="ends in a fully connected layer"):
        make_tamper("fishing").prepare(model, SHAPE)
    with pytest.raises(InvalidInputError, match="label 10 is not one of the 10 classes"):
        make_tamper("fishing", label=10).prepare(build_model("cnn2-v1", SHAPE, 10), SHAPE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("peel", {"directions": 0}),
        ("peel", {"directions": True}),
        ("peel", {"scale": 0}),
        ("imprint", {"logits": float("nan")}),
        ("trap", {"share": 1.0}),
        ("fishing", {"label": -2}),
        ("fishing", {"margin": 3}),
        ("fishing", {"nonsense": 3}),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        make_tamper(name, **options)


def test_unknown_tampers_are_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'peel'"):
        make_tamper("peal")


def test_too_few_units_for_the_directions() -> None:
    with pytest.raises(UnsupportedModelError, match="too few for 8 directions"):
        make_tamper("peel", directions=8).prepare(mlp(12), SHAPE)


def test_patterns_are_smooth_distinct_and_of_one_size() -> None:
    found = patterns((3, 8, 8), 12)
    assert len(found) == 12
    assert torch.allclose(found[0], torch.full((3, 8, 8), 1 / 192, dtype=torch.float64))
    flat = torch.stack(found).flatten(1)
    assert torch.allclose(flat.abs().sum(1), torch.ones(12, dtype=torch.float64))
    assert torch.linalg.matrix_rank(flat) == 12


@pytest.mark.parametrize(("attack", "tamper"), [("rows", "peel"), ("fished", "fishing")])
def test_a_time_limit_is_kept(attack: str, tamper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits(16)
    model = tampered(mlp(400), tamper, 16)
    seen = Observation.from_gradient(model, gradient(model, images, labels), SHAPE, 16)
    now = iter(range(10**9))
    monkeypatch.setattr("fedleak.deadline._now", lambda: float(next(now)))
    (cut,) = run_attack(make_attack(attack), [seen], 3)
    assert "time: " in cut.reason
    assert cut.reconstruction is None or cut.reconstruction.status == "doubtful"
