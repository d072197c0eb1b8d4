"""The inversion influence function against explicit Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedleak.metric.influence import influence
from fedleak.metric.reference import Reference, make_references
from tests.fedleak.test_attribution import dense_jacobian, tiny

SHAPE = (2, 6, 6)


@pytest.mark.parametrize("defence", ["none", "noise:0.1", "prune:0.5"])
def test_bound_is_that_of_the_explicit_jacobian(defence: str) -> None:
    (reference,) = make_references(tiny(), SHAPE, 2, defence, count=1)
    found = influence(reference)
    rows = torch.cat(list(dense_jacobian(reference).values()))
    largest = float(torch.linalg.matrix_norm(rows, 2)) ** 2
    moved = torch.cat(
        [
            (reference.sent[k].float().double() - g).flatten()
            for k, g in reference.jacobian.gradient.items()
        ]
    )
    expected = float((rows.T @ moved).norm()) / largest / math.sqrt(rows.shape[1])
    # Power iteration comes near the largest eigenvalue from below.
    assert 0.98 * largest <= found.eigenvalue <= largest * (1 + 1e-9)
    assert found.rms == pytest.approx(expected, rel=0.02)
    assert found.psnr_db == pytest.approx(-20 * math.log10(expected), abs=0.2)


def test_more_noise_moves_further() -> None:
    model = tiny()
    found = [
        influence(make_references(model, SHAPE, 1, f"noise:{s}", count=1)[0]).rms
        for s in (0.01, 0.1, 1.0)
    ]
    assert found[1] == pytest.approx(10 * found[0], rel=0.01)
    assert found[2] == pytest.approx(100 * found[0], rel=0.01)


def test_gradient_without_images_leaves_all_open() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(len(x), 3) + 0 * x.flatten(1)[:, :1]

    reference: Reference = make_references(Constant(), SHAPE, count=1)[0]
    found = influence(reference)
    assert found.rms == math.inf
    assert found.psnr_db == -math.inf
