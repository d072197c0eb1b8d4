"""An attacker who knows the defence recovers at least as much as one who does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import write_png

from fedleak.attacks import make_attack
from fedleak.attacks.evidence import Evidence
from fedleak.client.compute import example_gradients, gradient
from fedleak.client.training import LocalTraining
from fedleak.commands.app import main
from fedleak.data import load_data
from fedleak.defences import defend, defend_examples, parse_defence
from fedleak.errors import InvalidInputError
from fedleak.laboratory import reconstruct
from fedleak.models import build_model
from fedleak.observation import Observation
from fedleak.quality import score_batch
from fedleak.threat import ThreatModel

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, list[int]]:
    images, labels = load_data("digits", "data", False, 0)[0].batch(range(6))
    return images, labels.tolist()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model("cnn2-v2", SHAPE, 10, seed=0).eval()


def _mean(psnr: list[float]) -> float:
    return sum(psnr) / len(psnr)


def _bar(unaware: list[float], gain_db: float) -> float:
    """Return what an informed attack must come to; from 100 dB on rounding decides who is ahead."""
    return min(_mean(unaware) + gain_db, 100.0)


@pytest.mark.parametrize(
    ("defence", "gain_db"),
    [
        ("none", 0), ("noise:0.001", 0.5), ("noise:0.1", 5), ("laplace:0.1", 5),
        ("prune:0.5", 60), ("prune:0.9", 4), ("prune:0.99", 0.5), ("sparsify:0.5", 40),
        ("quantise:8", 2), ("quantise:4", 3), ("quantise:2", 0.5), ("sign:1", 1),
        ("sign:0.01,scale=fixed", 1), ("clip:0.5", -0.1), ("dp:clip=1,noise=0.01", 1),
        ("soteria:0.4", 60), ("withhold:last", 60), ("withhold:fc.bias", 60),
        ("withhold:first", -1), ("clip:0.5+prune:0.5", 10), ("prune:0.9+noise:0.01", 1),
    ],
)  # fmt: skip
def test_informed_is_at_least_unaware(
    model: nn.Module, digits: tuple[Tensor, list[int]], defence: str, gain_db: float
) -> None:
    """By how much, at least; what only some entries are lost of is recovered whole.

    A scale alone is found by the unaware, too: the head's gradient contradicts the softmax.
    """
    unaware = reconstruct(model, *digits, defence=defence)
    informed = reconstruct(model, *digits, defence=defence, informed=True)
    assert _mean(informed.psnr_db) >= _bar(unaware.psnr_db, gain_db)
    assert [t.label_inferred for t in informed.trials] == digits[1]
    for trial in informed.trials:
        assert trial.reconstruction.threat is not None
        assert trial.reconstruction.threat.defence
    assert not unaware.trials[0].reconstruction.threat.defence  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "defence", "gain_db"),
    [
        (make_attack("linear"), "prune:0.5", 30),
        (make_attack("linear"), "sparsify:0.5", 60),
        (make_attack("linear"), "clip:0.5", -0.1),
        (make_attack("linear"), "quantise:4", 1),
        (make_attack("cosine", steps=150, tv=0.02), "prune:0.9", 1),
        (make_attack("cosine", steps=150, tv=0.02), "withhold:last", 8),
    ],
)
def test_other_attacks_use_it_too(
    model: nn.Module, digits: tuple[Tensor, list[int]], attack: object, defence: str, gain_db: float
) -> None:
    unaware = reconstruct(model, *digits, attack, defence)  # type: ignore[arg-type]
    informed = reconstruct(model, *digits, attack, defence, informed=True)  # type: ignore[arg-type]
    assert _mean(informed.psnr_db) >= _bar(unaware.psnr_db, gain_db)


@pytest.mark.slow
def test_a_model_that_is_no_chain(digits: tuple[Tensor, list[int]]) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
            self.fc = nn.Linear(6 * 36, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).tanh()
            return self.fc((x + self.b(x).tanh()).flatten(1))

    torch.manual_seed(0)
    net, few = Residual(), (digits[0][:1], digits[1][:1])
    for defence, gain in (("prune:0.9", 2), ("clip:0.5", 2)):
        unaware = reconstruct(net, *few, defence=defence)
        informed = reconstruct(net, *few, defence=defence, informed=True)
        assert _mean(informed.psnr_db) >= _bar(unaware.psnr_db, gain)


def test_batches(model: nn.Module, digits: tuple[Tensor, list[int]]) -> None:
    attack = make_attack("hybrid", steps=200)
    # The factor of clipping is found by an unaware attacker, too.
    for defence, gain in (("clip:0.5", 0), ("prune:0.5", 2)):
        few = (digits[0][:2], digits[1][:2])
        unaware = reconstruct(model, *few, attack, defence, batch_size=2)
        informed = reconstruct(model, *few, attack, defence, batch_size=2, informed=True)
        assert _mean(informed.psnr_db) >= _bar(unaware.psnr_db, gain)
    trials = reconstruct(
        model, *few, attack, "dp:clip=9,noise=1e-4,examples=2", batch_size=2, informed=True
    )
    assert min(trials.psnr_db) > 15


@pytest.mark.parametrize("defence", ["clip:0.1", "dp:clip=0.1,noise=0.1"])
def test_clipped_batches_on_a_branched_network(
    digits: tuple[Tensor, list[int]], defence: str
) -> None:
    """What is searched again without the errors of a defence keeps its unknown factor."""

    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc((x + x.tanh()).flatten(1))

    torch.manual_seed(0)
    images = F.interpolate(digits[0][:2], (4, 4))
    attack = make_attack("hybrid", steps=3)
    found = reconstruct(
        Branched().eval(), images, [0, 1], attack, defence, batch_size=2, informed=True
    )
    assert all(t.quality.psnr_db > 0 for t in found.trials)


def test_clipping_of_single_images_is_an_unknown_factor() -> None:
    """Told of DP-SGD the attacker is no worse than told of one unknown factor: 17 to 23 dB."""
    images, labels = load_data("digits", "data", False, 0)[0].batch(range(4))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 10))
    names, each = example_gradients(net, images, labels)[0], []
    spec = parse_defence("dp:clip=0.5,noise=0.01,examples=4")
    sent = defend_examples(names, spec, 1)
    for told in (spec, parse_defence("clip:0.5")):
        seen = Observation.from_gradient(net, sent, SHAPE, 4, defence=told)
        (result,) = make_attack("hybrid", steps=300)([seen])
        each.append((score_batch(result.images, result.labels, images, labels), result.fit))
    (told_all, fit), (told_factor, _) = each
    decibels = [[q.quality.psnr_db for q in r if q.quality] for r in (told_all, told_factor)]
    assert _mean(decibels[0]) >= _mean(decibels[1]) - 0.5
    assert min(decibels[0]) > 17
    assert fit < 0.5


@pytest.mark.slow
def test_a_batch_is_as_sharp_as_its_noise_lets_it_be() -> None:
    """Weights of four digits under little noise: 57 dB, of 56 predicted, and not 43."""
    images, labels = load_data("digits", "data", False, 0)[0].batch(range(10, 14))
    net, rate = build_model("cnn2-v1", SHAPE, 10, seed=0), 0.5
    change = {n: rate * g for n, g in gradient(net, images, labels)[0].items()}
    spec = parse_defence("dp:clip=1,noise=0.0001")
    sent = defend({n: c.detach() for n, c in change.items()}, spec, 0)
    weights = {n: p.detach() - sent[n] for n, p in net.named_parameters()}
    training, threat = LocalTraining(rate, 4), ThreatModel(defence=True)
    seen = Observation.from_weights(
        net, weights, training, SHAPE, num_images=4, defence=spec, threat=threat
    )
    (found,) = make_attack("hybrid")([seen])
    scored = score_batch(found.images, found.labels, images, labels)
    assert min(s.quality.psnr_db for s in scored if s.quality) > 50


def test_clipping_of_single_images_is_refused_for_weights(model: nn.Module) -> None:
    spec, weights = parse_defence("dp:clip=1,noise=0.1,examples=4"), model.state_dict()
    with pytest.raises(InvalidInputError, match="shared gradients only"):
        Observation.from_weights(
            model, weights, LocalTraining(0.1, batch_size=4), SHAPE, defence=spec
        )


def _client(model: nn.Module, image: Tensor, label: int) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = F.cross_entropy(model(image[None]), torch.tensor([label]))
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize(
    "defence", ["prune:0.9", "clip:0.1", "dp:clip=0.1,noise=0.001", "noise:0.1"]
)
def test_shared_weights_say_the_same_as_a_gradient(
    model: nn.Module, digits: tuple[Tensor, list[int]], defence: str
) -> None:
    """The defence acts on the change of weights: errors are those of the gradient, divided."""
    spec, rate = parse_defence(defence), 0.05
    gradient = _client(model, digits[0][0], digits[1][0])
    change = defend({k: (-rate * g).double() for k, g in gradient.items()}, spec, 0)
    sent = {k: p.detach().double() + change[k] for k, p in model.named_parameters()}
    double = build_model("cnn2-v2", SHAPE, 10, seed=0).double()
    seen = Observation.from_weights(double, sent, LocalTraining(rate), SHAPE, defence=spec)
    for name, error in seen.errors.items():
        expected = spec.errors(change)[name].expand_as(error) / rate
        torch.testing.assert_close(error, expected, rtol=1e-6, atol=1e-9)
    assert seen.threat.defence
    assert seen.defence == spec


def test_the_factor_of_clipping_is_recovered(
    model: nn.Module, digits: tuple[Tensor, list[int]]
) -> None:
    spec = parse_defence("clip:0.25")
    gradients = [_client(model, x, y) for x, y in zip(*digits, strict=True)]
    seen = [Observation.from_gradient(model, defend(g, spec, 0), SHAPE, defence=spec)
            for g in gradients]  # fmt: skip
    evidence = Evidence.gather(seen, "cpu")
    for name, made in evidence.gradient.items():
        true = torch.stack([g[name] for g in gradients]).double()
        torch.testing.assert_close(made, true, rtol=1e-4, atol=1e-6)


def test_a_defence_is_known_only_where_the_threat_model_says_so(model: nn.Module) -> None:
    gradient = _client(model, torch.rand(SHAPE), 3)
    spec = parse_defence("noise:0.1")
    with pytest.raises(InvalidInputError, match="does not let the attacker know it"):
        Observation.from_gradient(model, gradient, SHAPE, threat=ThreatModel(), defence=spec)
    unaware = Observation.from_gradient(model, gradient, SHAPE)
    assert unaware.errors == {}
    seen = Observation.from_gradient(model, gradient, SHAPE, defence=spec)
    assert "defence" in str(seen.threat)
    with pytest.raises(InvalidInputError, match="one known defence"):
        make_attack("hybrid")([seen, unaware])


def test_errors_of_a_sum(model: nn.Module) -> None:
    spec, threat = parse_defence("dp:clip=1,noise=0.1"), ThreatModel(view="sum", defence=True)
    gradients = [_client(model, torch.rand(SHAPE), y) for y in (1, 2, 3, 4)]
    seen = [Observation.from_gradient(model, g, SHAPE, threat=threat, defence=spec)
            for g in gradients]  # fmt: skip
    total = Observation.sum_of(seen)
    for error in total.errors.values():
        torch.testing.assert_close(error, torch.full_like(error, 0.1 / 2))


def test_command_line(
    tmp_path: Path, photos: Tensor, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_png((photos[0, :, ::2, ::2] * 255).round().byte(), str(tmp_path / "0.png"))
    base = ["fedleak", "reconstruct", "--model", "cnn2-v1", "--images", str(tmp_path), "--json",
            "--attack", "linear", "--defence", "clip:0.5"]  # fmt: skip
    psnr = []
    for extra in ([], ["--informed"]):
        monkeypatch.setattr(sys, "argv", [*base, *extra])
        main()
        result = json.loads(capsys.readouterr().out)
        assert result["threat_model"]["defence"] is bool(extra)
        psnr.append(result["images"][0]["psnr_db"])
    assert psnr[1] > 100
    monkeypatch.setattr(sys, "argv", [*base[:-1], "withhold:conv9"])
    with pytest.raises(SystemExit):
        main()
    assert "unknown layer to withhold 'conv9'; did you mean 'conv1'" in capsys.readouterr().err
