"""The likelihood of a whole noisy update."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedleak.attacks.targets.whole_update import HeadRows
from fedleak.data import load_data
from fedleak.laboratory import reconstruct
from fedleak.models import build_model

CLASSES, FEATURES = 4, 7


def _random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _errors(seed: int, lost: float) -> Tensor:
    errors = _random(seed, 2, CLASSES, FEATURES).exp()
    return errors.masked_fill(_random(seed + 1, *errors.shape).abs() < lost, torch.inf)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), lost=st.sampled_from([0.0, 0.3, 1.0, 1.5]))
def test_rows_say_all_of_the_first_order(seed: int, lost: float) -> None:
    """The information on (g, x) is that of every entry; and so it is with entries lost."""
    g, x = _random(seed, 2, CLASSES), _random(seed + 1, 2, FEATURES)
    errors = _errors(seed + 2, lost)
    rows = HeadRows(g, x, errors)

    def change(unit: Tensor) -> Tensor:
        """Return the change of G along (dg, dx)."""
        dg, dx = unit.split([CLASSES, FEATURES])
        return dg[:, None] * x[:, None, :] + g[:, :, None] * dx

    units = torch.eye(CLASSES + FEATURES, dtype=torch.float64)
    entries = torch.stack([(change(u) / errors).flatten(1) for u in units], 2)
    deviations = torch.cat(rows.errors, 1)
    made = torch.stack([torch.cat(rows(change(u)), 1) for u in units], 2)
    made = made / deviations.unsqueeze(2)
    torch.testing.assert_close(made.mT @ made, entries.mT @ entries, atol=1e-5, rtol=1e-5)


def test_rows_have_the_stated_errors_and_no_correlation() -> None:
    g, x, errors = _random(0, 1, CLASSES), _random(1, 1, FEATURES), _errors(2, 0.3)[:1]
    rows = HeadRows(g, x, errors)
    entries = torch.eye(CLASSES * FEATURES, dtype=torch.float64).reshape(-1, CLASSES, FEATURES)
    each = torch.cat([torch.cat(rows(e.unsqueeze(0)), 1) for e in entries])
    scaled = each * torch.where(errors.isinf(), 0.0, errors).reshape(-1, 1)
    known = torch.cat(rows.errors, 1)[0]
    told = known.isfinite()
    expected = torch.where(told, known, 0.0).square().diag()
    torch.testing.assert_close((scaled.mT @ scaled)[:, told], expected[:, told])


@pytest.mark.parametrize(
    ("steps", "defence"),
    [(0, "noise:0.1"), (400, "noise:0.001"), (400, "noise:0.3"), (400, "prune:0.9")],
)
def test_the_informed_attacker_of_a_trained_model(steps: int, defence: str) -> None:
    """It is above the unaware one in the median, too, and no image is lost to a bad start."""
    data, _ = load_data("digits", "data", False, 0)
    images, labels = data.batch(range(12))
    model = build_model("cnn2-v2", (1, 8, 8), 10, seed=0)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, y = data.batch(torch.randint(0, len(data), (20,), generator=generator).tolist())
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    runs = [
        reconstruct(model.eval(), images, labels.tolist(), defence=defence, informed=informed)
        for informed in (False, True)
    ]
    unaware, informed = (torch.tensor(r.psnr_db) for r in runs)
    assert informed.median() > unaware.median() + 0.5
    assert informed.min() > unaware.min()


@pytest.mark.parametrize("defence", ["noise:0.03", "quantise:6"])
def test_a_prior_that_does_not_suit_costs_nothing(defence: str) -> None:
    """Digits are rougher than natural images; at errors of a few per cent the update says so."""
    data, _ = load_data("digits", "data", False, 0)
    images, labels = data.batch(range(10))
    model = build_model("cnn2-v2", (1, 8, 8), 10, seed=0).eval()
    linear, hybrid = (
        reconstruct(model, images, labels.tolist(), attack=a, defence=defence, informed=True)
        for a in ("linear", "hybrid")
    )
    assert torch.tensor(hybrid.psnr_db).mean() > torch.tensor(linear.psnr_db).mean() - 0.7
