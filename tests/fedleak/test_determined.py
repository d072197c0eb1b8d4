"""Whether an update tells its images: held against dense Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedleak import Observation, make_attack
from fedleak.attacks import Evidence
from fedleak.attacks.determined import undetermined
from fedleak.client import gradient


@pytest.mark.parametrize(("rows", "told"), [(4, 5), (16, 17), (36, 36)])
def test_directions_that_nothing_tells_are_counted(rows: int, told: int) -> None:
    """A frozen layer of ``rows`` rows: its outputs, and nothing else, reach the gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, rows), nn.Tanh(), nn.Linear(rows, 10))
    model[1].requires_grad_(False)
    x = torch.rand(1, 1, 6, 6)
    sent, _ = gradient(model, x, torch.tensor([3]))
    seen = Observation.from_gradient(model, sent, (1, 6, 6))
    evidence = Evidence.gather([seen], "cpu")
    count = undetermined(evidence, x, torch.tensor([[3]]))
    assert count in (36 - told, 36 - min(rows, 36))


@pytest.mark.slow
def test_what_is_not_told_is_not_certified() -> None:
    """Entries of gradients are as many as one likes, and depend on each other."""
    torch.manual_seed(0)

    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.branch = nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, padding=1)
            self.head = nn.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x).tanh()
            return self.head((h + self.branch(h).tanh()).flatten(1))

    model = Branched()
    x = torch.rand(1, 1, 8, 8)
    sent, _ = gradient(model, x, torch.tensor([1]))
    assert sum(g.numel() for g in sent.values()) > 5 * x.numel()
    (result,) = make_attack("hybrid")([Observation.from_gradient(model, sent, (1, 8, 8))])
    assert result.fit < 1e-3
    assert not result.details.get("certified", False)
