"""The Jacobian of an update, and what it leaves open, against dense oracles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev

from fedleak.client.replay import Replay
from fedleak.errors import InvalidInputError
from fedleak.metric import jacobian as jacobian_module
from fedleak.metric import matrix_free
from fedleak.metric.jacobian import UpdateJacobian
from fedleak.metric.jacobian_rows import Block
from fedleak.metric.posterior import Information, posterior
from fedleak.metric.prediction import natural_prior, predict
from fedleak.metric.reference import make_references
from fedleak.models import conv_chain

SHAPE = (4, 5, 6)


class Odd(nn.Module):
    """Groups, dilation, a layer used twice, a weight used past its layer, and loose ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 6, 2)
        self.twice = nn.Linear(6, 6)
        self.past = nn.Linear(6, 6, bias=False)
        self.wide = nn.Linear(6, 40)
        self.head = nn.Linear(40, 30)
        self.loose = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(torch.tanh(self.norm(self.conv(x)))))
        tokens = torch.tanh(self.twice(torch.tanh(self.twice(x.flatten(2).mT))))
        tokens = self.past(tokens) @ self.past.weight
        x = torch.tanh(self.wide(tokens.mean(1) * self.loose[0]))
        return self.head(x)


def _dense(replay: Replay, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    def update(x: Tensor) -> dict[str, Tensor]:
        made = replay(x.unsqueeze(0), labels.unsqueeze(0)).gradients
        return {k: g[0] for k, g in made.items()}

    rows = jacrev(update)(images)
    return {k: r.reshape(-1, images.numel()) for k, r in rows.items()}


@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_have_the_inner_products_of_the_jacobian(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jacobian_module, "ROWS_PER_UNKNOWN", 100)
    torch.manual_seed(0)
    replay = Replay(Odd().eval(), SHAPE)
    images = torch.rand(batch, *SHAPE, dtype=torch.float64)
    labels = torch.arange(batch)
    jacobian = UpdateJacobian(replay, images, labels)
    errors = {k: torch.rand((), dtype=torch.float64) + 0.1 for k in replay.parameters}
    errors["conv.weight"] = torch.rand(6, 2, 3, 3, dtype=torch.float64) + 0.1
    errors["conv.weight"][0] = math.inf
    blocks = {b.name: b for b in jacobian.blocks(errors)}
    dense = _dense(replay, images, labels)
    assert set(blocks) == set(dense)
    assert blocks["conv.weight"].entries == 90
    assert len(blocks["head.weight"].rows) < 1200  # few positions say all
    for name, block in blocks.items():
        told = errors[name].expand_as(replay.parameters[name]).reshape(-1, 1)
        rows = dense[name] / told
        made, true = block.rows.mT @ block.rows, rows.mT @ rows
        assert float((made - true).norm()) < 1e-9 * float(true.norm()), name
        assert not block.sketched


def test_sketches_keep_inner_products_on_average() -> None:
    torch.manual_seed(0)
    replay = Replay(conv_chain([(8, 3, 1, 1)], (1, 5, 5), 20), (1, 5, 5))
    images, labels = torch.rand(1, 1, 5, 5, dtype=torch.float64), torch.tensor([1])
    jacobian = UpdateJacobian(replay, images, labels)
    errors = {k: torch.ones(()).double() for k in replay.parameters}
    # Errors that differ within a parameter need all of its rows.
    errors["fc.weight"] = torch.rand(20, 200, dtype=torch.float64) + 0.5
    exact = _dense(replay, images, labels)["fc.weight"] / errors["fc.weight"].reshape(-1, 1)
    grams = []
    for seed in range(120):
        (block,) = [b for b in jacobian.blocks(errors, seed) if b.name == "fc.weight"]
        assert block.sketched
        assert len(block.rows) < len(exact)
        grams.append(block.rows.mT @ block.rows)
    mean, true = torch.stack(grams).mean(0), exact.mT @ exact
    assert float((mean - true).norm() / true.norm()) < 0.1


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 30),
    batch=st.integers(1, 2),
    scale=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_posterior_is_that_of_dense_algebra(rows: int, batch: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 8 * batch
    j = 10**scale * torch.randn(rows, n, generator=generator, dtype=torch.float64)
    factor = torch.randn(8, 8, generator=generator, dtype=torch.float64).tril() + torch.eye(8)
    s = torch.block_diag(*[factor @ factor.mT] * batch)
    open_ = s - s @ j.mT @ torch.linalg.solve(
        j @ s @ j.mT + torch.eye(rows, dtype=torch.float64), j @ s
    )
    found = posterior([Block("p", "p", j, rows)], factor, (batch, 2, 2, 2))
    size = float(s.diagonal().max())
    assert torch.allclose(found.variance.flatten(), open_.diagonal(), rtol=1e-4, atol=1e-7 * size)
    assert found.effective_dimensions == pytest.approx(
        float((torch.eye(n) - torch.linalg.solve(s, open_)).trace()), abs=1e-4 * n
    )


def test_information_of_layers_adds_up() -> None:
    torch.manual_seed(0)
    model = conv_chain([(3, 3, 2, 1), (4, 3, 1, 1)], (1, 6, 6), 5)
    (reference,) = make_references(model, (1, 6, 6), count=1)
    factor = natural_prior((1, 6, 6)).dense().factor
    gradient = reference.jacobian.gradient
    sizes = {k: g.square().mean().sqrt() for k, g in gradient.items()}
    blocks = reference.jacobian.blocks(sizes)
    information = Information(blocks, factor, 1e-3)

    def direct(errors: dict[str, float]) -> float:
        scaled = reference.jacobian.blocks({k: sizes[k] * errors[k] for k in sizes})
        return posterior(scaled, factor, (1, 1, 6, 6)).psnr_db

    level = dict.fromkeys(sizes, 1e-3)
    assert information.psnr_db() == pytest.approx(direct(level), abs=1e-6)
    assert information.noised(0.2) == pytest.approx(direct(dict.fromkeys(sizes, 0.2)), abs=1e-6)
    withheld = {k: math.inf if k.startswith("conv2") else v for k, v in level.items()}
    assert information.psnr_db({"conv2": 0}) == pytest.approx(direct(withheld), abs=1e-6)
    others = {k: v if k.startswith("fc") else math.inf for k, v in level.items()}
    assert information.alone("fc") == pytest.approx(direct(others), abs=1e-6)


@pytest.mark.parametrize("defence", ["noise:0.05", "prune:0.9+noise:0.02"])
def test_matrix_free_bounds_enclose_the_dense_prediction(defence: str) -> None:
    torch.manual_seed(0)
    shape = (1, 8, 8)
    references = make_references(conv_chain([(4, 3, 2, 0)], shape, 10), shape, 1, defence, count=1)
    prior = natural_prior(shape)
    dense, free = predict(references, prior), matrix_free.estimate(references, prior)
    assert free.error_db < 2
    assert abs(free.psnr_db - dense.psnr_db) < 2 * free.error_db + 0.5
    early = matrix_free.estimate(references, prior, steps=15)
    assert early.error_db > free.error_db  # and says so
    assert abs(early.psnr_db - dense.psnr_db) < early.error_db + 1


def test_bound_is_no_lower_than_the_prediction() -> None:
    torch.manual_seed(0)
    shape = (1, 8, 8)
    references = make_references(conv_chain([(4, 4, 2, 0)], shape, 10), shape, defence="noise:0.1")
    found = predict(references, natural_prior(shape))
    assert len(found.each_db) == 2
    assert found.floor_db >= found.psnr_db
    assert 0 < found.effective_dimensions < found.unknowns == 64


def test_models_that_cannot_be_judged() -> None:
    norm = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(InvalidInputError, match=r"'1' \(BatchNorm2d\).*model\.eval\(\)"):
        make_references(norm, (1, 8, 8))
    with pytest.raises(InvalidInputError, match="no trainable parameters"):
        make_references(nn.Flatten(), (1, 8, 8))
    with pytest.raises(InvalidInputError, match=r"\(1, 5, 5\)"):
        make_references(norm.eval(), (1, 5, 5))
