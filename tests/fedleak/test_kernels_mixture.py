"""A mixture of images, told apart by the zeros of ReLU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.graph.kernels.mixture import unmix
from fedleak.graph.kernels.refusal import Refused


def after_relu(images: int, seed: int, alike: float = 0.0, n: int = 1200) -> Tensor:
    """Entries after a ReLU; ``alike`` is the share of their variance that images have in common."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(images, n, generator=generator, dtype=torch.float64)
    common = torch.randn(1, n, generator=generator, dtype=torch.float64)
    return (alike**0.5 * common + (1 - alike) ** 0.5 * own + 0.2).relu()


def mixed(x: Tensor, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1000)
    u, _, vh = torch.linalg.svd(torch.randn(len(x), len(x), generator=generator).double())
    a = u @ torch.logspace(0, -1, len(x)).double().diag() @ vh
    y = a @ x
    return y + noise * torch.randn(y.shape, generator=generator, dtype=torch.float64), a


@given(
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([0.0, 1e-8, 1e-7]),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=12)
def test_images_are_told_apart(images: int, alike: float, noise: float, seed: int) -> None:
    x = after_relu(images, seed, alike)
    y, a = mixed(x, seed, noise)
    found = unmix(y)
    scaled = x / x.square().mean(1, keepdim=True).sqrt()
    distance = torch.cdist(found.images, scaled) / x.shape[1] ** 0.5
    order = distance.argmin(1)
    assert sorted(order.tolist()) == list(range(images))
    # What the noise of the mixture is of the images, and what their likeness makes of it.
    spread = float(torch.linalg.inv(a).norm()) / float(x.square().mean().sqrt())
    spread *= float(torch.linalg.cond(scaled))
    worst = float(distance.amin(1).max())
    assert worst < 1e-10 + 10 * noise * spread
    assert found.negative < 1e-10 + 100 * noise * spread
    dead = (x == 0).all(0)
    zeros = ((x == 0) & ~dead).sum(1) / (~dead).sum()
    assert torch.allclose(found.zeros, zeros[order].double(), atol=0.02)
    # What is mixed inversely comes apart with the images.
    e = torch.randn(images, 50, generator=torch.Generator().manual_seed(seed)).double()
    apart = found.cotangents(torch.linalg.inv(a).mT @ e)
    assert torch.allclose(apart.mT @ found.images, e.mT @ x, atol=1e-8 + 1e3 * noise * spread)


def test_what_has_no_zeros_is_refused() -> None:
    x = after_relu(3, 0) + 0.1
    with pytest.raises(Refused, match="3 images are in it"):
        unmix(mixed(x, 0, 0.0)[0])
    signed = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Refused, match="cancel at least"):
        unmix(signed)
    with pytest.raises(Refused, match="both signs"):
        unmix(signed[:1])


def test_dependent_images_are_refused() -> None:
    x = after_relu(2, 0)
    with pytest.raises(Refused, match="linearly dependent"):
        unmix(torch.cat([x, x[:1] + x[1:]]))
    with pytest.raises(InvalidInputError, match="finite"):
        unmix(x / 0)


def test_the_same_seed_gives_the_same_images() -> None:
    y, _ = mixed(after_relu(4, 0), 0, 0.0)
    assert torch.equal(unmix(y, seed=3).images, unmix(y, seed=3).images)
