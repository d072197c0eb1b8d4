"""What an update shows that is not as declared is seen, said, and used where it is modelled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak import LocalTraining, Observation, Reconstruction, make_attack, parse_defence
from fedleak.attacks import run_attack
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.head.account import account
from fedleak.attacks.head.batch import Demixed
from fedleak.attacks.suspicions.unexplained import doubted
from fedleak.client import train
from fedleak.data import load_data
from fedleak.defences import defend
from fedleak.errors import InvalidInputError
from fedleak.models import build_model
from fedleak.quality import score_batch
from fedleak.wording import EXPLAINED

SHAPE = (1, 8, 8)
Loss = Callable[[Tensor, Tensor], Tensor]


def digits(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    return load_data("digits")[0].batch(range(start, start + count))


def net(classes: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, classes)
    )  # fmt: skip


def gradient(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy
) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(model(x), y), parameters), strict=True))


def times(factor: float, sent: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: factor * g for k, g in sent.items()}


def attack(
    model: nn.Module, sent: dict[str, Tensor], images: int = 1, name: str = "linear"
) -> Reconstruction:
    seen = Observation.from_gradient(model, sent, SHAPE, images)
    (outcome,) = run_attack(make_attack(name), [seen])
    assert outcome.reconstruction is not None, outcome.reason
    return outcome.reconstruction


def judged(result: Reconstruction, seen: Observation) -> Reconstruction:
    return doubted([result], [seen])[0]


def worst(result: Reconstruction, x: Tensor, y: Tensor) -> float:
    found = score_batch(result.images, result.labels, x, y)
    return min(0.0 if f.quality is None else f.quality.psnr_db for f in found)


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("factor", [0.05, 0.5, 4.0, -0.1])
def test_a_factor_is_found_and_used(factor: float, images: int) -> None:
    model, (x, y) = net(), digits(images)
    result = attack(model, times(factor, gradient(model, x, y)), images)
    assert result.details["factor"] == pytest.approx(factor, rel=1e-5)
    assert result.fit < 1e-5
    assert result.status == "ok"
    assert worst(result, x, y) > 100
    assert sorted(result.labels.tolist()) == sorted(y.tolist())
    (note,) = result.details["notes"]
    assert ("minus a gradient" in note) == (factor < 0)


@pytest.mark.parametrize("images", [1, 4])
def test_nothing_is_said_of_what_is_as_declared(images: int) -> None:
    model, (x, y) = net(), digits(images)
    result = attack(model, gradient(model, x, y), images)
    assert not {"factor", "notes"} & set(result.details)
    assert result.doubts == ()
    assert worst(result, x, y) > 120


@pytest.mark.parametrize("images", [1, 4])
def test_a_schedule_of_the_learning_rate(images: int) -> None:
    model, (x, y) = net(), digits(images)
    step = {k: -0.025 * g for k, g in gradient(model, x, y).items()}
    weights = {k: v + step[k] for k, v in model.state_dict().items()}
    seen = Observation.from_weights(model, weights, LocalTraining(0.1, images), SHAPE, images)
    (result,) = make_attack("linear")([seen])
    assert result.details["factor"] == pytest.approx(0.25, rel=1e-4)
    assert worst(result, x, y) > 100


def test_clipping_of_a_batch_is_one_number() -> None:
    model, (x, y) = net(), digits(4)
    clean, spec = gradient(model, x, y), parse_defence("clip:0.1")
    norm = float(sum(g.square().sum() for g in clean.values()) ** 0.5)
    seen = Observation.from_gradient(model, defend(clean, spec, 0), SHAPE, 4, defence=spec)
    (result,) = make_attack("hybrid")([seen])
    assert result.details["factor"] == pytest.approx(0.1 / norm, rel=1e-4)
    assert worst(result, x, y) > 100
    assert result.fit < 1e-5
    assert "notes" not in result.details  # nothing that was not declared


@pytest.mark.parametrize("declared", ["gradient", "weights"])
def test_changes_of_weights(declared: str) -> None:
    model, (x, y) = net(), digits(1)
    change = times(-0.1, gradient(model, x, y))
    if declared == "gradient":
        seen = Observation.from_gradient(model, change, SHAPE)
    else:
        seen = Observation.from_weights(model, change, LocalTraining(0.1), SHAPE)
    (result,) = make_attack("linear")([seen])
    assert worst(result, x, y) > 100
    assert result.labels.tolist() == y.tolist()
    assert result.fit < 1e-5
    assert result.details["notes"]


def test_weights_where_a_gradient_was_declared() -> None:
    model, (x, y) = net(), digits(1)
    change = times(-0.1, gradient(model, x, y))
    result = attack(model, {k: v + change[k] for k, v in model.state_dict().items()})
    assert worst(result, x, y) > 100
    assert "weights came" in " ".join(result.details["notes"])


@pytest.mark.parametrize("images", [1, 4])
def test_label_smoothing(images: int) -> None:
    model, (x, y) = net(), digits(images)
    sent = gradient(model, x, y, lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1))
    result = attack(model, sent, images)
    assert worst(result, x, y) > 100
    assert "smoothing" in " ".join(result.details["notes"])


def test_binary_cross_entropy_of_several_outputs() -> None:
    model, (x, y) = net(), digits(1)
    sent = gradient(
        model, x, y,
        lambda z, t: F.binary_cross_entropy_with_logits(z, F.one_hot(t, 10).float()),
    )  # fmt: skip
    result = attack(model, sent)
    assert worst(result, x, y) > 100
    assert "binary cross-entropy" in " ".join(result.details["notes"])


def test_one_output_is_no_softmax() -> None:
    model, (x, y) = net(1), digits(1)
    sent = gradient(
        model, x, y, lambda z, t: F.binary_cross_entropy_with_logits(z[:, 0], t.float())
    )
    with pytest.raises(InvalidInputError, match=r"one output.*loss='bce'"):
        Observation.from_gradient(model, sent, SHAPE)


@pytest.mark.parametrize(
    ("places", "weights"),
    [
        ((3, 4, 5, 6), [1.0] * 5 + [5.0] * 5),
        ((0, 7, 8, 1), [1.0] * 5 + [5.0] * 5),
        ((3, 13, 5), [0.3, 1.0, 2.0, 0.7, 1.5] * 2),  # two threes
    ],
)
def test_class_weights_of_a_batch_are_found(places: tuple[int, ...], weights: list[float]) -> None:
    """They were a doubt, with labels wrong and images of 7 to 11 dB."""
    model = net()
    x, y = load_data("digits")[0].batch(places)

    def weighted(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, weight=torch.tensor(weights))

    result = attack(model, gradient(model, x, y, weighted), len(x))
    assert sorted(result.labels.tolist()) == sorted(y.tolist())
    assert worst(result, x, y) > 80
    assert result.status == "ok"
    (note,) = result.details["notes"]
    assert "class weights" in note


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda z, t: F.cross_entropy(z, 0.7 * F.one_hot(t, 10) + 0.3 * F.one_hot(t + 1, 10)),
         "a mixture"),
        (lambda z, t: F.mse_loss(z, F.one_hot(t, 10).float()), "do not sum to zero"),
    ],
    ids=["two labels", "squares"],
)  # fmt: skip
def test_a_loss_that_is_not_modelled_is_a_doubt(loss: Loss, words: str) -> None:
    model, (x, y) = net(), digits(1)
    result = attack(model, gradient(model, x, y, loss))
    assert result.status == "doubtful"
    assert words in " ".join(result.doubts)


@pytest.mark.parametrize("images", [1, 4])
def test_entries_of_one_size_are_no_gradient(images: int) -> None:
    model, (x, y) = net(), digits(images)
    sent = {k: 1e-3 * g / (g.abs() + 1e-8) for k, g in gradient(model, x, y).items()}
    seen = Observation.from_gradient(model, sent, SHAPE, images)
    (outcome,) = run_attack(make_attack("hybrid", steps=5), [seen])
    assert outcome.reconstruction is not None
    assert outcome.reconstruction.status == "doubtful"
    assert "Adam" in outcome.reason


@pytest.mark.parametrize(("declared", "true"), [(8, 7), (8, 6), (3, 4)])
def test_another_number_of_images(declared: int, true: int) -> None:
    model, (x, y) = net(), digits(true)
    result = attack(model, gradient(model, x, y), declared)
    assert len(result.images) == true
    assert worst(result, x, y) > 100
    assert f"{true} images; {declared} were declared" in " ".join(result.details["notes"])


def test_the_same_image_twice_is_said() -> None:
    model, (x, y) = net(), digits(3)
    x, y = torch.cat([x, x[:1]]), torch.cat([y, y[:1]])
    seen = Observation.from_gradient(model, gradient(model, x, y), SHAPE, 4)
    (outcome,) = run_attack(make_attack("hybrid", steps=20), [seen])
    assert outcome.reconstruction is not None
    assert outcome.reconstruction.status == "doubtful"
    assert "some of which are alike" in outcome.reason


@pytest.mark.parametrize("shared", ["gradient", "weights"])
def test_far_more_images_were_declared_than_there_are(shared: str) -> None:
    """More than the head tells apart: the rank of its gradient says what there is."""
    model, many = net(), 40
    for true in (1, 4, many):
        sent = gradient(model, *digits(true))
        local = LocalTraining(0.1, batch_size=many)
        if shared == "gradient":
            seen = Observation.from_gradient(model, sent, SHAPE, many)
        else:
            weights = {k: p.detach() - 0.1 * sent[k] for k, p in model.named_parameters()}
            seen = Observation.from_weights(model, weights, local, SHAPE)
        (outcome,) = run_attack(make_attack("hybrid", steps=2), [seen])
        assert outcome.reconstruction is not None, outcome.reason
        doubts = outcome.reconstruction.doubts
        assert outcome.reconstruction.status == "doubtful"  # two steps explain nothing
        said = f"rank {true}, and that of {many} images 9" in doubts[0]
        assert said == (true != many)


def test_noise_is_no_suspicion() -> None:
    """Of a server that does not know of it: nothing is said of the loss."""
    model, (x, y) = net(), digits(1)
    for defence in ("noise:0.1", "noise:0.0001", "prune:0.5", "quantise:8"):
        result = attack(model, defend(gradient(model, x, y), parse_defence(defence), 0))
        assert "factor" not in result.details
        assert all("explain" in doubt for doubt in result.doubts)
        # What noise adds is not explained, and that is said.
        assert (result.status == "ok") == (result.fit < EXPLAINED)
    assert result.status == "ok"


def test_images_that_do_not_explain_the_update_are_doubtful() -> None:
    """Of any attack: ``ok`` is for images that explain it, however they were found."""
    model, (x, y) = net(), digits(4)
    for of, expected in (
        (make_attack("cosine", steps=1), "doubtful"),
        (make_attack("linear"), "ok"),
    ):
        seen = Observation.from_gradient(model, gradient(model, x[:1], y[:1]), SHAPE)
        (result,) = of([seen])
        assert (result.fit < EXPLAINED) == (expected == "ok")
        assert result.status == expected
    explained = "fit of 0.1 or more", "fit of 0.5 or more"
    images, labels = torch.zeros(1, *SHAPE), torch.zeros(1).long()
    seen = Observation.from_gradient(model, gradient(model, x[:1], y[:1]), SHAPE)
    for fit, said in ((9e-4, ""), (0.1, explained[0]), (0.5, explained[1]), (7.0, explained[1])):
        made = judged(Reconstruction(images, labels, fit), seen)
        assert said in " ".join(made.doubts)
        assert made.status == ("doubtful" if said else "ok")
    proved = Reconstruction(images, labels, 0.7, {"certified": [True]})
    assert judged(proved, seen).status == "ok"
    part = replace(proved, details={"certified": [True, False]})
    assert judged(part, seen).status == "doubtful"


def test_images_that_the_update_hardly_determines_are_doubtful() -> None:
    """A head of zeros sends nothing below it: many images explain the little that there is."""
    (x, y), model = digits(1), nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Linear(20, 10))
    for zero in (False, True):
        if zero:
            nn.init.zeros_(model[2].weight)
            x = x.repeat(1, 1, 3, 3)
            model[1] = nn.Linear(64 * 9, 20)
        sent = gradient(model, x, y)
        seen = Observation.from_gradient(model, sent, tuple(x.shape[1:]))
        (result,) = make_attack("hybrid")([seen])
        assert result.fit < 1e-3
        assert result.status == ("doubtful" if zero else "ok")
    assert "210 entries of the update say anything, of 576 unknowns" in result.doubts[0]


@pytest.mark.slow
def test_a_certificate_needs_as_many_values_as_pixels() -> None:
    """A frozen first layer with a stride tells 18 values of an image of 64 pixels."""
    (x, y) = digits(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 10)
    )  # fmt: skip
    model[0].requires_grad_(False)
    names = ["3.weight", "3.bias"]
    sent = torch.autograd.grad(F.cross_entropy(model(x), y), [model[3].weight, model[3].bias])
    seen = Observation.from_gradient(model, dict(zip(names, sent, strict=True)), SHAPE)
    (result,) = make_attack("hybrid", steps=5)([seen])
    # The graph knows that it leaves others, and the match under the prior is preferred to it.
    assert not result.details.get("certified", False)
    assert not any("normalise" in doubt for doubt in result.doubts)


@pytest.mark.parametrize("name", ["linear", "hybrid"])
@pytest.mark.parametrize("images", [1, 4])
def test_images_that_clients_normalise_come_back_as_pixels(images: int, name: str) -> None:
    x, y = digits(images)
    model = net()
    result = attack(model, gradient(model, (x - 0.5) / 0.5, y), images, name)
    assert result.status == "ok"
    assert any("mean 0.5 and std 0.5" in note for note in result.details["notes"])
    assert worst(result, x, y) > 60


@pytest.mark.parametrize(
    ("mean", "std", "found"),
    [
        ((0.1307,), (0.3081,), "MNIST"),
        ((0.0,), (1 / 255,), "0 to 255"),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "ImageNet"),
        ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "0.247/"),
        ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "0.2023/"),
        ((0.3, 0.4, 0.5), (0.3, 0.2, 0.4), ""),
        ((0.4,), (0.6,), ""),
        ((0.5,), (0.3,), ""),
    ],
)
def test_only_standard_normalisations_that_make_pixels_are_undone(
    mean: tuple[float, ...], std: tuple[float, ...], found: str
) -> None:
    shape = (len(mean), 8, 8)
    x = torch.randint(20, 230, (1, *shape), generator=torch.Generator().manual_seed(0)) / 255
    offset, factor = (torch.tensor(v).reshape(-1, 1, 1) for v in (mean, std))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64 * len(mean), 10)).double()
    normalised = ((x - offset) / factor).double()
    sent = gradient(model, normalised, torch.tensor([3]))
    seen = Observation.from_gradient(model, sent, shape, 1)
    (result,) = make_attack("linear")([seen])
    if found:
        (note,) = result.details["notes"]
        assert found in note
        assert result.status == "ok"
        assert (result.images - x).abs().max() < 1e-4
    else:
        (doubt,) = result.doubts
        assert "declare mean and std" in doubt
        assert result.status == "doubtful"
        assert (result.images - normalised).abs().max() < 1e-4


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.1307, 0.3081)])
def test_pixels_out_of_any_picture_are_doubted_under_a_known_defence_too(
    mean: float, std: float
) -> None:
    """They were `ok` at 15 dB, as the images of clients whose normalisation nobody declared."""
    (x, y), model, noise = digits(1), net(), parse_defence("noise:0.1")
    z = (x - mean) / std
    own = {k: g.double() for k, g in gradient(model, z, y).items()}
    sent = defend(own, noise, 0)
    for told in (None, LocalTraining(mean=(mean,), std=(std,), reply="gradient")):
        seen = Observation.from_gradient(model, sent, SHAPE, training=told, defence=noise)
        (result,) = make_attack("linear")([seen])
        assert result.status == ("ok" if told else "doubtful")
        if not told:
            assert "mean, std" in result.doubts[0]


def test_what_a_known_pruning_leaves_of_the_head_says_nothing_of_the_number_of_images() -> None:
    (x, y), model, prune = digits(4), net(), parse_defence("prune:0.9")
    own = {k: g.double() for k, g in gradient(model, x, y).items()}
    sent = defend(own, prune, 0)
    seen = Observation.from_gradient(model, sent, SHAPE, 4, defence=prune)
    found = Demixed(*([torch.zeros(4)] * 4), misfit=1e9, ratio=0.1, noise=0.0)
    for rank in (0, 3):
        evidence, _ = account(Evidence.gather([seen], "cpu"), replace(found, rank=rank))
        assert "known to say nothing" in evidence.seen[0].doubts[0]


def test_images_that_the_update_leaves_open_say_nothing_of_normalisation() -> None:
    x, y = digits(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 10)
    )  # fmt: skip
    result = attack(model, gradient(model, x, y))
    assert result.status == "ok"
    assert "notes" not in result.details


def test_a_batch_that_one_output_mixes_is_doubtful() -> None:
    """Four images at a fit of 0.08, and 7 to 10 dB: nothing tells them apart."""
    model, (x, _) = net(1), digits(4)

    def binary(z: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z[:, 0], y.float())

    seen = Observation.from_gradient(
        model,
        gradient(model, x, torch.tensor([0, 0, 1, 1]), binary),
        SHAPE, 4, training=LocalTraining(loss="bce", reply="gradient"),
    )  # fmt: skip
    images, labels = x.double(), torch.tensor([0, 0, 1, 1])
    assert "one output mixes" in judged(Reconstruction(images, labels, 0.08), seen).doubts[0]
    assert judged(Reconstruction(images, labels, 1e-6), seen).status == "ok"


@pytest.mark.parametrize(("name", "mean", "std"), [("cnn2-v2", 0.3, 0.2), ("cnn3-v2", 0.5, 0.25)])
def test_pixels_far_out_are_doubted_also_where_much_is_open(
    name: str, mean: float, std: float
) -> None:
    """The prior fills in what such networks do not tell; the unit shows all the same."""
    x, y = digits(1)
    large = F.interpolate(x, size=16)
    model = build_model(name, (1, 16, 16), 10, 0)
    sent = gradient(model, (large - mean) / std, y)
    (result,) = make_attack("hybrid")([Observation.from_gradient(model, sent, (1, 16, 16))])
    assert result.status == "doubtful"
    assert result.doubts


@pytest.mark.parametrize(
    ("defence", "said"),
    [
        ("sign:1", "only the signs"),
        ("quantise:2", "fewer than 20 dB"),
        ("dp:clip=1,noise=0.05", "fewer than 20 dB"),
        ("noise:0.1", ""),
        ("clip:0.1", ""),
        ("prune:0.9", ""),
    ],
)
def test_what_a_known_defence_leaves_open_is_doubtful(defence: str, said: str) -> None:
    """However well images fit: at a fit of 0, signs have left 9 dB of them."""
    model, (x, y), spec = net(), digits(1), parse_defence(defence)
    sent = defend(gradient(model, x, y), spec, 0)
    seen = Observation.from_gradient(model, sent, SHAPE, defence=spec)
    result = judged(Reconstruction(x, y, 0.0), seen)
    assert result.status == ("doubtful" if said else "ok")
    assert said in "".join(result.doubts)


def test_several_steps_of_adam_are_doubtful() -> None:
    """They are matched by their signs."""
    model, (x, y) = net(), digits(2)
    steps = LocalTraining(1e-3, 1, optimiser="adam")
    trained = copy.deepcopy(model)
    train(trained, [(x[:1], y[:1]), (x[1:], y[1:])], steps)
    seen = Observation.from_weights(model, trained.state_dict(), steps, SHAPE, num_images=2)
    assert "only the signs" in judged(Reconstruction(x, y, 0.0), seen).doubts[0]


def test_images_that_explain_an_update_roughly_may_be_others() -> None:
    """A few channels that are averaged: at a fit of 0.03, 8 to 12 dB; noise elsewhere, 40 dB."""
    torch.manual_seed(0)
    few = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip
    (x, y), spec = digits(1), parse_defence("noise:0.03")
    for model, said in ((few, "as far as they do others"), (net(), "")):
        seen = Observation.from_gradient(model, defend(gradient(model, x, y), spec, 0), SHAPE)
        result = judged(Reconstruction(x, y, 0.03), seen)
        assert said in "".join(result.doubts)
        assert bool(said) == bool(result.doubts)


def test_a_weight_that_is_computed_is_no_first_layer() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 6, 3)), nn.Tanh(), nn.Flatten(),
        nn.Linear(216, 10),
    )  # fmt: skip
    sent = gradient(model, *digits(1))
    seen = Observation.from_gradient(model, sent, SHAPE, batch_size=5)
    (outcome,) = run_attack(make_attack("hybrid", steps=1), [seen], seconds=1)
    assert "Error" not in outcome.reason


def test_layers_solved_at_a_wrong_scale_are_doubtful() -> None:
    """Of a head without bias: an image half as bright, at a fit of 0.013 of a clean update."""
    model, (x, y) = net(), digits(1)
    seen = Observation.from_gradient(model, gradient(model, x, y), SHAPE)
    for noise, said in ((5e-8, "cleaner"), (1e-2, "")):
        result = judged(Reconstruction(x, y, 0.013, {"noise": noise}), seen)
        assert said in "".join(result.doubts)
        assert bool(said) == bool(result.doubts)
