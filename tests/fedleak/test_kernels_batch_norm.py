"""The input of a convolution before a normalisation by its own statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedleak.errors import InvalidInputError
from fedleak.graph.kernels.batch_norm import (
    Normalised,
    derivative_above,
    image_factors,
    solve_normalised,
    zero_sum_factors,
)
from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kernels.refusal import Refused

NORMS = {
    "batch": lambda c: nn.BatchNorm2d(c),
    "group": lambda c: nn.GroupNorm(4, c),
    "instance": lambda c: nn.GroupNorm(c, c),
    "layer": lambda c: nn.GroupNorm(1, c),
}
WIDE = 24


class Client:
    """Convolution, normalisation and ReLU in float32; or a shortcut added before the ReLU."""

    def __init__(
        self, norm: str, images: int, stride: int, shortcut: bool, seed: int, size: int = 4
    ):
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(WIDE, WIDE, 3, stride, 1, bias=False)
        self.norm = NORMS[norm](WIDE).train()
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.bias.uniform_(-0.2, 0.2)
        self.x = torch.randn(images, WIDE, size, size).relu()
        self.z = self.conv(self.x)
        self.y = self.norm(self.z)
        self.y.retain_grad()
        self.z.retain_grad()
        out = (self.y + torch.randn(self.y.shape) if shortcut else self.y).relu()
        loss = (out * torch.randn(out.shape)).sum()
        loss.backward()
        self.shortcut = shortcut

    def part(self) -> Normalised:
        y, w, b = self.y.detach(), self.norm.weight.detach(), self.norm.bias.detach()
        known = (y - b[:, None, None]) / w[:, None, None]
        active = y > 0
        return Normalised(
            self.conv.weight.grad,
            self.conv.weight.detach(),
            Geometry.of(self.conv, tuple(self.x.shape[2:])),
            self.y.grad,
            w,
            self.norm.weight.grad,
            self.norm.bias.grad,
            getattr(self.norm, "num_groups", None),
            self.norm.eps,
            None if self.shortcut else torch.where(active, known, torch.nan).nan_to_num(0.0),
            None if self.shortcut else active,
        )


def beside_scale(found: Tensor, truth: Tensor, apart: bool) -> float:
    dims = (1, 2, 3) if apart else (0, 1, 2, 3)
    truth = truth / truth.square().mean(dims, keepdim=True).sqrt()
    return float((found - truth).norm() / truth.norm())


@given(st.sampled_from(sorted(NORMS)), st.integers(1, 2), st.booleans(), st.integers(0, 50))
@settings(deadline=None, max_examples=20)
def test_the_input_is_found_or_refused(norm: str, images: int, shortcut: bool, seed: int) -> None:
    client = Client(norm, images, 1, shortcut, seed)
    found = solve_normalised(client.part())
    error = beside_scale(found.values, client.x.double(), norm != "batch")
    assert error < max(1e-4, 20 * found.error)
    assert found.error < 1e-3
    assert found.residual < 1e-5
    z_hat = found.z_hat[0]
    expected = (client.y - client.norm.bias[:, None, None]) / client.norm.weight[:, None, None]
    assert torch.allclose(z_hat, expected.detach().double(), atol=1e-2)


@pytest.mark.parametrize(("images", "size"), [(1, 8), (2, 6)])
def test_with_a_stride_zeros_tell_the_constant(images: int, size: int) -> None:
    client = Client("batch", images, 2, False, 0, size)
    found = solve_normalised(client.part())
    assert found.lifted.any()
    assert not found.unsure.any()
    assert beside_scale(found.values, client.x.double(), False) < 1e-4
    with pytest.raises(Refused, match="open"):
        solve_normalised(client.part(), rectified=False)


def test_the_scale_comes_from_eps_and_exactly_from_the_layer_below() -> None:
    client = Client("batch", 2, 1, False, 0)
    found = solve_normalised(client.part())
    size = float(client.x.square().mean().sqrt())
    assert found.scale == pytest.approx(size, rel=0.3)
    below = nn.functional.conv_transpose2d(
        found.cotangents[0], client.conv.weight.detach().double(), padding=1
    )
    below = below * (found.values > 1e-5)
    truth = nn.functional.conv_transpose2d(client.z.grad, client.conv.weight.detach(), padding=1)
    sums = (truth * (client.x > 0)).sum((0, 2, 3))
    factors, residual = image_factors(below, sums)
    assert residual < 1e-3
    assert torch.allclose(factors, factors.new_full((2,), 1 / size), rtol=1e-3)


def test_images_weigh_so_that_sums_are_zero() -> None:
    client = Client("batch", 3, 1, False, 0)
    weights = torch.tensor([1.0, 0.5, 3.0]).double()
    e = client.z.grad.double() / weights[:, None, None, None]
    factors, residual = zero_sum_factors(e)
    assert residual < 1e-4
    assert torch.allclose(factors / factors[0], weights, rtol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_the_derivative_above_is_that_of_autograd(norm: str) -> None:
    client = Client(norm, 2, 1, False, 0)
    # Images that are normalised apart are known up to a number each.
    number = torch.tensor([0.5, 2.0 if norm != "batch" else 0.5]).reshape(2, 1, 1, 1).double()
    x, e = client.x.double() / number, client.z.grad.double() * number
    found = derivative_above(client.part(), x, e, number**-2)
    assert torch.allclose(found, client.y.grad.double(), atol=1e-3)


def test_a_wrong_derivative_is_refused() -> None:
    client = Client("batch", 1, 1, False, 0)
    client.y.grad[0, 0, 0, 0] += 1.0
    with pytest.raises(Refused):
        solve_normalised(client.part())
    part = client.part()
    with pytest.raises(InvalidInputError, match="groups do not divide"):
        Normalised(part.gradient, part.weight, part.geometry, part.derivative, part.gamma, groups=5)
