"""Priors against their dense covariance, and what they say of images."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedleak.errors import InvalidInputError, UnknownNameError
from fedleak.priors import (
    GaussianPrior,
    LearnedGaussianPrior,
    PatchMixture,
    PatchPrior,
    Prior,
    TotalVariationPrior,
    make_prior,
)
from fedleak.priors import patches as patches_module
from fedleak.priors.synthetic import dead_leaves
from fedleak.solvers import Gaussian

Shape = tuple[int, int, int]
KINDS = ("gaussian", "gaussian:learned", "tv", "patches")
SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(2, 5))
# A shape for every number of channels, non-square.
FIXED: tuple[Shape, ...] = ((1, 4, 6), (2, 5, 3), (3, 4, 5))


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _smooth(count: int, shape: Shape, seed: int = 0) -> Tensor:
    """Return images of a kind of their own: stripes of a few widths and random phase."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    phase, slope = torch.rand(2, count, 1, 1, 1, generator=generator, dtype=torch.float64)
    y = torch.arange(height, dtype=torch.float64).reshape(1, 1, -1, 1)
    x = torch.arange(width, dtype=torch.float64).reshape(1, 1, 1, -1)
    wave = torch.sin(6.3 * phase + 1.2 * x + (0.2 + 0.2 * slope) * y)
    tint = torch.linspace(0.1, 0.3, channels, dtype=torch.float64).reshape(1, -1, 1, 1)
    return 0.5 + tint * wave


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtures are fitted to few patches here."""
    monkeypatch.setattr(patches_module, "_SAMPLES", 2000)


def _prior(kind: str, shape: Shape) -> Prior:
    if kind == "patches":
        mixture = PatchMixture(_smooth(40, shape), size=3, components=3)
        return PatchPrior(GaussianPrior(shape), mixture)
    return make_prior(kind, shape, public=_smooth(12, shape))


def _by_definition(prior: Prior) -> Tensor:
    """Return ``B B^T`` from ``root`` alone, without its adjoint."""
    size = math.prod(prior.latent_shape)
    units = torch.eye(size, dtype=torch.float64).reshape(-1, *prior.latent_shape)
    columns = prior.root(units).flatten(1)
    return columns.T @ columns


@pytest.mark.parametrize("kind", KINDS)
@given(shape=SHAPES, seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_root_adjoint_is_the_adjoint(kind: str, shape: Shape, seed: int) -> None:
    """<B u, x> = <u, B^T x>."""
    prior = _prior(kind, shape)
    u, x = _random(2, *prior.latent_shape, seed=seed), _random(2, *shape, seed=seed + 1)
    forward, backward = prior.root(u), prior.root_adjoint(x)
    assert forward.shape == x.shape
    assert backward.shape == u.shape
    torch.testing.assert_close(
        (forward * x).flatten(1).sum(1), (backward * u).flatten(1).sum(1), atol=1e-10, rtol=1e-9
    )


@pytest.mark.parametrize("kind", KINDS)
@given(shape=SHAPES)
@settings(max_examples=12, deadline=None)
def test_dense_is_root_times_its_transpose(kind: str, shape: Shape) -> None:
    """Also where the covariance is a Kronecker product; the base class's loop is an oracle."""
    prior = _prior(kind, shape)
    dense, slow = prior.dense(), Prior.dense(prior)
    expected = _by_definition(prior)
    torch.testing.assert_close(dense.covariance, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(slow.covariance, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(dense.mean, prior.mean.expand(shape).reshape(-1))
    torch.testing.assert_close(slow.mean, dense.mean)
    torch.testing.assert_close(dense.covariance, dense.covariance.T, atol=1e-13, rtol=0)
    assert float(torch.linalg.eigvalsh(dense.covariance)[0]) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", FIXED)
def test_dense_algebra(kind: str, shape: Shape) -> None:
    """Factor, inverse, determinant, products and energy, against those of the matrix."""
    dense = _prior(kind, shape).dense()
    covariance, n = dense.covariance, math.prod(shape)
    torch.testing.assert_close(dense.factor @ dense.factor.T, covariance, atol=1e-10, rtol=1e-7)
    assert float(dense.factor.triu(1).abs().max()) == 0
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(dense.precision @ covariance, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        dense.log_det, torch.linalg.slogdet(covariance)[1], atol=1e-5, rtol=1e-7
    )
    rows = _random(2, 3, n)
    torch.testing.assert_close(dense.times(rows), rows @ covariance)
    x = dense.mean + 0.1 * _random(2, n)
    rest = x - dense.mean
    expected = (rest @ torch.linalg.inv(covariance) * rest).sum(1)
    torch.testing.assert_close(dense.energy(x), expected, atol=1e-6, rtol=1e-4)


def test_energies() -> None:
    """Whitened it is ||u||^2; of total variation the slopes of the image, whatever made it."""
    shape = (2, 4, 5)
    gaussian = GaussianPrior(shape)
    u = _random(3, *gaussian.latent_shape)
    torch.testing.assert_close(gaussian.energy(u), u.square().sum((1, 2, 3)))
    tv = TotalVariationPrior(shape, scale=0.2)
    x = tv.image(u)
    expected = []
    for image in x:
        total = 0.0
        for c in range(2):
            for i in range(4):
                for j in range(5):
                    dy = float(image[c, i + 1, j] - image[c, i, j]) if i < 3 else 0.0
                    dx = float(image[c, i, j + 1] - image[c, i, j]) if j < 4 else 0.0
                    total += math.sqrt(dx * dx + dy * dy + 1e-8)
        expected.append(2 * total / 0.2)
    torch.testing.assert_close(tv.energy(u), torch.tensor(expected, dtype=torch.float64))
    # Flat latents, as the quasi-Newton solver has them, are the same ones.
    torch.testing.assert_close(tv.energy(u.flatten(1)), tv.energy(u))
    level = tv.energy(torch.zeros(1, *tv.latent_shape, dtype=torch.float64))
    assert float(level) < float(tv.energy(u).min())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", FIXED)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_family_begins_with_itself(kind: str, shape: Shape, stage: int) -> None:
    """The evidence may stay with the prior that was asked for, and ends after three stages."""
    prior = _prior(kind, shape)
    family = prior.family(stage)
    assert str(family[0]) == str(prior)
    assert type(family[0]) is type(prior)
    torch.testing.assert_close(family[0].dense().covariance, prior.dense().covariance)
    assert len({str(p) for p in family}) == len(family)
    assert all(len(p.family(3)) == 1 for p in family)
    assert all(p.shape == shape for p in family)


def test_families_vary_colour_then_smoothness() -> None:
    colours = GaussianPrior((3, 4, 4), colour=0.5).family(0)
    assert {p.colour for p in colours if isinstance(p, GaussianPrior)} == {0.5, 0.93, 0.85, 0.975}
    shapes = colours[1].family(1)
    assert len({(p.rho, p.power) for p in shapes if isinstance(p, GaussianPrior)}) == 3
    assert {p.colour for p in shapes if isinstance(p, GaussianPrior)} == {0.93}
    assert len(GaussianPrior((1, 4, 4)).family(0)) == 1  # one channel has no colours
    fixed = GaussianPrior((3, 4, 4), adapt=False)
    assert fixed.family(0) == [fixed]
    assert fixed.family(1) == [fixed]


def test_options_are_kept_in_the_family() -> None:
    for prior in GaussianPrior((3, 4, 4), sigma=0.4, mean=0.3, floor=1e-3).family(0):
        dense = prior.dense()
        torch.testing.assert_close(dense.mean, torch.full((48,), 0.3, dtype=torch.float64))
        assert dense.covariance.diagonal().mean() == pytest.approx(0.16, rel=0.2)


@pytest.mark.parametrize("shape", FIXED)
def test_stationary_correlations_are_as_described(shape: Shape) -> None:
    """sigma^2 C kron rho^(r^power), as long as the torus does not cut it off."""
    prior = GaussianPrior(shape, rho=0.3, power=1.0, colour=0.6, sigma=0.2)
    channels, height, width = shape
    places = [(c, i, j) for c in range(channels) for i in range(height) for j in range(width)]
    expected = [
        [0.04 * (1.0 if a == b else 0.6) * 0.3 ** math.hypot(i - k, j - m) for b, k, m in places]
        for a, i, j in places
    ]
    torch.testing.assert_close(
        prior.dense().covariance, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("shape", FIXED)
def test_learned_is_likelier_than_stationary_on_its_own_kind(shape: Shape) -> None:
    """Held-out images of the same kind; and of another kind it is the other way round."""
    learned = LearnedGaussianPrior(shape, _smooth(400, shape, seed=1)).dense()
    stationary = GaussianPrior(shape).dense()

    def likelihood(dense: Gaussian, x: Tensor) -> float:
        return float((-0.5 * (dense.energy(x.flatten(1)) + dense.log_det)).mean())

    held_out = _smooth(50, shape, seed=2)
    assert likelihood(learned, held_out) > likelihood(stationary, held_out) + 1
    # A draw of the stationary prior is likelier under it.
    drawn = GaussianPrior(shape).image(_random(50, *GaussianPrior(shape).latent_shape))
    assert likelihood(learned, drawn) < likelihood(stationary, drawn)


def test_learned_mean_is_mirrored() -> None:
    images = _smooth(6, (2, 3, 5))
    prior = LearnedGaussianPrior((2, 3, 5), images)
    torch.testing.assert_close(prior.mean, prior.mean.flip(2))
    torch.testing.assert_close(prior.mean, (images.mean(0) + images.mean(0).flip(2)) / 2)


def test_unknown_names_and_options_are_refused() -> None:
    shape = (1, 4, 4)
    with pytest.raises(UnknownNameError, match="did you mean 'gaussian'"):
        make_prior("gausian", shape)
    for name in ("gaussian:learned", "patches:learned"):
        with pytest.raises(InvalidInputError, match=f"prior '{name}' is learned from public"):
            make_prior(name, shape)
        with pytest.raises(InvalidInputError, match="at least two"):
            make_prior(name, shape, public=_smooth(1, shape))
        with pytest.raises(InvalidInputError, match=r"shape \(1, 5, 4\), the clients' \(1, 4, 4\)"):
            make_prior(name, shape, public=_smooth(4, (1, 5, 4)))
        broken = _smooth(4, shape)
        broken[2, 0, 1, 1] = math.nan
        with pytest.raises(InvalidInputError, match="NaN"):
            make_prior(name, shape, public=broken)
    with pytest.raises(InvalidInputError, match="up to 4096 values"):
        make_prior("gaussian:learned", (1, 65, 64), public=_smooth(2, (1, 65, 64)))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gaussian", {"rho": 1.0}, r"rho must lie in \[0, 1\)"),
        ("gaussian", {"colour": -0.1}, "colour must lie"),
        ("gaussian", {"sigma": 0.0}, "sigma"),
        ("gaussian", {"floor": -1e-9}, "floor"),
        ("gaussian", {"power": 2.5}, r"power must lie in \(0, 2\]"),
        ("gaussian", {"mean": math.nan}, "mean must be a finite number"),
        ("gaussian", {"sigma": "wide"}, "sigma must be a number"),
        ("gaussian", {"rho": True}, "rho must be a number"),
        ("gaussian", {"roh": 0.9}, "'roh'"),
        ("gaussian", {"roh": 0.9}, "Known: .*rho"),
        ("tv", {"scale": 0.0}, "scale must be a number above 0"),
        ("tv", {"scale": math.nan}, "scale"),
        ("tv", {"scale": True}, "scale"),
        ("tv", {"scael": 0.1}, "'scael'.*Known: .*scale"),
        ("patches", {"size": 3}, "'size'"),
    ],
)
def test_bad_options_by_name(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        make_prior(name, (1, 4, 4), **options)


def _two_kinds(count: int) -> Tensor:
    """Return 4x4 images: half dark and level, half bright and noisy."""
    noise = _random(count, 1, 4, 4, seed=3)
    bright = (torch.arange(count) % 2).double().reshape(-1, 1, 1, 1)
    return 0.2 + 0.5 * bright + (0.01 + 0.05 * bright) * noise


def test_mixture_finds_two_clusters() -> None:
    mixture = PatchMixture(_two_kinds(800), size=3, components=2)
    dark, bright = mixture.means.mean(1).sort().indices.tolist()
    torch.testing.assert_close(
        mixture.weights, torch.full((2,), 0.5, dtype=torch.float64), atol=0.05, rtol=0
    )
    for k, level, spread in ((dark, 0.2, 0.01), (bright, 0.7, 0.06)):
        mean = torch.full((9,), level, dtype=torch.float64)
        torch.testing.assert_close(mixture.means[k], mean, atol=0.02, rtol=0)
        found = mixture.covariances[k].diagonal().mean().sqrt()
        assert float(found) == pytest.approx(spread, rel=0.4)
    eye = torch.eye(9, dtype=torch.float64).expand(2, 9, 9)
    torch.testing.assert_close(mixture.precisions @ mixture.covariances, eye, atol=1e-6, rtol=0)


def test_mixture_is_reproducible() -> None:
    a, b = (PatchMixture(_two_kinds(200), size=3, components=3) for _ in range(2))
    assert torch.equal(a.covariances, b.covariances)
    assert torch.equal(a.means, b.means)


def test_responsibilities() -> None:
    """Bayes' rule where patches are known; what is uncertain chooses nothing narrow."""
    mixture = PatchMixture(_two_kinds(800), size=3, components=2)
    dark, bright = mixture.means.mean(1).sort().indices.tolist()
    x = mixture.means[:1] + 0.03 * _random(7, 9)
    nothing = torch.zeros(7, 9, 9, dtype=torch.float64)
    known = mixture.responsibilities(x, nothing)
    density = torch.stack(
        [
            torch.distributions.MultivariateNormal(m, c).log_prob(x)
            for m, c in zip(mixture.means, mixture.covariances, strict=True)
        ],
        1,
    )
    torch.testing.assert_close(known, (density + mixture.weights.log()).softmax(1))
    vague = mixture.responsibilities(x, nothing + 0.04 * torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(vague.sum(1), torch.ones(7, dtype=torch.float64))
    level = mixture.means[dark].expand(1, 9)
    sure = mixture.responsibilities(level, nothing[:1])
    unsure = mixture.responsibilities(level, nothing[:1] + 0.04 * torch.eye(9, dtype=torch.float64))
    assert float(sure[0, dark]) > 0.99
    assert float(unsure[0, bright]) > 0.99  # the broad one: the dark one would claim to know


def test_uncertainty_that_components_share_decides_nothing() -> None:
    mixture = PatchMixture(_two_kinds(800), size=3, components=2)
    mixture.covariances[1] = mixture.covariances[0]
    mixture.precisions[1] = mixture.precisions[0]
    mixture.log_dets[1] = mixture.log_dets[0]
    x = mixture.means.mean(0) + 0.01 * _random(5, 9)
    nothing = torch.zeros(5, 9, 9, dtype=torch.float64)
    much = nothing + torch.eye(9, dtype=torch.float64)
    known = mixture.responsibilities(x, nothing)
    torch.testing.assert_close(mixture.responsibilities(x, much), known, atol=1e-6, rtol=0)


def test_local_is_the_product_of_the_patches() -> None:
    """Against sums over patches with loops, two channels and a non-square image."""
    shape: Shape = (2, 4, 5)
    mixture = PatchMixture(_smooth(60, shape), size=3, components=3)
    prior = PatchPrior(GaussianPrior(shape), mixture)
    image = _smooth(1, shape, seed=9).reshape(-1)
    root = 0.05 * _random(40, 40)
    covariance = root @ root.T / 40
    found = prior.local(image, covariance)
    precision = torch.zeros(40, 40, dtype=torch.float64)
    pull = torch.zeros(40, dtype=torch.float64)
    for top in range(2):
        for left in range(3):
            pixels = [
                c * 20 + (top + i) * 5 + left + j
                for c in range(2)
                for i in range(3)
                for j in range(3)
            ]
            pick = torch.eye(40, dtype=torch.float64)[pixels]
            errors = (pick @ covariance @ pick.T).unsqueeze(0)
            share = mixture.responsibilities((pick @ image).unsqueeze(0), errors)[0]
            for k in range(len(share)):
                inverse = torch.linalg.inv(mixture.covariances[k])
                precision += share[k] * pick.T @ inverse @ pick / 9
                pull += share[k] * pick.T @ inverse @ mixture.means[k] / 9
    torch.testing.assert_close(found.precision, precision, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(found.mean, torch.linalg.solve(precision, pull), atol=1e-7, rtol=0)
    torch.testing.assert_close(found.covariance, found.covariance.T, atol=1e-12, rtol=0)


def test_only_patches_have_more_than_one_normal_distribution() -> None:
    prior = _prior("gaussian", (1, 4, 4))
    dense = prior.dense()
    assert prior.local(dense.mean, dense.covariance) is dense


@pytest.mark.parametrize("shape", [(1, 6, 9), (3, 7, 5)])
def test_dead_leaves(shape: Shape) -> None:
    images = dead_leaves(shape, count=12, leaves=15, seed=4)
    assert images.shape == (12, *shape)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) < 0.3
    assert 0.7 < float(images.max()) <= 1
    assert torch.equal(images, dead_leaves(shape, count=12, leaves=15, seed=4))
    assert not torch.equal(images, dead_leaves(shape, count=12, leaves=15, seed=5))
    # Neighbours are alike, images are not.
    centred = images - images.mean()
    step = (centred[..., 1:] - centred[..., :-1]).square().mean()
    assert float(step) < 0.7 * float(centred.square().mean())
    assert float((images[0] - images[1]).abs().max()) > 0.05


def test_dead_leaves_ignore_the_global_generator() -> None:
    torch.manual_seed(1)
    first = dead_leaves((1, 4, 4), count=3, leaves=4)
    before = torch.random.get_rng_state()
    assert torch.equal(dead_leaves((1, 4, 4), count=3, leaves=4), first)
    assert torch.equal(torch.random.get_rng_state(), before)
