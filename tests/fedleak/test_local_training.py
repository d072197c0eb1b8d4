"""Local training on candidate images, against torch's own optimiser."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedleak import make_attack
from fedleak.attacks import HybridAttack
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.prior_matching import match
from fedleak.attacks.targets.base import ModuleTarget
from fedleak.attacks.targets.local_training import LocalTarget, Shuffles
from fedleak.client.local_replay import LocalReplay, typical_on_the_way
from fedleak.client.replay import Replay
from fedleak.client.training import LocalTraining
from fedleak.errors import InvalidInputError
from fedleak.models import conv_chain
from fedleak.observation import Observation
from fedleak.priors import GaussianPrior
from fedleak.quality import pair, score
from fedleak.threat import ThreatModel

SHAPE = (1, 8, 8)
#: Five images in batches of two: the last batch is smaller.
TRAININGS = [
    LocalTraining(0.2, 2, 1),
    LocalTraining(0.2, 2, 3, momentum=0.7, weight_decay=0.03),
    LocalTraining(0.1, 5, 4, momentum=0.9),
]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return conv_chain([(3, 3, 2, 0)], SHAPE, 10)


def _images(count: int) -> tuple[Tensor, Tensor]:
    """Return smooth images, as photographs are, and labels."""
    generator = torch.Generator().manual_seed(1)
    small = torch.rand(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (count,), generator=generator)
    return F.interpolate(small, (8, 8), mode="bilinear", align_corners=True), labels


def _orders(training: LocalTraining, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randperm(count, generator=generator).tolist() for _ in range(training.epochs)]


def _train(
    model: nn.Module, x: Tensor, y: Tensor, training: LocalTraining, orders: list[list[int]]
) -> nn.Module:
    """Train a copy by torch's own SGD."""
    own = copy.deepcopy(model).to(x.dtype)
    optimiser = torch.optim.SGD(
        own.parameters(), training.learning_rate, training.momentum,
        weight_decay=training.weight_decay,
    )  # fmt: skip
    for order in orders:
        for part in torch.tensor(order).split(training.batch_size):
            optimiser.zero_grad()
            F.cross_entropy(own(x[part]), y[part]).backward()
            optimiser.step()
    return own


def _plan(training: LocalTraining, orders: list[list[int]]) -> Tensor:
    """Return the shares of an order that is known, shape (1, 1, steps, images)."""
    rows = []
    for order in orders:
        for part in torch.tensor(order).split(training.batch_size):
            rows.append(torch.zeros(len(order), dtype=torch.float64))
            rows[-1][part] = 1 / len(part)
    return torch.stack(rows)[None, None]


def _observe(
    training: LocalTraining, count: int = 4, model: nn.Module | None = None, **threat: bool
) -> tuple[Observation, Tensor, Tensor]:
    x, y = _images(count)
    model = model or _model()
    sent = _train(model, x.float(), y, training, _orders(training, count)).state_dict()
    seen = Observation.from_weights(
        model, sent, training, SHAPE, count, y.tolist(), ThreatModel(labels=True, **threat)
    )
    return seen, x, y


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("known", [False, True])
def test_the_steps_are_those_of_torch(training: LocalTraining, known: bool) -> None:
    """In the order of the slots, and in any that is planned; for clients alone and summed."""
    model = _model().double()
    clients = [_images(10)[0][:5], _images(10)[0][5:]]
    y = _images(5)[1]
    orders = _orders(training, 5) if known else [list(range(5))] * training.epochs
    views = [
        Observation.from_weights(
            model, _train(model, x, y, training, orders).state_dict(), training, SHAPE, 5
        )
        for x in clients
    ]
    plan = _plan(training, orders).expand(2, -1, -1, -1) if known else None
    replay = Replay(model, SHAPE)
    labels = y.expand(2, -1)
    made = LocalReplay(replay, training)(torch.stack(clients), labels, plan).gradients
    summed = LocalReplay(replay, training, clients=2)(
        torch.cat(clients)[None], labels.reshape(1, 10), plan.transpose(0, 1) if known else None
    ).gradients
    for name, value in Observation.sum_of(views).gradient.items():
        each = torch.stack([v.gradient[name] for v in views])
        torch.testing.assert_close(made[name], each, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(summed[name][0], value, atol=1e-10, rtol=1e-10)


def test_derivatives_by_finite_differences() -> None:
    """With regard to images, soft labels and the plan, recomputed as in one piece."""
    training = LocalTraining(0.2, 2, 2, momentum=0.5, weight_decay=0.01)
    replay = Replay(_model(), SHAPE)
    x = _images(3)[0][None]
    soft = torch.randn(1, 3, 10, generator=torch.Generator().manual_seed(3)).double().softmax(2)
    plan = _plan(training, _orders(training, 3)) + 0.05
    for arguments in (
        (x, soft, plan),
        (x.expand(2, -1, -1, -1, -1).clone(), soft.expand(2, -1, -1)),
    ):
        given = [a.clone().requires_grad_() for a in arguments]
        slopes = []
        for recompute in (True, False):
            local = LocalReplay(replay, training, recompute=recompute)

            def value(local: LocalReplay = local, given: list[Tensor] = given) -> Tensor:
                return sum(g.sin().sum() for g in local(*given).gradients.values())  # type: ignore[return-value]

            slopes.append(torch.autograd.grad(value(), given))
        for a, b, tensor in zip(*slopes, given, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
            way = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4)).double()
            ends = []
            for sign in (1, -1):
                tensor.data += sign * 1e-5 * way
                ends.append(float(value().detach()))
                tensor.data -= sign * 1e-5 * way
            assert float((a * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_memory_does_not_hold_the_graph() -> None:
    """What is kept for the reverse pass: the weights of every step, and no activations."""
    training = LocalTraining(0.1, 2, 5)
    replay = Replay(_model(), SHAPE)
    x, y = _images(8)
    made = LocalReplay(replay, training)(x[None].requires_grad_(), y[None]).gradients
    found, queue, kept = set(), [made["fc.bias"].grad_fn], 0
    while queue:
        node = queue.pop()
        if node is None or node in found:
            continue
        found.add(node)
        kept += sum(t.numel() for t in getattr(node, "saved_tensors", ()))
        queue += [following for following, _ in node.next_functions]
    names = [node.name() for node in found]
    steps, weights = training.steps(8), sum(p.numel() for p in replay.parameters.values())
    assert sum("Recomputed" in name for name in names) == steps
    assert not any("Convolution" in name or "Tanh" in name for name in names)
    # Weights, and two images with their labels and shares.
    assert kept == steps * (weights + 2 * (64 + 2))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 3), st.integers(1, 2))
def test_shuffles_have_the_moments_of_permutations(
    batch: int, images: int, epochs: int, clients: int
) -> None:
    shuffles = Shuffles(LocalTraining(0.1, batch, epochs), images, clients)
    parts = -(-images // batch)
    assert shuffles.size == (clients * epochs * parts * images if parts > 1 else 0)
    if not shuffles.size:
        return
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2000, shuffles.size, generator=generator, dtype=torch.float64)
    plan = shuffles.plan(hidden)
    assert plan.shape == (2000, clients, epochs * parts, images)
    torch.testing.assert_close(plan.sum(3), torch.ones_like(plan.sum(3)))
    shares = plan.reshape(2000, clients, epochs, parts, images) * shuffles.sizes[:, None]
    torch.testing.assert_close(shares.sum(3), torch.ones_like(shares.sum(3)))
    if images % batch == 0:  # equal batches: the spread is that of a permutation
        p = batch / images
        assert float(shares.var()) == pytest.approx(p * (1 - p), rel=0.1)


def test_pace() -> None:
    assert LocalTraining(0.1).pace(1) == [(1.0, 0.0)]
    plain = LocalTraining(0.1, 2, 2).pace(4)
    assert plain == [(0.25, 0.0), (0.25, 0.25), (0.25, 0.5), (0.25, 0.75)]
    heavy = LocalTraining(0.1, 2, 2, momentum=0.5).pace(4)
    assert sum(part for part, _ in heavy) == pytest.approx(1)
    assert heavy[0][0] > heavy[-1][0]
    assert heavy[1][1] < 0.25


def test_labels_are_counted_on_the_way() -> None:
    """Probabilities change while the clients train: those at the start count wrongly."""
    training = LocalTraining(0.3, 4, 6)
    known, _, y = _observe(training, 12)
    replay = Replay(known.model, SHAPE)
    grey = torch.linspace(0, 1, 9, dtype=torch.float64).reshape(-1, 1, 1, 1).expand(-1, *SHAPE)
    stacked = {k: g[None] for k, g in known.gradient.items()}
    typical = typical_on_the_way(replay, stacked, training, 12, grey)
    assert typical.shape == (1, 10)
    assert float(typical.sum()) == pytest.approx(1)
    seen = known.with_terms(labels=None, threat=ThreatModel())
    right = y.bincount(minlength=10)

    def wrong(observation: Observation) -> int:
        labels = Evidence.gather([observation], "cpu").labels[0]
        return int((labels.bincount(minlength=10) - right).abs().sum())

    assert wrong(seen) < wrong(seen.with_terms(training=None))


def test_the_order_is_found_with_the_images() -> None:
    """Better than one step, and than a guessed order; the truth costs nothing."""
    training = LocalTraining(0.5, 2, 2)
    seen, x, _ = _observe(training)
    blind = seen.with_terms(labels=None, threat=ThreatModel())
    found = {}
    for name, attack in (
        ("order", HybridAttack(steps=150)),
        ("one step", HybridAttack(steps=150, local_training=False)),
    ):
        (result,) = attack([blind])
        assert result.details["solver"] == "l-bfgs"
        found[name] = sum(score(result.images[i], x[j]).psnr_db for i, j in pair(result.images, x))
        if name == "order":
            assert "several local steps" in result.details["why_not_linear"]
            assert result.fit < 0.1
    evidence = Evidence.gather([blind], "cpu", simulate=True)
    target = LocalTarget(evidence)
    target.hidden = 0
    prior = GaussianPrior(SHAPE)
    guessed = match(target, prior, prior.mean.expand(1, 4, *SHAPE), 4, 150, 1e-3).images[0]
    found["guessed"] = sum(score(guessed[i], x[j]).psnr_db for i, j in pair(guessed, x))
    assert found["order"] > max(found["one step"], found["guessed"]) + 4


def test_one_image_and_many_epochs() -> None:
    """One image has no order; its steps are simulated, by Gauss-Newton."""
    seen, x, _ = _observe(LocalTraining(0.3, 1, 5, momentum=0.5), 1)
    quality = []
    for local in (True, False):
        (result,) = HybridAttack(local_training=local)([seen])
        quality.append(score(result.images[0], x[0]).psnr_db)
        if local:
            assert result.details["solver"] == "gauss-newton"
            assert result.fit < 1e-3
    assert quality[0] > quality[1] + 10


def test_observations_together_and_alone() -> None:
    training = LocalTraining(0.5, 2, 2)
    first, second = _observe(training)[0], _observe(replace(training, weight_decay=0.0))[0]
    second = replace(
        second, model=first.model, gradient={k: 0.9 * g for k, g in second.gradient.items()}
    )
    attack = HybridAttack(steps=25)
    together = attack([first, second])
    for k, one in enumerate((first, second)):
        (alone,) = attack([one])
        torch.testing.assert_close(alone.images, together[k].images, atol=1e-3, rtol=0)


def test_cosine_simulates_the_steps() -> None:
    """At the truth in the guessed order its distance is nothing, unlike that of one step."""
    training = LocalTraining(0.5, 2, 2)
    x, y = _images(4)
    x, y = x[y.argsort()], y.sort().values
    model = _model()
    sent = _train(model, x.float(), y, training, [[0, 1, 2, 3]] * 2).state_dict()
    seen = Observation.from_weights(
        model, sent, training, SHAPE, 4, y.tolist(), ThreatModel(labels=True)
    )
    for local in (True, False):
        evidence = Evidence.gather([seen], "cpu", simulate=local)
        fit = float(evidence.fit(x[None]))
        assert (fit < 1e-4) == local
    results = [
        make_attack("cosine", steps=15, local_training=local)([seen])[0] for local in (True, False)
    ]
    assert not torch.equal(results[0].images, results[1].images)
    for attack in ("cosine", "hybrid"):
        with pytest.raises(InvalidInputError, match="local_training must be true or false"):
            make_attack(attack, local_training="yes")


def test_labels_of_a_sum_are_spread_over_its_clients() -> None:
    """Which client had which label is not known: not the first one all the small ones."""
    seen = _observe(LocalTraining(0.1, 2))[0]
    bias = seen.gradient["fc.bias"]
    counts = torch.tensor([2, 0, 1, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    seen.gradient["fc.bias"] = Replay(_model(), SHAPE).model(_images(9)[0]).softmax(1).mean(0)
    seen.gradient["fc.bias"] = (seen.gradient["fc.bias"] - counts / 4).detach().to(bias)
    many = ThreatModel(view="sum")
    training = LocalTraining(1e-9, 2, 2)
    summed = seen.with_terms(labels=None, clients=2, training=training, threat=many)
    assert Evidence.gather([summed], "cpu").labels.tolist() == [[0, 2, 0, 3]]
    (result,) = HybridAttack(steps=5)([summed])
    assert result.images.shape == (4, *SHAPE)


def test_what_cosine_needs() -> None:
    several = _observe(LocalTraining(0.5, 2, 2))[0]
    one = _observe(LocalTraining(0.5, 4))[0]
    counted = one.with_terms(labels=None, threat=ThreatModel())
    attack = make_attack("cosine")
    everything = {"batch_size", "learning_rate", "local_steps"}
    assert attack.needs(several) == attack.needs(counted) == everything
    assert attack.needs(one) == {"batch_size"}
    assert make_attack("cosine", local_training=False).needs(several) == {"batch_size"}


def _normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4, momentum=0.3), nn.Tanh(), nn.Flatten(),
        nn.Linear(36, 10),
    ).train()  # fmt: skip


@pytest.mark.parametrize("momentum", [0.3, None])
def test_statistics_of_the_batch(momentum: float | None) -> None:
    """They are taken apart exactly, only with leave, and only after one step."""
    model = _normalised()
    model[1].momentum = momentum  # type: ignore[index]
    one, x, _ = _observe(LocalTraining(0.2, 4), 4, model, buffers=True)
    evidence = Evidence.gather([one], "cpu")
    truth = model.double()[0](x)  # type: ignore[index]
    model.float()
    mean, var = evidence.statistics.values()
    torch.testing.assert_close(mean[0], truth.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        var[0], truth.transpose(0, 1).flatten(1).var(1), atol=1e-5, rtol=1e-4
    )
    # A bias before the normalisation has no influence: its gradient is rounding.
    evidence.gradient["0.bias"].zero_()
    target = ModuleTarget(evidence)
    torch.testing.assert_close(target.made(x[None]), target.values, atol=1e-3, rtol=1e-3)
    two = torch.cat([x[None], x[None].flip(4)])
    pairs = Evidence.gather([one, one], "cpu")
    assert ModuleTarget(pairs).made(two).shape == ModuleTarget(pairs).values.shape
    forbidden = Evidence.gather([_observe(LocalTraining(0.2, 4), 4, model)[0]], "cpu")
    assert not forbidden.statistics
    several = _observe(LocalTraining(0.2, 2), 4, model, buffers=True)[0]
    assert several.buffers
    assert not Evidence.gather([several], "cpu").statistics


def test_statistics_of_the_batch_help() -> None:
    """Brightness and contrast, which normalisation takes out of the gradient, are in them."""
    quality = []
    for allowed in (True, False):
        seen, x, _ = _observe(LocalTraining(0.2, 4), 4, _normalised(), buffers=allowed)
        (result,) = HybridAttack(steps=150)([seen])
        pairs = pair(result.images, x)
        quality.append(sum(score(result.images[i], x[j]).psnr_db for i, j in pairs) / 4)
    assert quality[0] > quality[1] + 0.5


def test_batch_normalisation_through_several_steps() -> None:
    """Images of a batch influence each other: the guessed order is taken."""
    seen, x, _ = _observe(LocalTraining(0.2, 2, 2), 4, _normalised())
    evidence = Evidence.gather([seen], "cpu", simulate=True)
    assert LocalTarget(evidence).hidden == 0
    (result,) = HybridAttack(steps=20)([seen])
    assert result.images.shape == x.shape
    assert bool(result.images.isfinite().all())
