"""One layer's gradient against dense oracles, over geometries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedleak.errors import InvalidInputError
from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kernels.rows import Rows, solve_rows


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv2d, tuple[int, int]]:
    """A convolution of few channels and the size of its input."""
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "replicate", "reflect"]))
    conv = nn.Conv2d(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding=draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        padding_mode=mode,
    )
    return conv.double(), draw(st.tuples(st.integers(5, 7), st.integers(5, 7)))


def example(conv: nn.Conv2d, size: tuple[int, int], images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an input, the derivative by the output, and the weight's gradient by autograd."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, conv.in_channels, *size, generator=generator, dtype=torch.float64)
    out = conv(x)
    e = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return x, e, torch.autograd.grad((out * e).sum(), conv.weight)[0]


@given(convolutions(), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_the_geometry_is_torchs(drawn: tuple[nn.Conv2d, tuple[int, int]], images: int) -> None:
    conv, size = drawn
    x, e, gradient = example(conv, size, images)
    geometry = Geometry.of(conv, size)
    assert geometry.out == tuple(e.shape[2:])
    assert torch.allclose(geometry.gradient(x, e), gradient.flatten(2))
    patches = geometry.patches(x).unflatten(1, (conv.groups, -1)).flatten(2, 3)
    weight = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))
    out = (weight @ patches).flatten(1, 2) + conv.bias[:, None]
    assert torch.allclose(out.unflatten(2, geometry.out), conv(x))


@given(convolutions(), st.integers(1, 2))
@settings(deadline=None, max_examples=60)
def test_rows_against_dense(drawn: tuple[nn.Conv2d, tuple[int, int]], images: int) -> None:
    conv, size = drawn
    x, e, gradient = example(conv, size, images)
    geometry = Geometry.of(conv, size)
    found = solve_rows(Rows(gradient, e, geometry))
    assert found.residual < 1e-9

    def of_input(v: Tensor) -> Tensor:
        pull = torch.func.vjp(lambda w: _conv(conv, v, w), conv.weight)[1]
        return pull(e)[0]

    # Directions are open exactly as the dense Jacobian of the whole gradient says.
    jacobian = torch.func.jacfwd(of_input)(x).flatten(len(gradient.shape)).flatten(0, 3)
    rank = int(torch.linalg.matrix_rank(jacobian, rtol=1e-8))
    per_group = conv.in_channels // conv.groups
    open_ = int(found.open.square().sum((1, 2)).round().sum()) * per_group
    assert open_ == x.numel() - rank
    if open_ == 0:
        assert torch.allclose(found.values, x, atol=1e-6)
        assert found.error < 1e-4
    else:
        assert found.error == float("inf")
        assert torch.allclose(of_input(found.values), gradient, atol=1e-6)
        assert found.values.norm() < x.norm() * (1 + 1e-9)


def _conv(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    padding = conv.padding if conv.padding_mode == "zeros" else 0
    return F.conv2d(x, weight, None, conv.stride, padding, conv.dilation, conv.groups)


def test_a_block_and_its_shortcut_are_solved_together() -> None:
    torch.manual_seed(0)
    main = nn.Conv2d(4, 8, 3, 2, 1, bias=False).double()
    short = nn.Conv2d(4, 8, 1, 2, bias=False).double()
    x, e, gradient = example(main, (4, 4), 1)
    e_short = torch.randn_like(e)
    pulled = torch.autograd.grad((short(x) * e_short).sum(), short.weight)[0]
    parts = (
        Rows(gradient.float(), e, Geometry.of(main, (4, 4))),
        Rows(pulled.float(), e_short, Geometry.of(short, (4, 4))),
    )
    found = solve_rows(*parts)
    error = float((found.values - x).norm() / x.norm())
    assert found.values.dtype == torch.float64
    assert error < 1e-5
    assert error / 5 < found.error < error * 5  # the estimate is of the error's size
    with pytest.raises(InvalidInputError, match="same tensor"):
        solve_rows(parts[0], Rows(pulled, e_short, Geometry.of(short, (3, 3))))


def test_a_wrong_cotangent_shows_in_the_residual() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 16, 3, padding=1).double()
    _, e, gradient = example(conv, (4, 4), 1)
    geometry = Geometry.of(conv, (4, 4))
    assert solve_rows(Rows(gradient, e, geometry)).residual < 1e-12
    e[0, 3, 1, 1] = 0
    assert solve_rows(Rows(gradient, e, geometry)).residual > 1e-3


def test_rows_of_another_shape_are_refused() -> None:
    geometry = Geometry((4, 4), (3, 3), padding=(1, 1, 1, 1))
    with pytest.raises(InvalidInputError, match="the geometry and the gradient say"):
        Rows(torch.zeros(2, 1, 3, 3), torch.zeros(1, 2, 4, 3), geometry)
    with pytest.raises(InvalidInputError, match="kernel"):
        Rows(torch.zeros(2, 1, 2, 2), torch.zeros(1, 2, 4, 4), geometry)
    with pytest.raises(InvalidInputError, match="smaller than the kernel"):
        Geometry((2, 2), (3, 3))
