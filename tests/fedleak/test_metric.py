"""Ranks and c(M) against the paper's values and dense SVDs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from torch import nn

from fedleak.errors import InvalidInputError
from fedleak.metric import exact_rank, security_metric, structural_rank
from fedleak.metric.rank import dense_system
from fedleak.models import build_model, conv_chain
from fedleak.systems.conv import Conv
from tests.fedleak.test_systems import convolutions

# Chen & Campbell 2022: c(M), and each layer's deficiency.
PAPER = {
    "cnn2-v1": (0, [0]),
    "cnn2-v2": (-1470, [-1470]),
    "cnn3-v1": (-2266, [0, -4533]),
    "cnn3-v2": (-1995, [-1470, -1050]),
    "cnn4-v1": (-2772, [0, -3965, -386]),
    "cnn4-v2": (-6211, [0, -9316, 0]),
}


@pytest.mark.parametrize("name", PAPER)
def test_structural_c_metric_is_the_papers(name: str) -> None:
    found = security_metric(build_model(name, (3, 32, 32), 10, seed=0), (3, 32, 32), "structural")
    assert (found.c, [layer.deficiency for layer in found.layers]) == PAPER[name]
    assert not any(layer.exact for layer in found.layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_exact_c_metric_is_the_papers(name: str) -> None:
    found = security_metric(build_model(name, (3, 32, 32), 10, seed=0), (3, 32, 32), "exact")
    assert (found.c, [layer.deficiency for layer in found.layers]) == PAPER[name]
    assert all(layer.exact for layer in found.layers)


@given(convolutions())
@settings(max_examples=40, deadline=None)
def test_exact_rank_is_that_of_a_dense_svd(layer: Conv) -> None:
    e = torch.randn(layer.out_shape, dtype=torch.float64)
    expected = 0
    for a, k in dense_system(layer, e):
        scaled = [m / torch.linalg.matrix_norm(m, 2).clamp_min(1e-300) for m in (a, k)]
        u = torch.cat(scaled)
        values = torch.linalg.svdvals(u)
        gap = values[(values > 1e-9 * values[0]) & (values < 1e-5 * values[0])]
        assume(len(gap) == 0)
        expected += int((values > 1e-7 * values[0]).sum())
    assert exact_rank(layer, e) == expected


@pytest.mark.parametrize(
    ("convolutions", "shape"),
    [
        ([(6, 5, 1, 0)], (1, 12, 12)),
        ([(4, 3, 1, 1), (4, 3, 2, 1)], (2, 9, 9)),
        ([(12, 5, 2, 2), (12, 5, 2, 2), (12, 5, 1, 2)], (1, 14, 14)),  # LeNet of the DLG paper
        ([(2, 3, 2, 0), (3, 3, 1, 1)], (3, 11, 11)),
    ],
)
def test_structural_is_exact_on_usual_networks(
    convolutions: list[tuple[int, int, int, int]], shape: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    model = conv_chain(convolutions, shape, 5)
    exact = security_metric(model, shape, "exact")
    fast = security_metric(model, shape, "structural")
    assert [x.rank for x in exact.layers] == [x.rank for x in fast.layers]
    assert exact.c == fast.c


def test_structural_rank_of_a_dense_layer() -> None:
    from fedleak.systems.linear import Dense

    layer = Dense.read("fc", nn.Linear(7, 3), (7,))
    e = torch.tensor([0.1, -0.4, 0.3])
    assert structural_rank(layer) == exact_rank(layer, e) == 7


def test_unknown_method() -> None:
    with pytest.raises(InvalidInputError, match="'fast'"):
        security_metric(build_model("cnn2-v1", (1, 8, 8), 10), (1, 8, 8), "fast")  # type: ignore[arg-type]
