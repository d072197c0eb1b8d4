"""The choices of a max pool: found from an estimate, and not where nothing explains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak.graph.kernels.choices import Pooled, resolve_choices
from fedleak.graph.kernels.geometry import Geometry


def case(images: int) -> tuple[Pooled, Tensor, Tensor]:
    """Return a convolution of 32 filters below a ReLU and a max pool, its input and cotangent."""
    torch.manual_seed(0)
    x = torch.rand(images, 5, 8, 8, dtype=torch.float64)
    weight = torch.randn(32, 5, 3, 3, dtype=torch.float64, requires_grad=True)

    def entries(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1).relu()

    z = F.conv2d(x, weight, padding=1)
    z.retain_grad()
    value = F.max_pool2d(z.relu(), 2)
    above = torch.randn_like(value)
    (value * above).sum().backward()
    numbers = torch.arange(images * 64).reshape(images, 8, 8)
    windows = numbers.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(0, 2)
    told = value, above * (value > 0)
    value, derivative = (t.detach().transpose(0, 1).flatten(1) for t in told)
    geometry = Geometry((8, 8), (3, 3), padding=(1, 1, 1, 1))
    assert weight.grad is not None
    assert z.grad is not None
    return Pooled(weight.grad, geometry, windows, derivative, value, entries), x, z.grad


@pytest.mark.parametrize("images", [1, 2])
def test_choices_and_input_are_found_from_an_estimate(images: int) -> None:
    pooled, x, truth = case(images)
    estimate = x + 0.04 * torch.randn_like(x)
    with torch.no_grad():
        found = resolve_choices(pooled, estimate)
        chosen = pooled.compared(estimate).argmax(2)
    assert (chosen != pooled.compared(x).argmax(2))[pooled.active].double().mean() > 0.02
    assert found.explained
    assert torch.allclose(found.cotangent, truth)
    assert (found.input - x).norm() < 1e-5 * x.norm()


def test_images_that_are_known_stay_and_help_the_others() -> None:
    pooled, x, _ = case(2)
    estimate = x.clone()
    estimate[1] += 0.15 * torch.randn_like(x[1])
    with torch.no_grad():
        found = resolve_choices(pooled, estimate)
    assert found.explained
    assert (found.input - x).norm() < 1e-5 * x.norm()


def test_what_no_choices_explain_is_said() -> None:
    pooled, x, _ = case(1)
    pooled.gradient.add_(0.1 * torch.randn_like(pooled.gradient))
    with torch.no_grad():
        assert not resolve_choices(pooled, x).explained
