"""What clients do: losses and optimisers against torch, and attacks where they are declared."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedleak import LocalTraining, Observation, Reconstruction, laboratory, make_attack
from fedleak.attacks.head.labels import label_candidates
from fedleak.client import (
    LOSSES,
    OPTIMISERS,
    SGD,
    Adam,
    AdamW,
    BinaryCrossEntropy,
    CanonicalLoss,
    CrossEntropy,
    Loss,
    Optimiser,
    gradient,
    train,
)
from fedleak.client.local_replay import LocalReplay
from fedleak.client.replay import Replay
from fedleak.errors import InvalidInputError, UnknownNameError, UnsupportedModelError
from fedleak.quality import score_batch
from fedleak.spelling import parse, spell
from fedleak.systems import Chain

SHAPE = (1, 8, 8)
WEIGHTS = (1.0,) * 5 + (5.0,) * 5
RULES = [
    SGD(), SGD(0.9, 0.01), SGD(0.9, 0.01, nesterov=True), Adam(), Adam(weight_decay=0.1), AdamW(),
]  # fmt: skip


def digits(*places: int) -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images[list(places)] / 16, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(data.target[list(places)])


def network(outputs: int = 10, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, outputs, bias=bias)
    )


def psnr(result: Reconstruction, images: Tensor, labels: Tensor) -> list[float]:
    scored = score_batch(result.images, result.labels, images, labels)
    return [one.quality.psnr_db for one in scored if one.quality is not None]


def leaked(
    model: nn.Module, images: Tensor, labels: Tensor, client: LocalTraining, declared: bool = True
) -> tuple[Reconstruction, list[float]]:
    sent, _ = gradient(model, images, labels, client)
    seen = Observation.from_gradient(
        model, sent, SHAPE, len(images), training=client if declared else None
    )
    (result,) = make_attack("hybrid")([seen])
    return result, psnr(result, images, labels)


losses = st.one_of(
    st.builds(
        CrossEntropy,
        st.sampled_from([0.0, 0.1, 0.5]),
        st.sampled_from([(), (1.0, 2.0, 0.5, 3.0)]),
        st.sampled_from(["mean", "sum"]),
    ),
    st.builds(BinaryCrossEntropy, st.sampled_from(["mean", "sum"])),
)


@settings(deadline=None, max_examples=40)
@given(losses, st.integers(1, 5), st.integers(0, 1000), st.booleans())
def test_a_loss_says_its_derivatives(loss: CanonicalLoss, batch: int, seed: int, one: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = 1 if one and isinstance(loss, BinaryCrossEntropy) else 4
    logits = torch.randn(2, batch, outputs, generator=generator, dtype=torch.float64)
    labels = torch.randint(loss.classes(outputs), (2, batch), generator=generator)
    z = logits.clone().requires_grad_()
    value = torch.stack([loss.value(z[n], labels[n]) for n in range(2)]).sum()
    (wanted,) = torch.autograd.grad(value, z)
    assert torch.allclose(loss.cotangent(logits, labels), wanted, atol=1e-13)
    assert torch.allclose(Loss.cotangent(loss, logits, labels), wanted, atol=1e-13)
    own = loss.alone(logits[0], labels[0])
    for n in range(batch):
        alone = loss.cotangent(logits[0, n : n + 1], labels[0, n : n + 1])[0]
        assert torch.allclose(own[n], alone, atol=1e-13)
    known = Loss.curvature(loss, logits[0], labels[0])
    assert torch.allclose(loss.curvature(logits[0], labels[0]), known, atol=1e-12)
    # Shares of one over the batch are the batch.
    even = torch.full((batch,), 1 / batch, dtype=torch.float64)
    assert torch.allclose(loss.shared(logits[0], labels[0], even, batch),
                          loss.value(logits[0], labels[0]), atol=1e-12)  # fmt: skip
    p = loss.link(logits)
    assert torch.allclose(loss.link(loss.unlink(p)), p, atol=1e-12)
    change = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    moved = torch.func.jvp(loss.link, (logits,), (change,))[1]
    assert torch.allclose(loss.slope(p, change), moved, atol=1e-12)
    assert torch.allclose(loss.slopes(p, change[0, :1])[..., 0],
                          loss.slope(p, change[0, :1].expand_as(p)), atol=1e-12)  # fmt: skip
    if loss.independent(outputs) < outputs:
        assert torch.allclose(wanted.sum(2), torch.zeros(2, batch, dtype=torch.float64), atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(losses, st.integers(0, 1000), st.booleans())
def test_labels_are_counted(loss: CanonicalLoss, seed: int, one: bool) -> None:
    """Where every image has the probabilities that are expected, the counts are exact."""
    generator = torch.Generator().manual_seed(seed)
    outputs = 1 if one and isinstance(loss, BinaryCrossEntropy) else 4
    typical = loss.link(torch.randn(outputs, generator=generator, dtype=torch.float64))
    labels = torch.randint(loss.classes(outputs), (6,), generator=generator)
    bias = loss.from_probabilities(typical.expand(6, -1), labels).sum(0)
    expected, least, _ = loss.counts(bias, 6, typical)
    counts = torch.bincount(labels, minlength=loss.classes(outputs)).double()
    assert torch.allclose(expected, counts, atol=1e-8)
    assert bool((least <= counts + 1e-9).all())
    assert next(label_candidates(bias, 6, typical, loss)).tolist() == sorted(labels.tolist())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_pure_steps_are_those_of_torch(rule: Optimiser) -> None:
    torch.manual_seed(1)
    start = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    theirs = [w.clone().requires_grad_() for w in start]
    in_place = [w.clone().requires_grad_() for w in start]
    ours, state = start, rule.init(start)
    optimisers = rule.torch(theirs, 0.05), Optimiser.torch(rule, in_place, 0.05)
    for number in range(1, 5):
        gradients = [torch.randn_like(w) for w in start]
        ours, state = rule.step(ours, gradients, state, 0.05, number)
        for weights, optimiser in zip((theirs, in_place), optimisers, strict=True):
            for w, g in zip(weights, gradients, strict=True):
                w.grad = g
            optimiser.step()
    for a, b, c in zip(ours, theirs, in_place, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
        assert torch.allclose(a, c, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}, {"proximal_mu": 2.0}], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_replay_of_local_training_is_what_clients_compute(
    rule: Optimiser, options: dict[str, float]
) -> None:
    images, labels = digits(*range(4))
    client = LocalTraining(
        0.01, 2, 2, optimiser=rule, loss=CrossEntropy(0.1, WEIGHTS), mean=(0.5,), std=(0.25,),
        **options,
    )  # fmt: skip
    model = network().double()
    trained = copy.deepcopy(model)
    x = images.double()
    train(trained, [(x[:2], labels[:2]), (x[2:], labels[2:])] * 2, client)
    replay = Replay(model, SHAPE, client=client)
    made = LocalReplay(replay, client)(x.unsqueeze(0), labels.unsqueeze(0)).gradients
    for name, sent in model.named_parameters():
        moved = sent.detach() - trained.get_parameter(name).detach()
        view = rule.one_step_view(moved, sent.detach(), 0.01, client.gain(4))
        assert torch.allclose(made[name][0], view, atol=1e-8), name
        again = rule.change(view, sent.detach(), 0.01, client.gain(4))
        assert torch.allclose(again, moved, atol=1e-12)


def test_the_simulated_client_is_the_replayed_one() -> None:
    images, labels = digits(*range(4))
    client = LocalTraining(loss="bce:reduction=sum", reply="gradient", mean=(0.3,), std=(0.2,))
    model = network().double()
    sent, _ = gradient(model, images.double(), labels, client)
    replay = Replay(model, SHAPE, client=client)
    made = replay(images.double().unsqueeze(0), labels.unsqueeze(0)).gradients
    chain = Chain.read(model, SHAPE, client)
    for name, g in sent.items():
        assert torch.allclose(made[name][0], g, atol=1e-12)
    alone, _ = gradient(model, images[:1].double(), labels[:1], client)
    traced = chain.trace(images[:1].double(), labels[:1]).gradients
    for name, g in alone.items():
        assert torch.allclose(traced[name][0], g, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "places"),
    [
        ("cross-entropy:label_smoothing=0.1", (0, 1, 2, 3)),
        (CrossEntropy(weight=WEIGHTS), (3, 4, 5, 6)),
        (CrossEntropy(weight=WEIGHTS), (0, 1, 7, 8)),
        (CrossEntropy(0.1, WEIGHTS, "sum"), (0, 1, 2, 3)),
        ("cross-entropy:reduction=sum", (0, 1, 2, 3)),
        ("bce", (0, 1, 2, 3)),
        ("bce:reduction=sum", (7,)),
        ("cross-entropy:label_smoothing=0.3", (5,)),
    ],
)
def test_declared_losses_leak_as_any(loss: str | Loss, places: tuple[int, ...]) -> None:
    result, found = leaked(network(), *digits(*places), LocalTraining(loss=loss, reply="gradient"))
    assert result.labels.sort().values.tolist() == sorted(places)
    assert min(found) > 135
    assert result.fit < 1e-6


@pytest.mark.parametrize(
    "client",
    [
        LocalTraining(reply="gradient", max_norm=0.1),  # of one step: a factor
        LocalTraining(0.1, 2, 2, max_norm=0.5),  # of several: replayed
    ],
    ids=str,
)
def test_steps_that_are_cut_to_a_norm(client: LocalTraining) -> None:
    assert client == LocalTraining(**client.to_dict())
    result, found = leaked(network(), *digits(0, 1, 2, 3), client)
    assert min(found) > 100
    assert result.fit < 1e-5


def test_the_gradient_of_a_client_has_its_norm() -> None:
    client = LocalTraining(reply="gradient", max_norm=0.1)
    whole, _ = gradient(network(), *digits(0, 1))
    cut, _ = gradient(network(), *digits(0, 1), client)
    norm = torch.cat([g.flatten() for g in whole.values()]).norm()
    assert norm > 0.2
    for name, g in whole.items():
        assert torch.allclose(cut[name], g * (0.1 / norm), rtol=1e-4)
    with pytest.raises(InvalidInputError, match="proximal_mu must be a number from 0, not -1"):
        LocalTraining(proximal_mu=-1)
    named = LocalTraining(proximal_mu="proximal-mu")
    assert named.at(2, {"proximal-mu": 0.5}).mu == 0.5
    with pytest.raises(InvalidInputError, match="'proximal-mu' of the server's message, which"):
        named.at(2, {"lr": 0.5})
    with pytest.raises(InvalidInputError, match="max_norm must be a number from 0, not -1"):
        LocalTraining(max_norm=-1)


@pytest.mark.parametrize("label", [0, 1])
def test_one_output(label: int) -> None:
    images, _ = digits(3)
    labels = torch.tensor([label])
    model = network(1)
    result, (found,) = leaked(model, images, labels, LocalTraining(loss="bce", reply="gradient"))
    assert found > 140
    assert result.labels.tolist() == [label]
    with pytest.raises(InvalidInputError, match=r"one output.*bce"):
        Replay(model, SHAPE)


def test_labels_of_confident_models_are_found_under_smoothing() -> None:
    """A probability above the smoothed target makes the label's entry positive."""
    images, labels = digits(4)
    model = network()
    with torch.no_grad():
        model[3].bias[4] += 8
    client = LocalTraining(loss="cross-entropy:label_smoothing=0.2", reply="gradient")
    sent, _ = gradient(model, images, labels, client)
    assert int(sent["3.bias"].argmin()) != 4
    result, (found,) = leaked(model, images, labels, client)
    assert result.labels.tolist() == [4]
    assert found > 130


@pytest.mark.parametrize("attack", ["linear", "hybrid"])
def test_an_undeclared_loss_is_not_put_into_an_exact_head(attack: str) -> None:
    """The softmax contradicts what the client smoothed: what was observed stays, and is named."""
    images, labels = digits(0)
    smoothed = LocalTraining(loss="cross-entropy:label_smoothing=0.1", reply="gradient")
    sent, _ = gradient(network(), images, labels, smoothed)
    (result,) = make_attack(attack)([Observation.from_gradient(network(), sent, SHAPE)])
    assert psnr(result, images, labels)[0] > 145
    assert result.fit < 1e-6
    assert "smooth" in str(result.details["notes"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("places", [(0,), (0, 1, 2, 3)])
def test_normalised_images_come_back_as_images(places: tuple[int, ...], bias: bool) -> None:
    if not bias and len(places) > 1:
        pytest.skip("a batch takes a head with a bias")
    client = LocalTraining(reply="gradient", mean=(0.5,), std=(0.5,))
    result, found = leaked(network(bias=bias), *digits(*places), client)
    assert min(found) > 140
    assert result.fit < 1e-6
    assert float(result.images.min()) > -1e-3
    assert float(result.images.max()) < 1.001
    assert result.details["by"] == "linear"  # still a chain


def test_a_normalisation_of_other_channels_is_refused() -> None:
    client = LocalTraining(reply="gradient", mean=(0.5, 0.4, 0.3), std=(0.2,))
    with pytest.raises(InvalidInputError, match=r"mean .* 3 channels, the images have 1"):
        Replay(network(), SHAPE, client=client)


def test_rows_of_images_that_clients_normalise() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    images, labels = digits(*range(4))
    client = LocalTraining(reply="gradient", mean=(0.4,), std=(0.3,))
    result, found = leaked(model, images, labels, client)
    assert result.details["by"] == "rows"
    assert min(found) > 100


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mode_of_normalisation_layers_is_declared(mode: str) -> None:
    """Whatever mode the server's model is in, and the client's is left as it was."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(216, 10)
    ).double()
    images, labels = digits(*range(4))
    client = LocalTraining(reply="gradient", norm=mode)  # type: ignore[arg-type]
    model.train(mode == "train")
    wanted, _ = gradient(copy.deepcopy(model), images.double(), labels)
    model.train(mode != "train")
    sent, _ = gradient(model, images.double(), labels, client)
    assert model[1].training == (mode != "train")
    made = Replay(model, SHAPE, client=client)(images.double()[None], labels[None]).gradients
    for name, g in wanted.items():
        assert torch.allclose(sent[name], g, atol=1e-12)
        assert torch.allclose(made[name][0], g, atol=1e-12)
    if mode == "eval":
        assert Chain.read(model, SHAPE, client).layers
    else:
        with pytest.raises(UnsupportedModelError, match="batch statistics"):
            Chain.read(model, SHAPE, client)


def trained_weights(client: LocalTraining, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model = network()
    train(model, [(images, labels)], client)
    return {n: p.detach() for n, p in model.named_parameters()}


def test_changes_of_weights() -> None:
    images, labels = digits(*range(4))
    model, client = network(), LocalTraining(0.1, 4, reply="change")
    new = trained_weights(client, images, labels)
    change = {n: new[n] - p.detach() for n, p in model.named_parameters()}
    (result,) = make_attack("hybrid")([Observation.from_weights(model, change, client, SHAPE)])
    assert min(psnr(result, images, labels)) > 125
    assert result.labels.tolist() == labels.tolist()


def test_adam_tells_sizes_where_they_are_small_and_signs_elsewhere() -> None:
    images, labels = digits(0)
    model, client = network(), LocalTraining(0.01, 1, optimiser="adam")
    new = trained_weights(client, images, labels)
    seen = Observation.from_weights(model, new, client, SHAPE)
    true, _ = gradient(copy.deepcopy(model).double(), images.double(), labels)
    for name, g in true.items():
        told = seen.errors[name].isfinite()
        off = (seen.gradient[name] - g)[told] / seen.errors[name][told]
        assert float(off.square().mean().sqrt() if off.numel() else 0.0) < 2, name
        large = ~told & (g.abs() > 1e-6)
        assert bool((seen.gradient[name].sign() == g.sign())[large].all())
    part = torch.cat([e.isfinite().flatten() for e in seen.errors.values()]).double().mean()
    assert 0.1 < float(part) < 0.5
    (result,) = make_attack("hybrid")([seen])
    (found,) = psnr(result, images, labels)
    assert found > 28
    assert result.labels.tolist() == [0]


def test_little_steps_of_adam_are_signs() -> None:
    images, labels = digits(0)
    client = LocalTraining(1e-5, 1, optimiser="adam")
    seen = Observation.from_weights(
        network(), trained_weights(client, images, labels), client, SHAPE
    )
    assert not seen.errors
    assert set(torch.cat([g.flatten() for g in seen.gradient.values()]).unique().tolist()) <= {
        -1.0, 0.0, 1.0,
    }  # fmt: skip
    (result,) = make_attack("hybrid")([seen])
    assert result.labels.tolist() == [0]
    assert psnr(result, images, labels)[0] > 10


def test_the_laboratory_takes_the_same_words() -> None:
    images, labels = digits(*range(4))
    client = LocalTraining(
        loss="cross-entropy:label_smoothing=0.1", mean=(0.5,), std=(0.5,), reply="gradient"
    )
    found = laboratory.reconstruct(network(), images, labels, batch_size=4, training=client)
    assert min(found.psnr_db) > 140


def test_rates_of_rounds() -> None:
    halved = LocalTraining([0.1, 0.05], 1)  # type: ignore[arg-type]
    assert [halved.at(r).rate for r in (1, 2, 3)] == [0.1, 0.05, 0.05]
    assert LocalTraining(lambda r: 0.1 / r).at(4).rate == 0.025
    assert LocalTraining("lr").at(1, {"lr": 0.3}).rate == 0.3
    with pytest.raises(InvalidInputError, match=r"'lr'.*holds momentum"):
        LocalTraining("lr").at(1, {"momentum": 0.3})
    with pytest.raises(InvalidInputError, match="depends on the round"):
        _ = halved.rate
    with pytest.raises(InvalidInputError, match="above 0"):
        LocalTraining((0.1, -1.0))


@pytest.mark.parametrize(
    "text",
    ["cross-entropy", "cross-entropy:label_smoothing=0.1,weight=1/1/5", "bce:reduction=sum"],
)
def test_losses_are_spelled_as_they_are_read(text: str) -> None:
    assert spell(LOSSES, parse(LOSSES, text)) == text


def test_what_cannot_be_read_is_named() -> None:
    assert spell(OPTIMISERS, parse(OPTIMISERS, "sgd:momentum=0.5,nesterov=true")) == (
        "sgd:momentum=0.5,nesterov=true"
    )
    with pytest.raises(UnknownNameError, match="cross-entropy"):
        parse(LOSSES, "cross-entrophy")
    with pytest.raises(UnknownNameError, match="label_smoothing"):
        parse(LOSSES, "cross-entropy:smoothing=0.1")
    with pytest.raises(InvalidInputError, match="'much' is not a number"):
        parse(LOSSES, "cross-entropy:label_smoothing=much")
    with pytest.raises(InvalidInputError, match=r"\[0, 1\)"):
        LocalTraining(loss="cross-entropy:label_smoothing=1")
    with pytest.raises(InvalidInputError, match="sgd:momentum"):
        LocalTraining(0.1, momentum=0.9, optimiser="adam")
    with pytest.raises(InvalidInputError, match="for a model with 10 outputs"):
        leaked(network(), *digits(0), LocalTraining(loss="cross-entropy:weight=1/2"))


def test_a_declaration_survives_a_file() -> None:
    client = LocalTraining(
        0.1, 4, 2, optimiser=Adam(eps=1e-6), loss=CrossEntropy(0.1), reply="change", mean=(0.5,),
        std=(0.25,),
    )  # fmt: skip
    assert LocalTraining(**client.to_dict()) == client
    plain = LocalTraining(0.1, 4, 2, 0.5, 0.01)
    assert set(plain.to_dict()) == {
        "learning_rate", "batch_size", "epochs", "momentum", "weight_decay",
    }  # fmt: skip


_PACKAGE = '''
from dataclasses import dataclass

import torch

from fedleak.client import Loss, Optimiser


@dataclass(frozen=True)
class Focal(Loss):
    """Focal loss (Lin et al. 2017): no probability minus a target."""

    gamma: float = 2.0

    def each(self, logits, labels):
        p = logits.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
        return -((1 - p) ** self.gamma) * p.log()


@dataclass(frozen=True)
class Damped(Optimiser):
    """Half a step of plain descent."""

    def step(self, weights, gradients, state, rate, number):
        return [w - rate / 2 * g for w, g in zip(weights, gradients)], []

    def moves(self, steps):
        return [0.5] * steps
'''


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a package of its own that names a loss and an optimiser."""
    (tmp_path / "clients_of_mine.py").write_text(_PACKAGE)
    described = tmp_path / "clients_of_mine-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: clients-of-mine\nVersion: 1.0\n"
    )
    (described / "entry_points.txt").write_text(
        "[fedleak.losses]\nfocal = clients_of_mine:Focal\n"
        "[fedleak.optimisers]\ndamped = clients_of_mine:Damped\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in (LOSSES, OPTIMISERS):
        monkeypatch.setattr(registry, "_points", None)
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("clients_of_mine", None)


@pytest.mark.usefixtures("foreign")
def test_a_foreign_loss_and_optimiser() -> None:
    images, labels = digits(*range(4))
    client = LocalTraining(0.1, 1, loss="focal:gamma=1.5", optimiser="damped")
    assert client.to_dict()["loss"] == "focal:gamma=1.5"
    model = network()
    new = trained_weights(client, images[:1], labels[:1])
    (result,) = make_attack("hybrid")([Observation.from_weights(model, new, client, SHAPE)])
    assert psnr(result, images[:1], labels[:1])[0] > 125  # one image: whatever the loss
    assert result.labels.tolist() == labels[:1].tolist()
    assert result.fit < 1e-3
    # Several are not told apart at the head, and their labels not counted: refused by its name.
    sent, _ = gradient(model, images, labels, client)
    seen = Observation.from_gradient(model, sent, SHAPE, 4, training=client)
    with pytest.raises(UnsupportedModelError, match=r"loss Focal.*grant them"):
        make_attack("hybrid")([seen])
    known = Observation.from_gradient(
        model, sent, SHAPE, 4, labels=labels.tolist(), training=client
    )
    (result,) = make_attack("hybrid", steps=20)([known])
    assert "under the loss Focal" in result.details["why_not_linear"]


def test_torch_has_the_last_word_on_smoothed_weights() -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([0, 2, 2])
    weight = (1.0, 2.0, 0.5, 3.0)
    found = CrossEntropy(0.1, weight).value(logits, labels)
    wanted = F.cross_entropy(logits, labels, torch.tensor(weight), label_smoothing=0.1)
    assert torch.equal(found, wanted)
