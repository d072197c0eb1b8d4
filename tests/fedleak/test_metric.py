"""Ranks and c(M) against the paper's values and dense SVDs."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.metric import SecurityMetric, exact_rank, security_metric, structural_rank
from fedleak.models import build_model, conv_chain
from fedleak.systems import Affine, Chain
from fedleak.systems.conv import Conv
from fedleak.systems.dense import dense_system
from fedleak.systems.linear import Dense
from fedleak.systems.ranks.blocks import Effort, selection
from fedleak.systems.ranks.linalg import (
    count_above,
    counted,
    gram_matrix,
    is_definite,
    largest_eigenvalue,
    row_space,
)
from fedleak.systems.ranks.structure import weight_rows
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
# The two blocks alone may be factored, not both together: what the bounds alone are worth.
COUNTED = Effort(joint=0)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("method", ["structural", "exact", "auto"])
def test_c_metric_is_the_papers(name: str, method: str) -> None:
    model = build_model(name, (3, 32, 32), 10, seed=0)
    found = security_metric(model, (3, 32, 32), method)  # type: ignore[arg-type]
    assert (found.c, [layer.deficiency for layer in found.layers]) == PAPER[name]
    if method != "structural":
        assert all(layer.exact for layer in found.layers)
    weights = [layer.weight for layer in found.layers]
    unknowns = sum(w * x.unknowns for w, x in zip(weights, found.layers, strict=True))
    assert found.c_normalised * unknowns == pytest.approx(found.c, abs=0.5 * len(weights))
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["name"] == "conv1"


def test_structural_says_what_it_has_not_proven() -> None:
    proven = {
        name: security_metric(build_model(name, (3, 32, 32), 10, 0), (3, 32, 32), "structural")
        .layers[0]
        .exact
        for name in ("cnn2-v1", "cnn2-v2")
    }
    assert proven == {"cnn2-v1": True, "cnn2-v2": False}


def _dense_rank(blocks: list[Tensor]) -> int | None:
    """Return the rank of blocks of rows, each scaled to norm 1; None if it is not clear."""
    scaled = [m / torch.linalg.matrix_norm(m, 2) for m in blocks if m.numel() and bool(m.any())]
    if not scaled:
        return 0
    values = torch.linalg.svdvals(torch.cat(scaled))
    if bool(((values > 1e-9 * values[0]) & (values < 1e-5 * values[0])).any()):
        return None
    return int((values > 1e-7 * values[0]).sum())


@st.composite
def systems(draw: st.DrawFn) -> tuple[Conv, Tensor, Tensor]:
    """A convolution, errors, and which outputs are known: all, or those of a ReLU."""
    layer = draw(convolutions())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    share = draw(st.sampled_from([1.0, 1.0, 0.7, 0.3]))
    known = torch.rand(layer.out_shape, generator=generator) < share
    e = torch.randn(layer.out_shape, generator=generator, dtype=torch.float64) * known
    return layer, e, known


@given(systems())
@settings(max_examples=60, deadline=None)
def test_exact_ranks_are_those_of_dense_svds(system: tuple[Conv, Tensor, Tensor]) -> None:
    layer, e, known = system
    masks = known.reshape(layer.groups, -1)
    weight = gradient = joint = 0
    for (a, k), mask in zip(dense_system(layer, e), masks, strict=True):
        ranks = [_dense_rank(blocks) for blocks in ([a[mask]], [k], [a[mask], k])]
        assume(None not in ranks)
        weight, gradient, joint = (
            n + (r or 0) for n, r in zip((weight, gradient, joint), ranks, strict=True)
        )
    found = layer.block_ranks(e, selection(known))
    assert (found.weight, found.gradient, found.joint) == (weight, gradient, joint)
    assert found.exact
    assert exact_rank(layer, e, known) == joint


@given(systems())
@settings(max_examples=100, deadline=None)
def test_counts_bound_the_rank_and_claim_only_what_is_proven(
    system: tuple[Conv, Tensor, Tensor],
) -> None:
    layer, e, known = system
    rows = None if bool(known.all()) else selection(known)
    exact = layer.block_ranks(e, rows)
    fast = layer.block_ranks(e, rows, COUNTED)
    assert fast.joint >= exact.joint
    assert fast.joint == exact.joint or not fast.exact
    assert structural_rank(layer, e, known) >= fast.joint or bool((e == 0).any())


def _conv(
    channels: int, size: tuple[int, int], filters: int, kernel: int, stride: int, padding: int
) -> Conv:
    torch.manual_seed(0)
    module = nn.Conv2d(channels, filters, kernel, stride, padding)
    out = module(torch.zeros(1, channels, *size)).shape[1:]
    return Conv.read("conv", module, (channels, *size), tuple(out))


@pytest.mark.parametrize(
    "layer",
    [
        _conv(2, (12, 12), 7, 2, 2, 1),  # patches cut off by padding: fewer unknowns than filters
        _conv(4, (10, 9), 6, 2, 2, 1),
        _conv(1, (11, 14), 7, 3, 3, 1),
        _conv(2, (9, 3), 1, 2, 1, 1),  # few filters: outputs depend on each other
        _conv(5, (6, 8), 2, 4, 2, 2),
        _conv(4, (8, 8), 2, 4, 3, 0),
        _conv(3, (5, 5), 12, 4, 1, 0),  # more filters than positions
        _conv(3, (8, 8), 2, 1, 1, 0),  # a kernel of one pixel
        _conv(3, (9, 9), 5, 2, 3, 0),  # a stride that leaves pixels out
    ],
    ids=str,
)
def test_bounds_are_the_rank_where_a_plain_count_fails(layer: Conv) -> None:
    e = torch.randn(layer.out_shape, dtype=torch.float64)
    assert layer.block_ranks(e, None, COUNTED).joint == exact_rank(layer, e)


def test_separate_patches_are_proven_without_factoring_both_blocks() -> None:
    """[W x I; I x E^T]: rank(W) P + n rank(E) - rank(W) rank(E)."""
    layer = _conv(3, (8, 8), 4, 2, 2, 0)
    e = torch.randn(layer.out_shape, dtype=torch.float64)
    found = layer.block_ranks(e, None, COUNTED)
    assert (found.joint, found.exact) == (4 * 16 + 12 * 4 - 16, True)
    assert exact_rank(layer, e) == found.joint


@given(systems(), st.sampled_from([1e-6, 3.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_ranks_do_not_depend_on_scale_or_order(
    system: tuple[Conv, Tensor, Tensor], scale: float
) -> None:
    layer, e, known = system
    before = layer.block_ranks(e, selection(known))
    for (a, k), mask in zip(dense_system(layer, e), known.reshape(layer.groups, -1), strict=True):
        assume(None not in (_dense_rank([a[mask]]), _dense_rank([k]), _dense_rank([a[mask], k])))
    order = torch.randperm(layer.weight.shape[1])

    def shuffled(x: Tensor) -> Tensor:
        return x.reshape(layer.groups, len(order), *x.shape[1:])[:, order].reshape(x.shape)

    layer.weight = scale * layer.weight[:, order]
    after = layer.block_ranks(shuffled(e) / scale, selection(shuffled(known)))
    assert after == before


Pool = Callable[[], nn.Module]


def _head(features: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, 5)]


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.normal_(norm.weight)
    return norm


def _lenet(pool: Pool | None, activation: Pool) -> nn.Sequential:
    """LeNet of the DLG paper (strides), or with pools as it was invented."""
    if pool is None:
        layers = [nn.Conv2d(2, 6, 5, 2, 2), activation(), nn.Conv2d(6, 6, 5, 2, 2), activation()]
        return nn.Sequential(*layers, nn.Conv2d(6, 6, 5, 1, 2), activation(), *_head(54))
    layers = [nn.Conv2d(2, 4, 3, padding=1), activation(), pool(), nn.Conv2d(4, 6, 3), activation()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 12), activation(), nn.Linear(12, 5))


def _cnn6(activation: Pool) -> nn.Sequential:
    """The six layers of R-GAP, narrower."""
    layers: list[nn.Module] = []
    channels = 2
    for filters, kernel, stride, padding in [
        (3, 4, 2, 2), (9, 3, 2, 1), (9, 3, 1, 1), (9, 3, 1, 1), (16, 3, 2, 1), (16, 3, 1, 1),
    ]:  # fmt: skip
        layers += [nn.Conv2d(channels, filters, kernel, stride, padding, bias=False), activation()]
        channels = filters
    return nn.Sequential(*layers, *_head(64))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet-dlg": lambda: _lenet(None, nn.Sigmoid),
    "lenet-average": lambda: _lenet(lambda: nn.AvgPool2d(2), nn.Tanh),
    "lenet-overlapping": lambda: _lenet(lambda: nn.AvgPool2d(3, 2, 1), nn.Tanh),
    "lenet-maximum": lambda: _lenet(lambda: nn.MaxPool2d(2), nn.ReLU),
    "lenet-maximum-overlapping": lambda: _lenet(lambda: nn.MaxPool2d(3, 2, 1), nn.LeakyReLU),
    "cnn6": lambda: _cnn6(lambda: nn.LeakyReLU(0.2)),
    "cnn6-relu": lambda: _cnn6(nn.ReLU),
    "linear-average": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.AvgPool2d(2), nn.Tanh(), *_head(75)
    ),
    "norm-relu": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, 1, 1), _norm(4), nn.ReLU(), nn.Conv2d(4, 4, 2, 2, 1), nn.ReLU6(),
        *_head(196),
    ),
    "dilated": lambda: nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), (1, 2), (1, 0), (2, 1), 2), nn.Tanh(), *_head(240)
    ),
}  # fmt: skip


def _oracle(chain: Chain, i: int, e: Tensor, x: Tensor) -> int | None:
    """Rank by torch's Jacobian of what is known, and a dense SVD."""
    layer = chain.layers[i]
    assert isinstance(layer, Conv)
    end = next(
        (j for j in range(i + 1, len(chain.layers)) if isinstance(chain.layers[j], Affine)),
        len(chain.layers),
    )

    def known(value: Tensor) -> Tensor:
        for between in chain.layers[i:end]:
            value = between.forward(value)
        return value.flatten()

    jacobian = torch.autograd.functional.jacobian(known, x).flatten(1)
    rows = jacobian[jacobian.norm(dim=1) > 0]
    rows = rows / rows.norm(dim=1, keepdim=True)
    return _dense_rank([rows, torch.block_diag(*(k for _, k in dense_system(layer, e)))])


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_against_dense_oracles(name: str) -> None:
    torch.manual_seed(3)
    model, shape = NETWORKS[name]().eval(), (2, 12, 12)
    exact = security_metric(model, shape, "exact", seed=1)
    fast = security_metric(model, shape, "structural", seed=1)
    chain = Chain.read(model, shape)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    trace = chain.trace(x, torch.randint(5, (1,), generator=generator))
    places = [i for i, layer in enumerate(chain.layers) if isinstance(layer, Conv)]
    for place, found, quick in zip(places, exact.layers, fast.layers, strict=True):
        expected = _oracle(chain, place, trace.cotangents[place][0], trace.inputs[place])
        assert found.exact
        assert found.rank == expected
        assert quick.rank >= found.rank
        assert quick.rank == found.rank or not quick.exact
    assert -1 <= exact.c_normalised <= 0


def test_filters_may_be_permuted() -> None:
    torch.manual_seed(0)
    model = conv_chain([(6, 4, 2, 1), (4, 3, 2, 0)], (2, 16, 16), 5)
    before = security_metric(model, (2, 16, 16), "exact")
    order = torch.randperm(6)
    with torch.no_grad():
        first, second = model.conv1, model.conv2
        first.weight.copy_(first.weight[order])
        first.bias.copy_(first.bias[order])
        second.weight.copy_(second.weight[:, order])
    assert security_metric(model, (2, 16, 16), "exact") == before


def test_fully_connected_layers_are_listed_without_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.Tanh(), nn.Linear(9, 4))
    found = security_metric(model, (3, 4, 4))
    assert (found.c, found.c_normalised, found.layers) == (0, 0.0, ())
    (layer,) = found.dense
    assert (layer.kind, layer.weight, layer.deficiency) == ("linear", 0.0, 0)
    assert (layer.weight_rank, layer.gradient_rank) == (9, 48)


def test_a_network_that_tells_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), *_head(32))
    nn.init.constant_(model[0].bias, -100.0)
    found: SecurityMetric = security_metric(model, (1, 6, 6), "exact")
    assert (found.c, found.c_normalised) == (-36, -1.0)
    assert (found.layers[0].weight_rank, found.layers[0].gradient_rank) == (0, 0)


def test_structural_rank_of_a_dense_layer() -> None:
    layer = Dense.read("fc", nn.Linear(7, 3), (7,))
    e = torch.tensor([0.1, -0.4, 0.3])
    assert structural_rank(layer) == exact_rank(layer, e) == 7
    assert exact_rank(layer, torch.zeros(3)) == 3


def test_singular_values_are_counted_without_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(520, 600), (1200, 510), (40, 30)]
    for rows, columns in shapes:
        n = min(rows, columns)
        u, v = (
            torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q
            for m in (rows, columns)
        )
        values = torch.logspace(0, -12, n, dtype=torch.float64)
        m = (u * values) @ v.mT
        for bound in (1e-3, 1e-7, 1e-9):
            assert count_above(m, bound) == int((values > bound).sum())
        assert counted(m @ m.mT, 1.0) is None  # no gap: left to the count without squares
        clear = (u * (values > 1e-3)) @ v.mT
        assert counted(clear @ clear.mT, 1.0) == int((values > 1e-3).sum())
        assert len(row_space(clear)) == int((values > 1e-3).sum())


def test_banded_cholesky_tells_full_rank() -> None:
    full, deficient = (
        weight_rows(layer.windows, layer.weight[0])
        for layer in (_conv(3, (9, 9), f, 3, 1, 1) for f in (4, 2))
    )
    for a, expected in ((full, True), (deficient, False)):
        gram = gram_matrix(a)
        largest = largest_eigenvalue(gram)
        top = torch.linalg.matrix_norm(torch.from_numpy(a.toarray()), 2) ** 2
        assert largest == pytest.approx(float(top), rel=0.05)
        assert is_definite((a.T @ a).tocsr(), largest) is expected
        smaller = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
        assert abs(gram - smaller).max() < 1e-12


def test_bad_input() -> None:
    model = build_model("cnn2-v1", (1, 8, 8), 10)
    with pytest.raises(InvalidInputError, match="'fast'"):
        security_metric(model, (1, 8, 8), "fast")  # type: ignore[arg-type]
    for shape in ((8, 8), (1, 8, 0), None, (3, 8, 8), (1, 8, 9)):
        with pytest.raises(InvalidInputError, match="shape"):
            security_metric(model, shape)  # type: ignore[arg-type]
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = torch.nan  # type: ignore[union-attr, operator, index]
    with pytest.raises(InvalidInputError, match="conv1"):
        security_metric(model, (1, 8, 8))
    with pytest.raises(UnsupportedModelError, match="fully connected"):
        security_metric(nn.Sequential(nn.Conv2d(1, 2, 3)), (1, 8, 8))


def test_the_benchmark_ranks_the_same_systems() -> None:
    from tests.benchmarks import metric

    torch.manual_seed(0)
    tiny = conv_chain([(4, 3, 1, 0), (3, 3, 2, 0)], (3, 12, 12), 5)
    row = metric.measure(("tiny", tiny), repeats=1, size=12)
    assert row["agree"]
    assert metric.together([row])["ratio"] > 0
