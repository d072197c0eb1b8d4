"""What several tests need."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import fedleak  # noqa: F401  # before torch: it sets how torch's threads wait

import torch  # isort: skip
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn

from fedleak.observation import Observation

# Locally every run tries new examples; CI tries the same ones, so that it fails for a reason.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Real CIFAR-10 images as class folders, where a developer has them beside the checkout.
CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "train"


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """Two threads, or one for each of several workers; no result may hang on how many."""
    usual = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
    torch.set_num_threads(int(os.environ.get("FEDLEAK_TEST_THREADS", usual)))


def client_gradient(model: nn.Module, image: Tensor, label: int) -> dict[str, Tensor]:
    """Return what a client computes with torch: the oracle for everything of ours."""
    loss = F.cross_entropy(model(image[None]), torch.tensor([label]))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.fixture
def observe() -> Callable[[nn.Module, Tensor, int], Observation]:
    """Return ``(model, image, label) -> Observation`` of a float32 gradient."""

    def make(model: nn.Module, image: Tensor, label: int) -> Observation:
        gradient = client_gradient(model, image, label)
        return Observation.from_gradient(model, gradient, tuple(image.shape))

    return make


def photo_patches(count: int, size: int = 32) -> Tensor:
    """Return colour patches (count, 3, size, size) of the photographs in scikit-learn."""
    from sklearn.datasets import load_sample_images

    patches = []
    for photo in load_sample_images().images:
        pixels = torch.tensor(photo).permute(2, 0, 1)[None].float() / 255
        small = F.interpolate(pixels, scale_factor=0.25, mode="area")[0]
        for top in range(0, small.shape[1] - size, size):
            for left in range(0, small.shape[2] - size, size):
                patches.append(small[:, top : top + size, left : left + size])
    step = max(1, len(patches) // count)
    # 8-bit pixels, as any image file has them.
    return (torch.stack(patches[::step][:count]) * 255).round() / 255


@pytest.fixture(scope="session")
def photos() -> Tensor:
    """Four natural images of 3x32x32 that need no download."""
    return photo_patches(4)
