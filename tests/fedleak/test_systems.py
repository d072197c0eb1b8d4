"""Layers against torch, and against dense matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.models import MODELS, PAPER_NETWORKS, build_model
from fedleak.systems import Chain, Rows
from fedleak.systems.conv import Conv
from fedleak.systems.dense import dense_system
from tests.conftest import client_gradient


@st.composite
def convolutions(draw: st.DrawFn) -> Conv:
    groups = draw(st.sampled_from([1, 1, 2]))
    channels, filters = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = draw(st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just("same")))
    stride = (1, 1) if padding == "same" else (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    module = nn.Conv2d(
        channels, filters, kernel, stride, padding, dilation, groups, bias=draw(st.booleans())
    ).double()
    least = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    height, width = (draw(st.integers(n, n + 5)) for n in least)
    shape = (channels, height, width)
    out = module(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:]
    layer = Conv.read("conv", module, shape, tuple(out))
    layer.module = module  # type: ignore[attr-defined]
    return layer


@given(convolutions())
@settings(max_examples=60, deadline=None)
def test_convolution_is_torchs(layer: Conv) -> None:
    """Forward, input gradient and weight gradient for random geometries."""
    module: nn.Conv2d = layer.module  # type: ignore[attr-defined]
    x = torch.randn(2, *layer.in_shape, dtype=torch.float64, requires_grad=True)
    z = module(x)
    torch.testing.assert_close(layer.forward(x), z)
    e = torch.randn_like(z)
    (d,) = torch.autograd.grad(z, x, e, retain_graph=True)
    torch.testing.assert_close(layer.backward(x, z, e), d)
    gradients = layer.gradients(x, e)
    for n in range(2):
        single = module(x[n : n + 1])
        expected = torch.autograd.grad(single, list(module.parameters()), e[n : n + 1])
        for (name, _), value in zip(module.named_parameters(), expected, strict=True):
            torch.testing.assert_close(gradients[f"conv.{name}"][n], value)


@given(convolutions())
@settings(max_examples=40, deadline=None)
def test_system_adjoint_and_dense_oracle(layer: Conv) -> None:
    """<U x, r> = <x, U^T r>, and U is the dense matrix of each group."""
    x = torch.randn(1, *layer.in_shape, dtype=torch.float64)
    e = torch.randn(1, *layer.out_shape, dtype=torch.float64)
    rows = layer.apply(x, e)
    r = Rows(torch.randn_like(rows.weight), torch.randn_like(rows.gradient))
    left = (rows.weight * r.weight).sum() + (rows.gradient * r.gradient).sum()
    torch.testing.assert_close(left, (x * layer.adjoint(r, e)).sum())

    inputs = x.reshape(layer.groups, -1)
    dense = dense_system(layer, e[0])
    weight = torch.cat([a @ v for (a, _), v in zip(dense, inputs, strict=True)])
    gradient = torch.cat([k @ v for (_, k), v in zip(dense, inputs, strict=True)])
    torch.testing.assert_close(weight, rows.weight.flatten())
    torch.testing.assert_close(gradient, rows.gradient.flatten())


class _Functional(nn.Module):
    """A forward method with functions and methods in place of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding="same")
        self.second = nn.Conv2d(3, 2, (2, 3), stride=2, groups=1)
        self.hidden = nn.Linear(2 * 4 * 3, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), 0.2)
        x = torch.sigmoid(self.second(x))
        x = x.view(x.size(0), -1)
        return self.head(self.hidden(x).tanh())


@pytest.mark.parametrize("name", [*PAPER_NETWORKS, "functional"])
def test_chain_gradients_are_autograds(name: str) -> None:
    """One trace gives every client's gradient, in float64, for many images at once."""
    if name == "functional":
        torch.manual_seed(0)
        model, shape, classes = _Functional().double(), (1, 8, 8), 4
    else:
        shape, classes = (3, 32, 32), 10
        model = build_model(name, shape, classes, seed=1).double()
    x = torch.rand(2, *shape, dtype=torch.float64)
    labels = torch.tensor([1, 3])
    gradients = Chain.read(model, shape).trace(x, labels).gradients
    for n in range(2):
        expected = client_gradient(model, x[n], int(labels[n]))
        assert set(gradients) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(gradients[key][n], value)


def test_reading_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Chain.read(model, (1, 8, 8))
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.conv(x)).flatten(1))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(72, 3)),
            "'1' (GELU)",
        ),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()), "does not end in a fully connected"),
        (_Residual(), "residual"),
        (nn.Sequential(nn.LeakyReLU(0.0), nn.Flatten(), nn.Linear(64, 3)), "slope"),
        (
            nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")),
            "padding_mode 'reflect'",
        ),
    ],
)
def test_unsupported_models_are_named(model: nn.Module, words: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        Chain.read(model, (1, 8, 8))
    assert words in str(caught.value)


def test_an_image_that_does_not_fit() -> None:
    model = build_model("cnn2-v1", (3, 32, 32), 10)
    with pytest.raises(InvalidInputError, match=r"\(3, 16, 16\)"):
        Chain.read(model, (3, 16, 16))


def test_every_named_model_is_a_chain() -> None:
    for name in MODELS:
        chain = Chain.read(build_model(name, (3, 32, 32), 7), (3, 32, 32))
        assert chain.head.out_shape == (7,)
        assert chain.input_shape == (3, 32, 32)
