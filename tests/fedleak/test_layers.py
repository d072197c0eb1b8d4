"""Layers beyond the paper: against torch, against dense matrices, and in the recursion."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedleak.attacks import LinearAttack, Reconstruction
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.linear import LinearSolution, solve_recursively
from fedleak.defences import DefenceSpec, defend
from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.metric import exact_rank, security_metric, structural_rank
from fedleak.observation import Observation
from fedleak.quality import score
from fedleak.systems import LAYERS, Chain, Layer, Rows
from fedleak.systems.conv import Conv
from fedleak.systems.dense import dense_system
from fedleak.systems.pooling import AvgPool, MaxPool
from fedleak.threat import ThreatModel
from tests.conftest import client_gradient, photo_patches
from tests.fedleak.test_systems import convolutions

Observe = Callable[[nn.Module, Tensor, int], Observation]


def _read(module: nn.Module, shape: tuple[int, ...]) -> Layer:
    out = module.double().eval()(torch.zeros(1, *shape, dtype=torch.float64))
    reader = LAYERS.reader_of(module)
    assert reader is not None
    return reader("layer", module, shape, tuple(out.shape[1:]))


def _small() -> Tensor:
    return F.interpolate(photo_patches(1), size=(8, 8), mode="area")[0]


@st.composite
def poolings(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, int, int]]:
    """Draw a pooling module of any geometry, and the shape of its input."""
    kind = draw(st.sampled_from(["avg", "max", "adaptive"]))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    size = tuple(k + draw(st.integers(0, 6)) for k in kernel)
    shape = (draw(st.integers(1, 3)), *size)
    if kind == "adaptive":
        out = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        shape = (shape[0], out[0] * kernel[0], out[1] * kernel[1])
        return nn.AdaptiveAvgPool2d(out), shape
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    if kind == "avg":
        include, divisor = draw(st.booleans()), draw(st.sampled_from([None, 3]))
        return nn.AvgPool2d(kernel, stride, padding, False, include, divisor), shape
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    shape = (shape[0], *(n + (d - 1) * k for n, d, k in zip(size, dilation, kernel, strict=True)))
    return nn.MaxPool2d(kernel, stride, padding, dilation), shape


@st.composite
def pointwise(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Draw an activation or a normalisation, and the shape of its input."""
    shape = draw(st.sampled_from([(3, 4, 5), (1, 6, 2), (7,), (2, 5)]))
    kinds = [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.8), nn.ReLU(inplace=True)]
    torch.manual_seed(draw(st.integers(0, 1000)))
    norm = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(
        shape[0], affine=draw(st.booleans())
    )
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return draw(st.sampled_from([*kinds, norm])), shape


@given(st.one_of(poolings(), pointwise()))
@settings(max_examples=80, deadline=None)
def test_a_layer_is_torchs(drawn: tuple[nn.Module, tuple[int, ...]]) -> None:
    """Forward, input gradient and parameter gradients for random geometries."""
    module, shape = drawn
    layer = _read(module, shape)
    x = (2 * torch.randn(2, *shape, dtype=torch.float64)).requires_grad_()
    z = module(x.clone())
    torch.testing.assert_close(layer.forward(x), z)
    e = torch.randn_like(z)
    (d,) = torch.autograd.grad(z, x, e)
    torch.testing.assert_close(layer.backward(x, z, e), d)
    made = layer.gradients(x, e)
    assert set(made) == {f"layer.{n}" for n, _ in module.named_parameters()}
    for n in range(2 if made else 0):
        expected = torch.autograd.grad(module(x[n : n + 1]), module.parameters(), e[n : n + 1])
        for (name, _), value in zip(module.named_parameters(), expected, strict=True):
            torch.testing.assert_close(made[f"layer.{name}"][n], value)


@given(poolings())
@settings(max_examples=60, deadline=None)
def test_average_pooling_is_a_linear_system(drawn: tuple[nn.Module, tuple[int, int, int]]) -> None:
    """<A x, r> = <x, A^T r>, and the rank is that of the dense matrix."""
    layer = _read(*drawn)
    if not isinstance(layer, AvgPool):
        return
    x = torch.randn(1, *layer.in_shape, dtype=torch.float64)
    r = torch.randn(1, *layer.out_shape, dtype=torch.float64)
    rows = Rows(r, r.new_zeros(1, 0))
    left = (layer.apply(x, r).weight * r).sum()
    torch.testing.assert_close(left, (x * layer.adjoint(rows, r)).sum())
    basis = torch.eye(layer.unknowns, dtype=torch.float64).reshape(-1, *layer.in_shape)
    dense = layer.forward(basis).flatten(1)
    assert layer.rank == int(torch.linalg.matrix_rank(dense))


@given(poolings())
@settings(max_examples=60, deadline=None)
def test_max_pooling_is_inverted_as_far_as_it_goes(
    drawn: tuple[nn.Module, tuple[int, int, int]],
) -> None:
    """The estimate gives the same output, lies above the truth, and keeps all of the error."""
    layer = _read(*drawn)
    if not isinstance(layer, MaxPool):
        return
    x = torch.randn(2, *layer.in_shape, dtype=torch.float64)
    z = layer.forward(x)
    e = torch.randn_like(z)
    guess, d = layer.estimate(z, e)
    torch.testing.assert_close(layer.forward(guess), z)
    covered = layer.estimate(torch.ones_like(z), e)[0] > 0
    assert bool((guess >= x)[covered].all())
    torch.testing.assert_close(d.sum(), e.sum())
    assert layer.rank <= layer.unknowns


@given(pointwise())
@settings(max_examples=40, deadline=None)
def test_undoing_a_layer(drawn: tuple[nn.Module, tuple[int, ...]]) -> None:
    """What is undone with finite deviation is the truth; what is lost gives the same output."""
    layer = _read(*drawn)
    x = torch.randn(2, *layer.in_shape, dtype=torch.float64)
    z = layer.forward(x)
    found, deviation = layer.undo(z + 1e-12 * torch.randn_like(z), 1e-12 * torch.ones_like(z))  # type: ignore[attr-defined]
    torch.testing.assert_close(layer.forward(found), z, atol=1e-6, rtol=0)
    sure = deviation.isfinite()
    torch.testing.assert_close(found[sure], x[sure], atol=1e-6, rtol=0)
    assert bool(sure.any())


class _Vgg(nn.Module):
    """Modules, functions and methods, in place and not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.second, self.norm2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.hidden, self.norm3 = nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False)
        self.head = nn.Linear(8, 5, bias=False)
        for norm in (self.norm, self.norm2, self.norm3):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.first(x)).relu_())
        x = F.max_pool2d(F.relu(self.norm2(self.second(x)), inplace=True), 3, 2, padding=1)
        x = F.hardtanh(F.avg_pool2d(x, (2, 1), stride=1), -2.0, 2.0)
        x = F.adaptive_avg_pool2d(torch.relu(x), (1, 1)).mean(dim=(-1, 2))
        return self.head(self.norm3(F.relu6(self.hidden(x))))


def test_gradients_of_a_vgg_are_autograds() -> None:
    torch.manual_seed(0)
    model = _Vgg().double().eval()
    x = torch.rand(3, 2, 12, 8, dtype=torch.float64)
    labels = torch.tensor([1, 3, 0])
    gradients = Chain.read(model, (2, 12, 8)).trace(x, labels).gradients
    for n in range(3):
        expected = client_gradient(model, x[n], int(labels[n]))
        assert set(gradients) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(gradients[key][n], value)


@given(convolutions(), st.integers(0, 1000), st.sampled_from([0.3, 0.6, 1.0]))
@settings(max_examples=40, deadline=None)
def test_ranks_with_unknown_outputs(layer: Conv, seed: int, share: float) -> None:
    """Exact against a dense SVD; the count never below; the probe agrees on what is full."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, *layer.out_shape)
    known = torch.rand(shape, generator=generator) < share
    e = torch.randn(shape, generator=generator, dtype=torch.float64) * known
    masks = known[0].reshape(layer.groups, -1)
    expected = 0
    for (a, k), mask in zip(dense_system(layer, e[0]), masks, strict=True):
        blocks = [m / torch.linalg.matrix_norm(m, 2) for m in (a[mask], k) if bool((m != 0).any())]
        values = torch.linalg.svdvals(torch.cat(blocks)) if blocks else torch.zeros(1)
        if bool(((values > 1e-10 * values[0]) & (values < 1e-4 * values[0])).any()):
            return  # a singular value near the threshold: no clear rank
        expected += int((values > 1e-7 * values[0]).sum()) if values[0] > 0 else 0
    found = exact_rank(layer, e[0], known[0])
    assert found == expected
    assert (
        structural_rank(layer, e[0], known[0]) >= found
        or layer.windows.padded != (layer.in_shape[1:])
    )
    assert [int(r) for r in layer.ranks(e, known)[0]] == [found]
    probed = int(layer.probed_rank(e, known)[0])
    assert (probed == layer.unknowns) == (found == layer.unknowns)


def _attack(
    observe: Observe, model: nn.Module, image: Tensor, label: int
) -> tuple[Reconstruction, LinearSolution, int]:
    seen = [observe(model, image, label)]
    evidence = Evidence.gather(seen, "cpu")
    solution = solve_recursively(evidence)
    (result,) = LinearAttack()(seen)
    return result, solution, solution.undetermined(evidence.chain.layers)


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, -1.5, -0.5)
    return norm


def _hidden(bias: bool, classes: int = 10, activation: Callable[[], nn.Module] = nn.Tanh) -> list:
    return [
        nn.Flatten(), nn.Linear(192, 50, bias=bias), activation(),
        nn.Linear(50, 30, bias=not bias), activation(), nn.Linear(30, classes, bias=bias),
    ]  # fmt: skip


def _head(features: int, classes: int = 10, bias: bool = True) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, classes, bias=bias)]


EXACT: dict[str, Callable[[], list[nn.Module]]] = {
    "relu": lambda: [nn.Conv2d(3, 24, 3), nn.ReLU(), *_head(24 * 36)],
    "relu6": lambda: [nn.Conv2d(3, 24, 3), nn.ReLU6(), *_head(24 * 36)],
    "two relu": lambda: [
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(True), nn.Conv2d(16, 48, 3, padding=1), nn.ReLU(),
        *_head(48 * 64),
    ],
    "norm": lambda: [nn.Conv2d(3, 8, 3), _norm(8), nn.Tanh(), *_head(8 * 36)],
    "norm relu": lambda: [nn.Conv2d(3, 24, 3), _norm(24), nn.ReLU(), *_head(24 * 36)],
    "dense": lambda: _hidden(True),
    "dense without bias": lambda: [
        nn.Flatten(), nn.Linear(192, 50, bias=False), nn.Tanh(), nn.Linear(50, 30, bias=False),
        nn.Tanh(), nn.Linear(30, 10, bias=False),
    ],
    "dense relu": lambda: _hidden(False, activation=nn.ReLU),
    "head without bias": lambda: [nn.Conv2d(3, 8, 3), nn.Tanh(), *_head(8 * 36, bias=False)],
    "three classes": lambda: [nn.Conv2d(3, 8, 3), nn.Tanh(), *_head(8 * 36, 3, False)],
    "two classes": lambda: [nn.Conv2d(3, 8, 3), nn.Sigmoid(), *_head(8 * 36, 2, False)],
    "odd network": lambda: _hidden(False, 2),
    "saturated": lambda: [_loud(nn.Conv2d(3, 12, 3), 10), nn.Tanh(), *_head(12 * 36)],
}  # fmt: skip


def _loud(conv: nn.Conv2d, factor: float) -> nn.Conv2d:
    with torch.no_grad():
        conv.weight.mul_(factor)
    return conv


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("label", [0, 1])
def test_what_is_determined_is_exact(name: str, label: int, observe: Observe) -> None:
    """Full rank from float32 gradients: the image to rounding, and the label."""
    torch.manual_seed(3)
    model = nn.Sequential(*EXACT[name]()).eval()
    image = _small()
    result, solution, depth = _attack(observe, model, image, label)
    assert depth == 0
    assert all(int(s.rank) == s.unknowns for s in solution.layers)
    assert int(result.labels) == label
    assert score(result.images[0], image).psnr_db > 100
    assert result.fit < 1e-5


def _pooled(pool: nn.Module, activation: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), activation(), pool, nn.Conv2d(8, 32, 3, padding=1),
        activation(), *_head(512),
    )  # fmt: skip


OPEN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "average": (lambda: _pooled(nn.AvgPool2d(2), nn.Tanh), 3),
    "maximum": (lambda: _pooled(nn.MaxPool2d(2), nn.Tanh), 3),
    "maximum after relu": (lambda: _pooled(nn.MaxPool2d(3, 2, 1), nn.ReLU), 3),
    # What a ReLU hides is not known: matching must start from its output.
    "narrow relu": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *_head(144)), 2),
    "saturated": (
        lambda: nn.Sequential(_loud(nn.Conv2d(3, 12, 3), 300), nn.Tanh(), *_head(432)),
        2,
    ),
}


@pytest.mark.parametrize("name", OPEN)
def test_what_is_left_open_is_said(name: str, observe: Observe) -> None:
    torch.manual_seed(0)
    make, expected = OPEN[name]
    model, image = make().eval(), _small()
    result, solution, depth = _attack(observe, model, image, 2)
    assert depth == expected
    assert int(result.labels) == 2
    assert bool(result.images.isfinite().all())
    # What is claimed to be known, is.
    chain = Chain.read(model, (3, 8, 8))
    trace = chain.trace(image[None].double(), torch.tensor([2]))
    for found, truth in (
        (solution.values[depth], trace.inputs[depth]),
        (solution.cotangents[depth], trace.cotangents[depth - 1]),
    ):
        torch.testing.assert_close(found, truth, atol=1e-5 * float(truth.abs().max()), rtol=1e-3)


def test_the_worst_update_decides(observe: Observe) -> None:
    """Ranks are those of each update; what is left open is open for one of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), *_head(12 * 36))
    with torch.no_grad():
        model[0].weight.abs_()
    bright = _small()
    dark = bright.clone()
    dark[:, :, 2:] *= -1  # no filter sees anything there
    alone = [_attack(observe, model, x, 1) for x in (bright, dark)]
    ranks = [int(solution.layers[0].rank) for _, solution, _ in alone]
    assert ranks[1] < ranks[0] == 192
    assert [depth for *_, depth in alone] == [0, 2]
    evidence = Evidence.gather([observe(model, x, 1) for x in (bright, dark)], "cpu")
    together = solve_recursively(evidence)
    assert together.layers[0].rank.tolist() == ranks
    assert together.undetermined(evidence.chain.layers) == 2
    first = together.subset(torch.tensor([True, False]))
    assert first.undetermined(evidence.chain.layers) == 0
    assert score(together.image[0, 0], bright).psnr_db > 100


def test_a_dead_channel_is_unknown_and_nothing_is_nan(observe: Observe) -> None:
    torch.manual_seed(0)
    norm = _norm(24)
    model = nn.Sequential(nn.Conv2d(3, 24, 3), norm, nn.Tanh(), *_head(24 * 36)).eval()
    with torch.no_grad():
        norm.weight[:3] = 0
    result, _, depth = _attack(observe, model, _small(), 1)
    assert depth == 0
    assert score(result.images[0], _small()).psnr_db > 100
    with torch.no_grad():
        norm.weight.zero_()
    model[1].bias.requires_grad_(True)
    result, solution, depth = _attack(observe, model, _small(), 1)
    assert depth == 2  # below it nothing comes through at all
    assert int(solution.layers[0].rank) == 0
    assert bool(result.images.isfinite().all())


@pytest.mark.parametrize(("noise", "least"), [(1e-3, 60), (1e-2, 43), (1e-1, 24)])
def test_noise_does_not_wake_inactive_units(noise: float, least: float, observe: Observe) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*EXACT["relu"]())
    clean = observe(model, _small(), 4)
    update = defend(clean.gradient, DefenceSpec("noise", noise), 0)
    (result,) = LinearAttack()([Observation.from_gradient(model, update, (3, 8, 8))])
    assert int(result.labels) == 4
    assert score(result.images[0], _small()).psnr_db > least


def test_a_granted_label_is_kept_with_two_classes(observe: Observe) -> None:
    """Both labels explain such a head; a known one is not put in doubt."""
    torch.manual_seed(3)
    model = nn.Sequential(*EXACT["two classes"]())
    seen = observe(model, _small(), 0)
    told = seen.with_terms(labels=(1,), threat=ThreatModel(labels=True))
    assert int(LinearAttack()([told])[0].labels) == 1


def test_c_metric_counts_what_binds() -> None:
    """Exact and counted agree; ReLU and pools lower the metric, and need no layer of theirs."""

    def made(activation: Callable[[], nn.Module], pool: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), activation(), pool, nn.Conv2d(6, 8, 3, padding=1), activation(),
            *_head(8 * 64 if isinstance(pool, nn.Identity) else 8 * 16),
        )  # fmt: skip

    found = {}
    for name, model in {
        "tanh": made(nn.Tanh, nn.Identity()),
        "relu": made(nn.ReLU, nn.Identity()),
        "average": made(nn.Tanh, nn.AvgPool2d(2)),
        "maximum": made(nn.Tanh, nn.MaxPool2d(2)),
    }.items():
        exact, fast = (security_metric(model, (3, 10, 10), m) for m in ("exact", "structural"))
        assert len(exact.layers) == 2
        assert abs(exact.c - fast.c) <= 0.05 * 300
        found[name] = exact.c
    assert max(found, key=lambda k: found[k]) == "tanh"


REFUSED = {
    "layer '1' uses batch statistics": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
    "track_running_stats=False": nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)).eval(),
    "ceil_mode": nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True)),
    "windows of different sizes": nn.Sequential(nn.AdaptiveAvgPool2d(3)),
    "hybrid attack matches such a model": nn.Sequential(nn.GELU(), nn.Flatten(), nn.Linear(64, 2)),
    "mixes the images": nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (8, 8))),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals_name_the_layer_and_the_reason(words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        Chain.read(REFUSED[words], (1, 8, 8))


def test_models_in_the_mode_of_the_clients() -> None:
    """Dropout in evaluation mode does nothing, and NaN weights are an error of their own."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(UnsupportedModelError, match="dropout"):
        Chain.read(model, (1, 8, 8))
    assert Chain.read(model.eval(), (1, 8, 8)).head.out_shape == (3,)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(InvalidInputError, match=r"'2.weight' holds NaN"):
        Chain.read(model, (1, 8, 8))
