"""Joint matching: any module, batches, deficient chains, and what the prior is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedleak.attacks import HybridAttack, LinearAttack, Reconstruction
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.head.labels import infer_labels, labels_with_rest
from fedleak.attacks.linear import solve_recursively
from fedleak.attacks.prior_matching import match
from fedleak.attacks.targets.base import ChainTarget, ModuleTarget
from fedleak.defences import DefenceSpec, defend
from fedleak.errors import UnsupportedModelError
from fedleak.models import conv_chain
from fedleak.observation import Observation
from fedleak.priors import GaussianPrior, TotalVariationPrior
from fedleak.quality import pair, score
from fedleak.solvers import jacobian
from fedleak.threat import ThreatModel

Observe = Callable[[nn.Module, Tensor, int], Observation]
SHAPE = (1, 8, 8)


class Residual(nn.Module):
    """No chain: a branch is added back."""

    def __init__(self, filters: int = 2, stride: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, filters, 3, stride, padding=1)
        self.branch = nn.Conv2d(filters, filters, 3, padding=1)
        self.head = nn.Linear(filters * (8 // stride) ** 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.head((h + self.branch(h).tanh()).flatten(1))


@pytest.fixture
def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


@pytest.fixture
def deficient() -> nn.Module:
    """The second convolution leaves its 216 inputs undetermined."""
    torch.manual_seed(1)
    return conv_chain([(6, 3, 1, 0), (2, 3, 2, 0)], SHAPE)


def _smooth(count: int) -> Tensor:
    """Return images of slow waves, shape (count, 1, 8, 8)."""
    line = torch.linspace(0, 1, 8)
    y, x = line[:, None], line[None, :]
    waves = [
        0.5 + 0.3 * torch.sin(3 * x + (1 + k) * y + k) * torch.cos(k * x) for k in range(count)
    ]
    return torch.stack(waves).unsqueeze(1)


def _psnr(result: Reconstruction, truth: Tensor) -> float:
    return score(result.images[0], truth).psnr_db


def _batch(model: nn.Module, images: Tensor, labels: list[int]) -> Observation:
    loss = F.cross_entropy(model(images), torch.tensor(labels))
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradient = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    return Observation.from_gradient(model, gradient, SHAPE, batch_size=len(images))


@pytest.mark.slow
def test_a_model_that_is_no_chain(residual: nn.Module, observe: Observe) -> None:
    """One update and several: each alone is what it is together, and nearly the truth."""
    images = _smooth(2)
    seen = [observe(residual, x, k) for k, x in enumerate(images)]
    together = HybridAttack()(seen)
    grey = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    for k, result in enumerate(together):
        (alone,) = HybridAttack()([seen[k]])
        torch.testing.assert_close(result.images, alone.images, atol=1e-5, rtol=0)
        assert result.details["by"] == "matching"
        assert result.details["solver"] == "gauss-newton"
        assert "add" in result.details["why_not_linear"]
        assert int(result.labels) == k
        assert _psnr(result, images[k]) > 35
        evidence = Evidence.gather([seen[k]], "cpu")
        assert result.fit < 1e-3 < float(evidence.fit(grey))
        assert result.fit == pytest.approx(float(evidence.fit(result.images)))
        assert not result.images.requires_grad


@pytest.mark.parametrize("steps", [1, 30])
def test_never_a_worse_fit_than_the_mean(residual: nn.Module, steps: int) -> None:
    """However short the search, and with labels that are wrong."""
    images = _smooth(2)
    seen = _batch(residual, images, [4, 1])
    wrong = seen.with_terms(labels=(0, 9), threat=ThreatModel(labels=True))
    grey = torch.full((1, 2, *SHAPE), 0.5, dtype=torch.float64)
    for one in (seen, wrong):
        (result,) = HybridAttack(steps=steps)([one])
        worst = float(Evidence.gather([one], "cpu").fit(grey))
        assert result.fit <= worst * (1 + 1e-9)
        assert bool(result.images.isfinite().all())


def test_a_batch_of_two() -> None:
    """Labels are inferred as counts, the images matched together, in any order."""
    torch.manual_seed(0)
    residual = Residual(filters=3, stride=1)
    images = _smooth(4)
    seen = [_batch(residual, images[:2], [7, 2]), _batch(residual, images[2:], [3, 3])]
    results = HybridAttack(steps=150)(seen)
    assert [r.labels.tolist() for r in results] == [[2, 7], [3, 3]]
    for result, truth in zip(results, (images[:2], images[2:]), strict=True):
        assert result.images.shape == (2, *SHAPE)
        assert result.details["solver"] == "l-bfgs"
        assert result.details["why_not_linear"]
        pairs = pair(result.images, truth)
        found = [score(result.images[r], truth[t]).psnr_db for r, t in pairs]
        grey = [score(torch.full(SHAPE, 0.5), truth[t]).psnr_db for _, t in pairs]
        assert min(a - b for a, b in zip(found, grey, strict=True)) > 3
        assert result.fit < 0.1
    # The first batch has two labels: which image has which is known.
    swapped = images[:2].flip(0)
    assert pair(results[0].images, swapped) == [(0, 0), (1, 1)]
    (alone,) = HybridAttack(steps=150)(seen[:1])
    torch.testing.assert_close(results[0].images, alone.images, atol=2e-2, rtol=0)


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(2, 10))
@settings(max_examples=40, deadline=None)
def test_labels_of_batches_are_counted(seed: int, images: int, classes: int) -> None:
    """Where probabilities are about as typical, the counts are exact and ascending."""
    generator = torch.Generator().manual_seed(seed)
    typical = torch.rand(classes, generator=generator, dtype=torch.float64).softmax(0)
    labels = torch.randint(classes, (3, images), generator=generator)
    # The mean probability is off by less than half an image.
    noise = torch.rand(3, classes, generator=generator, dtype=torch.float64) - 0.5
    noise = 0.4 / images * (noise - noise.mean(1, keepdim=True))
    counts = F.one_hot(labels, classes).double().mean(1)
    found = infer_labels(typical + noise - counts, None, images, typical)
    assert torch.equal(found, labels.sort(1).values)


@pytest.mark.parametrize(("full", "last", "batch"), [(16, 3, 8), (96, 4, 32), (40, 1, 40)])
def test_labels_of_a_smaller_last_batch_are_counted(full: int, last: int, batch: int) -> None:
    """An image of it counts for more; where all are counted alike twice as many are wrong."""
    steps = full // batch + 1
    light, heavy = 1 / (steps * batch), 1 / (steps * last)
    missed = torch.zeros(2)
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        typical = torch.rand(10, generator=draw, dtype=torch.float64).softmax(0)
        labels = torch.randint(10, (full + last,), generator=draw)
        counted = torch.tensor([light] * full + [heavy] * last, dtype=torch.float64)
        bias = typical - torch.zeros(10, dtype=torch.float64).index_add_(0, labels, counted)
        found = labels_with_rest(bias, (full, last), (light, heavy), typical)
        alike = infer_labels(bias[None], None, full + last, typical)[0]
        true, *each = (torch.bincount(x, minlength=10) for x in (labels, found, alike))
        missed += torch.stack([(true - one).clamp_min(0).sum() for one in each])
    assert missed[0] < missed[1] / 2


def test_labels_of_one_image() -> None:
    gradient = torch.tensor([[0.2, -0.7, 0.5], [-0.1, 0.04, 0.06]])
    assert infer_labels(gradient, None, 1, torch.ones(3) / 3).tolist() == [[1], [0]]
    weight = gradient.unsqueeze(2) * torch.tensor([1.0, -2.0])
    assert infer_labels(None, weight, 1, torch.ones(3) / 3).tolist() == [[1], [0]]
    for bias, rows, images in ((None, weight, 2), (None, None, 1)):
        with pytest.raises(UnsupportedModelError, match="labels cannot be inferred"):
            infer_labels(bias, rows, images, torch.ones(3) / 3)


@pytest.mark.parametrize("kind", ["residual", "deficient"])
def test_total_variation_goes_by_lbfgs(
    kind: str, observe: Observe, request: pytest.FixtureRequest
) -> None:
    """Its energy is not quadratic: there is no closed form for a step."""
    model = request.getfixturevalue(kind)
    image = _smooth(1)[0]
    (result,) = HybridAttack(prior="tv", steps=60, prior_options={"scale": 0.1})(
        [observe(model, image, 3)]
    )
    assert result.details["solver"] == "l-bfgs"
    assert result.details["prior"] == "tv(scale=0.1)"
    assert _psnr(result, image) > score(torch.full(SHAPE, 0.5), image).psnr_db + 3


def _objective(target: ChainTarget, prior: GaussianPrior, images: Tensor, level: float) -> Tensor:
    errors = target.errors.clamp_min(level)
    data = ((target.made(images) - target.values) / errors).square().sum(1)
    return data + prior.dense().energy(images.flatten(1))


def test_gauss_newton_beats_lbfgs_on_its_own_objective(
    deficient: nn.Module, observe: Observe
) -> None:
    """The same target, prior and errors."""
    images = _smooth(3)
    evidence = Evidence.gather([observe(deficient, x, k) for k, x in enumerate(images)], "cpu")
    solution = solve_recursively(evidence)
    depth = solution.undetermined(evidence.chain.layers)
    assert depth > 1  # not one linear system: that would be solved at once
    target = ChainTarget(evidence, solution, depth, True)
    prior = GaussianPrior(SHAPE, adapt=False)
    start = prior.mean.expand(3, 1, *SHAPE)
    newton = match(target, prior, start, 1, 150, 1e-2)
    assert newton.solver == "gauss-newton"

    class Sharp(GaussianPrior):
        gaussian = False  # sends the same prior to the quasi-Newton solver

    quasi = match(target, Sharp(SHAPE, adapt=False), start, 1, 150, 1e-2)
    assert quasi.solver == "l-bfgs"
    ours = _objective(target, prior, newton.images, 1e-2)
    theirs = _objective(target, prior, quasi.images, 1e-2)
    assert bool((ours <= theirs * (1 + 1e-6)).all())
    assert float(ours.sum()) < float(theirs.sum())


def test_a_deficient_chain(deficient: nn.Module, observe: Observe) -> None:
    """Matched by Gauss-Newton, nearer the truth and no worse a fit than the linear one."""
    images = _smooth(2)
    seen = [observe(deficient, x, k) for k, x in enumerate(images)]
    results, linear = HybridAttack()(seen), LinearAttack()(seen)
    for k, (ours, theirs) in enumerate(zip(results, linear, strict=True)):
        assert ours.details["by"] == "matching"
        assert ours.details["solver"] == "gauss-newton"
        assert ours.fit <= max(theirs.fit, 1e-6)
        assert _psnr(ours, images[k]) > _psnr(theirs, images[k])
        (alone,) = HybridAttack()([seen[k]])
        torch.testing.assert_close(ours.images, alone.images, atol=1e-3, rtol=0)


def test_a_noisy_update(deficient: nn.Module, residual: nn.Module, observe: Observe) -> None:
    """The noise is seen, the whole chain is matched, and the prior holds what it drowns."""
    image = _smooth(1)[0]
    clean = observe(deficient, image, 2)
    for strength in (0.02, 0.2):
        noisy = [
            Observation.from_gradient(
                deficient, defend(clean.gradient, DefenceSpec("noise", strength), k), SHAPE
            )
            for k in range(3)
        ]
        found, base = HybridAttack()(noisy), LinearAttack()(noisy)
        for ours, theirs in zip(found, base, strict=True):
            assert strength / 3 < ours.details["noise"] < 3 * strength
            assert ours.fit <= max(1.1 * theirs.fit, 2 * ours.details["noise"])
        assert sum(_psnr(r, image) for r in found) > sum(_psnr(r, image) for r in base)
    one = Observation.from_gradient(
        residual, defend(observe(residual, image, 2).gradient, DefenceSpec("noise", 0.02), 0), SHAPE
    )
    (result,) = HybridAttack()([one])
    assert _psnr(result, image) > 15


@pytest.mark.slow
def test_the_truth_is_out_of_reach(residual: nn.Module, observe: Observe) -> None:
    """The result is a function of model and update: images that send the same get the same."""
    image = _smooth(1)[0]
    seen = observe(residual, image, 1)
    (first,) = HybridAttack()([seen])
    with torch.no_grad():
        image.zero_()
    copied = {n: g.clone() for n, g in seen.gradient.items()}
    torch.manual_seed(99)
    (second,) = HybridAttack()([Observation.from_gradient(residual, copied, SHAPE)])
    assert torch.equal(first.images, second.images)
    assert second.labels.tolist() == [1]


def test_what_is_known_of_the_head(residual: nn.Module, observe: Observe) -> None:
    """The head's input is exact for one image, zero tensors say nothing, parts are parts."""
    images = _smooth(2)
    evidence = Evidence.gather([observe(residual, x, k) for k, x in enumerate(images)], "cpu")
    target = ModuleTarget(evidence)
    assert target.features is not None
    truth = images.double().unsqueeze(1)
    known = evidence.replay(truth, evidence.labels).head_input
    assert known is not None
    torch.testing.assert_close(target.features, known, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(target.made(truth), target.values, atol=1e-4, rtol=1e-3)
    # Every tensor counts by its own root mean square.
    start = 0
    for name in target.names:
        size = evidence.gradient[name][0].numel()
        part = target.values[:, start : start + size]
        torch.testing.assert_close(part.square().mean(1), torch.ones(2, dtype=torch.float64))
        start += size
    second = target.subset(torch.tensor([1]))
    assert len(second) == 1
    torch.testing.assert_close(second.values, target.values[1:])
    torch.testing.assert_close(second.made(truth[1:]), target.made(truth)[1:])
    evidence.gradient["first.bias"] = torch.zeros(2, 2, dtype=torch.float64)
    silent = ModuleTarget(evidence)
    made = silent.made(truth)
    assert bool(made.isfinite().all())
    at = [0, *torch.tensor([evidence.gradient[n][0].numel() for n in silent.names]).cumsum(0)]
    where = slice(int(at[silent.names.index("first.bias")]), None)
    assert float(made[:, where][:, :2].abs().max()) == 0


def test_a_prior_of_another_kind_has_no_family() -> None:
    prior = TotalVariationPrior((3, 4, 4))
    assert prior.family(0) == [prior]
    assert prior.family(1) == [prior]


@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": 2, "padding": 1, "bias": False}])
def test_a_first_layers_jacobian_is_written_out(options: dict[str, Any]) -> None:
    """As its derivatives are, for several updates."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 3, 3, **options)
        features = conv(torch.zeros(1, 2, 8, 8)).numel()
        model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(features, 5))
        images = torch.rand(2, 1, 2, 8, 8)
    seen = []
    for n, image in enumerate(images):
        loss = torch.nn.functional.cross_entropy(model(image), torch.tensor([n]))
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradient = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        seen.append(Observation.from_gradient(model, gradient, (2, 8, 8)))
    evidence = Evidence.gather(seen, "cpu")
    target = ChainTarget(evidence, solve_recursively(evidence), 1, True)
    made = target.constant_jacobian()
    assert made is not None
    x = torch.rand(2, 128, dtype=torch.float64)
    expected = jacobian(lambda x: target.made(x.reshape(2, 1, 2, 8, 8)), x)
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-12)
