"""Batches told apart at the head, and what follows for the layers below."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedleak import laboratory
from fedleak.attacks import HybridAttack, LinearAttack
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.head.batch import Demixed, demix
from fedleak.attacks.head.equations import Mixture
from fedleak.attacks.head.labels import label_candidates
from fedleak.attacks.head.single import _normals, demix_heads, forward_constraint
from fedleak.attacks.linear import solve_layer
from fedleak.attacks.targets.shared_rows import match_batch
from fedleak.client.training import LocalTraining
from fedleak.data import load_data
from fedleak.defences import DefenceSpec, defend, parse_defence
from fedleak.errors import UnsupportedModelError
from fedleak.models import build_model
from fedleak.observation import Observation
from fedleak.priors import make_prior
from fedleak.quality import pair, score_batch
from fedleak.systems import Affine, Chain
from fedleak.systems.dense import dense_system


def _head(seed: int, images: int, classes: int, features: int) -> tuple[Tensor, ...]:
    """Return inputs, labels (two of them equal), the head, and its gradients, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs, weight, offset = draw(images, features).tanh(), draw(classes, features), draw(classes)
    weight = weight / math.sqrt(features)
    labels = torch.randint(classes, (images,), generator=generator)
    labels[0] = labels[-1]
    errors = ((inputs @ weight.mT + offset).softmax(1) - F.one_hot(labels, classes)) / images
    return inputs, labels.sort().values, weight, offset, errors.mT @ inputs, errors.sum(0)


def _demix(*case: Tensor) -> Demixed:
    inputs, _, weight, offset, gradient, bias = case
    even = torch.full_like(bias, 1 / len(bias))
    return demix(gradient, bias, weight, offset, len(inputs), even)


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(8, 12), st.integers(20, 60))
@settings(max_examples=5, deadline=None)
def test_inputs_and_labels_are_found(seed: int, images: int, classes: int, features: int) -> None:
    case = _head(seed, images, classes, features)
    inputs, labels = case[:2]
    found = _demix(*case)
    assert found.solved
    assert found.labels.tolist() == labels.tolist()
    distance = torch.cdist(found.inputs, inputs)
    assert sorted(distance.argmin(1).tolist()) == list(range(images))
    assert float(distance.amin(1).max()) < 1e-4 * float(inputs.norm(dim=1).max())
    torch.testing.assert_close(found.cotangents.mT @ found.inputs, case[4], atol=1e-9, rtol=0)


def test_every_label_may_be_the_same() -> None:
    inputs, _, weight, offset, _, _ = _head(3, 3, 8, 40)
    labels = torch.full((3,), 5)
    errors = ((inputs @ weight.mT + offset).softmax(1) - F.one_hot(labels, 8)) / 3
    found = _demix(inputs, labels, weight, offset, errors.mT @ inputs, errors.sum(0))
    assert found.solved
    assert found.labels.tolist() == [5, 5, 5]
    assert float(torch.cdist(found.inputs, inputs).amin(1).max()) < 1e-3


def _problem(seed: int) -> tuple[Mixture, Tensor]:
    inputs, labels, weight, offset, gradient, bias = _head(seed, 3, 6, 20)
    basis = torch.linalg.svd(gradient, full_matrices=False)[2][:3]
    problem = Mixture(gradient, bias, weight, offset, basis, 0.0, labels)
    generator = torch.Generator().manual_seed(seed)
    m = inputs @ basis.mT + 0.1 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    problem.weigh(m)
    return problem, m


@pytest.mark.parametrize("constrained", [False, True])
def test_the_normal_equations_are_those_of_the_jacobian(constrained: bool) -> None:
    problem, m = _problem(1)
    if constrained:
        plane = torch.randn(4, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

        def demands(x: Tensor) -> tuple[Tensor, Tensor]:
            change = torch.cos(x).unsqueeze(1) * plane
            return torch.sin(x) @ plane.mT, change

        problem.constraint = demands
        problem.weigh(m)

    def residual(flat: Tensor) -> Tensor:
        one = flat.reshape(1, 3, 3)
        _, _, r1, r2, _ = problem.evaluate(one)
        parts = [r1.flatten(), r2.flatten()]
        if problem.constraint is not None:
            parts.append(
                (problem.constraint(one[0] @ problem.basis)[0] * problem.demands).flatten()
            )
        return torch.cat(parts)

    jacobian = torch.func.jacrev(residual)(m.flatten())  # type: ignore[misc]
    state = problem.evaluate(m.unsqueeze(0))
    normal, slope = problem.normal(m.unsqueeze(0), *state[:4])
    expected = jacobian.mT @ jacobian
    torch.testing.assert_close(normal[0], expected, rtol=1e-8, atol=1e-9 * float(expected.max()))
    torch.testing.assert_close(slope[0], jacobian.mT @ residual(m.flatten()), rtol=1e-7, atol=1e-3)
    torch.testing.assert_close(state[4][0], residual(m.flatten()).square().sum())


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_label_candidates_are_all_sets_in_order(seed: int, images: int, classes: int) -> None:
    """Against brute force: each possible set once, by its distance from what is expected."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.05
    p, labels = p / p.sum(), torch.randint(classes, (images,), generator=generator)
    bias = p - F.one_hot(labels, classes).sum(0) / images
    typical = torch.full((classes,), 1 / classes, dtype=torch.float64)
    found = [tuple(y.tolist()) for y in label_candidates(bias, images, typical)]

    def counts(y: tuple[int, ...]) -> Tensor:
        return torch.bincount(torch.tensor(y), minlength=classes)

    def price(y: tuple[int, ...]) -> float:
        rest = counts(y) - images * (typical - bias)
        return float((rest.square() / (images * typical)).sum())

    least = -images * bias
    possible = [
        y
        for y in itertools.combinations_with_replacement(range(classes), images)
        if bool((counts(y) >= least - 1e-4 * images).all())
    ]
    assert sorted(found) == sorted(possible)
    assert tuple(labels.sort().values.tolist()) in found
    prices = [price(y) for y in found]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(prices))


NETS = {
    "wide": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10)
    ),
    "hidden": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 40), nn.Sigmoid(), nn.Linear(40, 30), nn.Tanh(),
        nn.Linear(30, 10),
    ),
    "two convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 16, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(16 * 16, 10),
    ),
}  # fmt: skip


def _digits(count: int) -> tuple[Tensor, Tensor]:
    images, _ = load_data("digits")
    x, y = images.batch(range(40, 40 + count))
    y = y.clone()
    y[1] = y[0]
    return x, y


@pytest.mark.parametrize("name", NETS)
def test_a_batch_is_reconstructed_exactly(name: str) -> None:
    torch.manual_seed(0)
    x, y = _digits(4)
    trials = laboratory.reconstruct(NETS[name](), x, y, LinearAttack(), batch_size=4)
    assert [t.label_inferred for t in trials.trials] == y.tolist()
    assert min(trials.psnr_db) > 60
    head = trials.trials[0].reconstruction.details["head"]
    assert head["trusted"] == [True] * 4
    assert max(head["relative_error"]) < 1e-3
    assert trials.trials[0].reconstruction.threat is not None


def test_an_image_that_does_not_give_its_input_is_not_trusted() -> None:
    """Nearly singular below: the head is told apart, the images are not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.LeakyReLU(0.2), nn.Conv2d(6, 12, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(12 * 16, 10),
    )  # fmt: skip
    x, y = _digits(4)
    trials = laboratory.reconstruct(model, x, y, LinearAttack(), batch_size=4)
    head = trials.trials[0].reconstruction.details["head"]
    trusted = head["trusted"]
    assert max(head["relative_error"]) < 1e-3
    assert not all(trusted)
    for trial in trials.trials:
        (place,) = (
            i
            for i, image in enumerate(trial.reconstruction.images)
            if torch.equal(image, trial.image)
        )
        assert trial.quality.psnr_db > 35 or not trusted[place]


def test_many_updates_at_once_are_as_each_alone() -> None:
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    x, y = _digits(6)
    together = laboratory.reconstruct(model, x, y, LinearAttack(), batch_size=3)
    first = laboratory.reconstruct(model, x[:3], y[:3], LinearAttack(), batch_size=3)
    assert min(together.psnr_db) > 60
    for a, b in zip(together.trials[:3], first.trials, strict=True):
        torch.testing.assert_close(a.image, b.image, atol=1e-5, rtol=0)


def test_what_is_open_is_filled_in_by_the_prior() -> None:
    """A strided network: least squares alone leaves much open, the prior does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 4, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 10))
    x, y = _digits(3)
    plain = laboratory.reconstruct(model, x, y, LinearAttack(), batch_size=3)
    hybrid = laboratory.reconstruct(model, x, y, HybridAttack(), batch_size=3)
    assert hybrid.trials[0].reconstruction.details["solver"] == "closed form"
    assert sum(hybrid.psnr_db) > sum(plain.psnr_db) + 9
    assert hybrid.trials[0].reconstruction.fit < 1e-4


def test_a_batch_larger_than_its_head_is_matched_with_a_notice() -> None:
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    x, y = _digits(10)
    trials = laboratory.reconstruct(model, x, y, HybridAttack(steps=20), batch_size=10)
    why = trials.trials[0].reconstruction.details["why_not_linear"]
    assert "mixes 10 images" in why
    assert "at most 9 apart" in why
    with pytest.raises(UnsupportedModelError, match="at most 9 apart"):
        laboratory.reconstruct(model, x, y, LinearAttack(), batch_size=10)


def _seen(
    model: nn.Module, x: Tensor, y: Tensor, defence: DefenceSpec | None = None
) -> Observation:
    loss = F.cross_entropy(model(x), y)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradient = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    if defence is not None:
        gradient = defend(gradient, defence, 0)
    return Observation.from_gradient(model, gradient, (1, 8, 8), len(x))


def test_strong_noise_is_recognised_and_weak_noise_allowed_for() -> None:
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    x, y = _digits(2)
    (weak,) = HybridAttack(steps=100)([_seen(model, x, y, DefenceSpec("noise", 1e-4))])
    assert weak.details["head"]["misfit"] < 5
    assert 3e-5 < weak.details["noise"] < 3e-4
    (strong,) = HybridAttack(steps=20)([_seen(model, x, y, DefenceSpec("noise", 0.5))])
    assert "could not be told apart" in strong.details["why_not_linear"]


def test_the_estimated_error_is_the_error() -> None:
    """Within a factor of five, for images that are known very differently well."""
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=1)
    x, y = _digits(6)
    (found,) = demix_heads(Evidence.gather([_seen(model, x, y)], "cpu"))
    with torch.no_grad():
        truth = Chain.read(model, (1, 8, 8)).features(x.double())[-1]
    distance = torch.cdist(found.inputs, truth).amin(1) / truth.norm(dim=1).mean()
    assert float(distance.max() / distance.min()) > 3
    ratio = (distance / found.relative_error).log().abs()
    assert float(ratio.max()) < math.log(5)


def test_the_layer_below_demands_nothing_of_the_truth() -> None:
    chain = Chain.read(NETS["wide"](), (1, 8, 8))
    x, _ = _digits(3)
    demands = forward_constraint(chain)
    assert demands is not None
    features = chain.features(x.double())[-1]
    residual, change = demands(features)
    assert float(residual.abs().max()) < 1e-9
    torch.testing.assert_close(
        demands(features + 1e-6)[0], 1e-6 * change.sum(2), rtol=1e-3, atol=1e-9
    )
    layer = chain.layers[0]
    assert isinstance(layer, Affine)
    a, _ = dense_system(layer, torch.ones(layer.out_shape, dtype=torch.float64))[0]
    assert float((_normals(layer, 5).flatten(1) @ a).abs().max()) < 1e-9


def test_a_layer_that_is_not_overdetermined_demands_nothing() -> None:
    chain = Chain.read(build_model("cnn2-v2", (1, 8, 8), 10, seed=0), (1, 8, 8))
    assert forward_constraint(chain) is None


LAYERS = [
    (nn.Conv2d(2, 3, 3), (2, 5, 5)),
    (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 6, 6)),
    (nn.Conv2d(3, 2, 2, stride=2), (3, 6, 6)),
    (nn.Conv2d(4, 4, 3, groups=2), (4, 5, 5)),
    (nn.Linear(12, 5), (12,)),
    (nn.Linear(5, 12), (5,)),
]


def _system(module: nn.Module, shape: tuple[int, ...], batch: int) -> tuple[Affine, Tensor, Tensor]:
    """Return a layer, cotangents for a batch, and the dense batched ``U``."""
    features = math.prod(module(torch.zeros(1, *shape)).shape)
    chain = Chain.read(nn.Sequential(module, nn.Flatten(), nn.Linear(features, 3)), shape)
    layer = chain.layers[0]
    assert isinstance(layer, Affine)
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(batch, *layer.out_shape, generator=generator, dtype=torch.float64)
    unit = torch.eye(layer.unknowns, dtype=torch.float64).reshape(-1, *shape)
    rows, shared = [], []
    for one in e:
        made = layer.apply(unit, one.expand(len(unit), *layer.out_shape))
        rows.append(made.weight.flatten(1).mT)
        shared.append(made.gradient.flatten(1).mT)
    return layer, e, torch.cat([torch.block_diag(*rows), torch.cat(shared, 1)])


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize(("module", "shape"), LAYERS)
def test_the_rank_of_a_batch(module: nn.Module, shape: tuple[int, ...], batch: int) -> None:
    torch.manual_seed(0)
    layer, e, u = _system(module, shape, batch)
    assert layer.batch_rank(e, torch.ones_like(e, dtype=torch.bool)) == torch.linalg.matrix_rank(u)


def test_a_batchs_layer_is_solved_as_its_dense_system() -> None:
    torch.manual_seed(0)
    layer, e, u = _system(nn.Conv2d(2, 3, 3, stride=2), (2, 6, 6), 3)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    made = (u @ x.flatten()).split([math.prod(e.shape), math.prod(layer.weight_shape)])
    z = made[0].reshape(e.shape)
    if layer.bias is not None:
        z = z + layer.bias.reshape(-1, 1, 1)
    gradient = made[1].reshape(1, *layer.weight_shape)
    even = torch.ones_like(z), torch.ones_like(gradient)
    found, residual = solve_layer(layer, z, e, gradient, even, torch.zeros_like(x))
    expected = torch.linalg.pinv(u) @ (u @ x.flatten())
    torch.testing.assert_close(found.flatten(), expected, atol=1e-7, rtol=0)
    assert residual.shape == (1,)
    assert float(residual) < 1e-8


def test_shared_rows_are_conditioned_on_as_in_one_dense_system() -> None:
    """Against the posterior mean of all images of a batch in one vector."""
    from fedleak.attacks.head.single import of_batches
    from fedleak.attacks.linear import solve_recursively

    model = build_model("cnn2-v2", (1, 8, 8), 10, seed=0)
    x, y = _digits(2)
    evidence = Evidence.gather([_seen(model, x, y)], "cpu")
    solution = solve_recursively(
        evidence, heads=[of_batches(list(demix_heads(evidence)), evidence)]
    )
    prior = make_prior("gaussian", (1, 8, 8), adapt=False)
    precision = 1e-2
    found = match_batch(evidence, solution, prior, precision)
    layer, gradient = evidence.chain.layers[0], next(iter(evidence.gradient.values()))[0]
    assert isinstance(layer, Affine)
    z, e = solution.values[1], solution.cotangents[1]
    own, shared = [], []
    for one in e:
        a, k = dense_system(layer, one)[0]
        own.append(a)
        shared.append(k)
    u = torch.cat([torch.block_diag(*own), torch.cat(shared, 1)])
    target = layer.target(z, gradient)
    of_z = precision * z.flatten(1).square().mean(1, keepdim=True).sqrt().expand(
        -1, own[0].shape[0]
    )
    of_g = torch.full((k.shape[0],), precision * float(gradient.square().mean().sqrt()))
    sigma = torch.cat([of_z.flatten(), of_g]).double()
    s = torch.block_diag(*[prior.dense().covariance] * 2)
    mean = prior.dense().mean.repeat(2)
    v = torch.cat([target.weight.flatten(), gradient.flatten()])
    gram = u @ s @ u.mT + sigma.square().diag()
    expected = mean + s @ u.mT @ torch.linalg.solve(gram, v - u @ mean)
    torch.testing.assert_close(found.images.flatten(), expected, atol=2e-4, rtol=0)
    assert len(pair(found.images[0], x)) == 2


def test_an_image_that_is_there_twice_is_said_to_be_hidden() -> None:
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    x, y = _digits(3)
    x, y = x[[0, 0, 2]], y[[0, 0, 2]]
    trials = laboratory.reconstruct(model, x, y, HybridAttack(steps=20), batch_size=3)
    why = trials.trials[0].reconstruction.details["why_not_linear"]
    assert "an image that is there twice" in why


def test_what_no_batch_can_have_made_is_given_up() -> None:
    """Gradients that no batch has: the search is bounded, and says how far off it stayed."""
    case = _head(0, 4, 8, 40)
    wrong = torch.linspace(-1, 1, 8, dtype=torch.float64) * 0.01
    found = _demix(*case[:5], case[5] + wrong - wrong.mean())
    assert not found.solved
    assert "times the rounding expected" in found.why_not


@pytest.mark.parametrize("rate", [0.1, 0.003, 0.001])
def test_weights_after_a_short_step_round_more(rate: float) -> None:
    """What is lost in the difference of float32 weights is allowed for."""
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    x, y = _digits(4)
    trained = copy.deepcopy(model)
    F.cross_entropy(trained(x), y).backward()
    torch.optim.SGD(trained.parameters(), rate).step()
    seen = Observation.from_weights(model, trained.state_dict(), LocalTraining(rate, 4), (1, 8, 8))
    (found,) = demix_heads(Evidence.gather([seen], "cpu"))
    assert found.solved
    assert found.labels.tolist() == y.sort().values.tolist()


def test_clipped_weights_of_like_images_are_told_apart() -> None:
    """Three sixes and a two: what float32 weights round of a small change is allowed for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 10))
    digits, chosen = load_digits(), [360, 1773, 1482, 600]
    x = torch.tensor(digits.images[chosen] / 16, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target[chosen])
    F.cross_entropy(model(x), y).backward()
    spec, sent = parse_defence("clip:0.1"), model.state_dict()
    change = {n: -0.5 * p.grad for n, p in model.named_parameters() if p.grad is not None}
    weights = {n: sent[n] + v for n, v in defend(change, spec, 0).items()}
    training = LocalTraining(0.5, 4)
    seen = Observation.from_weights(model, weights, training, (1, 8, 8), defence=spec)
    (found,) = HybridAttack().reconstruct([seen])
    quality = score_batch(found.images, found.labels, x, y)
    assert min(q.quality.psnr_db for q in quality if q.quality) > 80


@pytest.mark.parametrize("scale", [5, 10])
def test_logits_that_are_large_round_more(scale: float) -> None:
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    with torch.no_grad():
        model.fc.weight.mul_(scale)
    x, y = _digits(4)
    trials = laboratory.reconstruct(model, x, y, LinearAttack(), batch_size=4)
    assert min(trials.psnr_db) > 60


def test_a_head_without_a_gradient_is_matched() -> None:
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    seen = _seen(model, *_digits(3))
    gone = {n: g * (not n.startswith("fc")) for n, g in seen.gradient.items()}
    pruned = Observation.from_gradient(model, gone, (1, 8, 8), 3)
    (result,) = HybridAttack(steps=10)([pruned])
    assert result.details["by"] == "matching"
    assert "could not be told apart" in result.details["why_not_linear"]


def test_granted_labels_are_kept_beside_unknown_ones() -> None:
    model = build_model("cnn2-v1", (1, 8, 8), 10, seed=0)
    x, y = _digits(3)
    seen = _seen(model, x, y)
    wrong = [(int(c) + 1) % 10 for c in y]
    told = Observation.from_gradient(model, seen.gradient, (1, 8, 8), 3, wrong)
    unknown, known = demix_heads(Evidence.gather([seen, told], "cpu"))
    assert unknown.solved
    assert not known.solved


def test_a_batch_of_which_the_layers_leave_too_much_open_is_matched_as_a_whole_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(18, 10)
    )
    x, y = _digits(2)
    plain = laboratory.reconstruct(model, x, y, LinearAttack(), batch_size=2)
    both = laboratory.reconstruct(model, x, y, HybridAttack(steps=200), batch_size=2)
    fits = [t.trials[0].reconstruction.fit for t in (plain, both)]
    assert fits[1] < fits[0]
    assert [t.label_inferred for t in both.trials] == y.tolist()
    assert both.trials[0].reconstruction.details["by"] == "matching"
