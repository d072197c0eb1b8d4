"""Contrast and brightness that normalisation takes out of an update."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak import Observation, make_attack
from fedleak.attacks import Evidence
from fedleak.attacks.contrast import FILLED, FOUND, in_range
from fedleak.data import load_data
from fedleak.quality import score_batch

SHAPE = (1, 8, 8)


def net(norm: nn.Module | None, padding: int = 0) -> nn.Sequential:
    torch.manual_seed(0)
    side = 6 + 2 * padding
    layers = [nn.Conv2d(1, 6, 3, padding=padding), norm, nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*[x for x in layers if x is not None], nn.Linear(6 * side**2, 10))


def digits(count: int) -> tuple[Tensor, Tensor]:
    return load_data("digits")[0].batch(range(count))


def observed(model: nn.Module, x: Tensor, y: Tensor) -> Observation:
    names, parameters = zip(*model.named_parameters(), strict=True)
    sent = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    return Observation.from_gradient(model, dict(zip(names, sent, strict=True)), SHAPE, len(x))


def psnr(images: Tensor, labels: Tensor, x: Tensor, y: Tensor) -> float:
    scored = score_batch(images, labels, x, y)
    return min(0.0 if s.quality is None else s.quality.psnr_db for s in scored)


def test_images_under_batch_statistics_come_back_as_pixels() -> None:
    """The case of clients that train with batch normalisation: 8 and 14 dB of grey digits."""
    for count, least in ((1, 70), (4, 37)):
        x, y = digits(count)
        (made,) = make_attack("hybrid")([observed(net(nn.BatchNorm2d(6)), x, y)])
        assert psnr(made.images, made.labels, x, y) > least
        assert made.fit < 1e-2
        (note,) = made.details["notes"]
        assert "normalisation leaves brightness and contrast" in note


@pytest.mark.parametrize("scale", [0.02, 0.3, 3.0])
@pytest.mark.parametrize(
    ("norm", "count", "padding"),
    [
        (nn.BatchNorm2d(6), 4, 0),
        (nn.BatchNorm2d(6), 4, 1),
        (nn.InstanceNorm2d(6), 1, 0),
        (nn.GroupNorm(6, 6), 1, 1),
    ],
)
def test_contrast_is_found_by_what_is_left_of_it(
    norm: nn.Module, count: int, padding: int, scale: float
) -> None:
    x, y = digits(count)
    evidence = Evidence.gather([observed(net(norm, padding), x, y)], "cpu")
    evidence = evidence.with_labels(y.unsqueeze(0))
    shifted = scale * x.double() + (0.2 if padding == 0 else 0.0)
    made, (note,) = in_range(evidence, shifted.unsqueeze(0))
    assert FOUND in note
    assert psnr(made[0], y, x, y) > 60


def test_pixels_fill_their_range_where_nothing_is_left() -> None:
    model = net(nn.BatchNorm2d(6, eps=1e-14))
    x, y = digits(4)
    evidence = Evidence.gather([observed(model, x, y)], "cpu").with_labels(y.unsqueeze(0))
    made, (note,) = in_range(evidence, (0.1 * x.double() + 0.4).unsqueeze(0))
    assert FILLED in note
    assert psnr(made[0], y, x, y) > 35  # the digits' own ranges differ


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(6), nn.GroupNorm(1, 6)])
def test_where_the_update_shows_the_contrast_images_stay(norm: nn.Module | None) -> None:
    x, y = digits(4)
    model = net(norm).eval()
    evidence = Evidence.gather([observed(model, x, y)], "cpu").with_labels(y.unsqueeze(0))
    for images in (x.double(), 0.9 * x.double() + 0.05):
        made, notes = in_range(evidence, images.unsqueeze(0))
        assert torch.equal(made[0], images)
        assert notes == [""]
