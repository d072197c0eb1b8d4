"""The inverse of a convolution's system from its structure, against dense linear algebra."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedleak  # noqa: F401

import torch  # isort: skip
from torch import Tensor, nn

from fedleak.solvers import cgls
from fedleak.systems import direct
from fedleak.systems.conv import Conv
from fedleak.systems.dense import dense_system
from fedleak.systems.system import row_deviations, solve_layer


def layer_of(size: tuple[int, int], channels: int, filters: int, **options: Any) -> Conv:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = nn.Conv2d(channels, filters, **options).double()
    out = module(torch.zeros(1, channels, *size, dtype=torch.float64)).shape[1:]
    return Conv.read("conv", module, (channels, *size), tuple(out))


def dense(layer: Conv, e: Tensor, a: Tensor, k: Tensor) -> Tensor:
    """Return U of one update, whose images share their gradient rows."""
    weight, gradient = [], []
    for one, weights, share in zip(e, a, k, strict=True):
        ((rows, shared),) = dense_system(layer, one)
        weight.append(rows * weights.reshape(-1, 1))
        gradient.append(shared * share)
    return torch.cat([torch.block_diag(*weight), torch.cat(gradient, 1)])


@given(
    st.sampled_from(["pixels", "outputs"]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.integers(0, 2),
    st.integers(1, 2),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_against_dense(
    over: str,
    updates: int,
    batch: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: int,
    dilation: int,
    lost: bool,
) -> None:
    """As (U^T U + d)^-1 U^T r by its definition, for any stride, padding and dilation."""
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    layer = layer_of((7, 6), 2, 3, kernel_size=kernel, **options)
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.2

    e, a = (rand(updates * batch, *layer.out_shape) for _ in range(2))
    if lost:
        a[:, 1] = 0.0
    k = rand(updates, batch)
    r = rand(updates, batch, *layer.out_shape), rand(updates, *layer.weight_shape)
    matrices = [
        dense(layer, *(x.unflatten(0, (updates, batch))[n] for x in (e, a)), k[n])
        for n in range(updates)
    ]
    flat = [torch.cat([r[0][n].flatten(), r[1][n].flatten()]) for n in range(updates)]

    def adjoint(rows: tuple[Tensor, ...]) -> Tensor:
        each = zip(matrices, *rows, strict=True)
        back = [u.T @ torch.cat([w.flatten(), g.flatten()]) for u, w, g in each]
        return torch.stack(back).reshape(updates, batch, *layer.in_shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "plan", lambda layer: direct.Plan(over))
        patch.setattr(direct, "REGULAR", 1e-5)
        inverse = direct.inverse_of(layer, e, a, k, adjoint)
    assert inverse is not None
    found = inverse(r, adjoint(r)).flatten(1)
    for u, v, x in zip(matrices, flat, found, strict=True):
        weight = u[: math.prod(layer.out_shape) * batch]
        gram = weight.T @ weight if over == "pixels" else weight @ weight.T
        d = 1e-5 * float(gram.diagonal().max())
        expected = torch.linalg.solve(u.T @ u + d * torch.eye(u.shape[1]).double(), u.T @ v)
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-7 * float(expected.norm()))


@pytest.mark.parametrize(("filters", "stride"), [(6, 1), (3, 2)])
def test_solves_in_a_few_steps(filters: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least-norm solution, also of contradictory rows, of which some are left out."""
    layer = layer_of((12, 12), 3, filters, kernel_size=3, stride=stride)
    assert direct.plan(layer).over == ("pixels" if stride == 1 else "outputs")
    generator = torch.Generator().manual_seed(0)
    x, e = (
        torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        for shape in (layer.in_shape, layer.out_shape)
    )
    rows = layer.apply(x, e)
    z = layer.join(layer.split(rows.weight) + layer._shift)
    z = z + 0.1 * torch.randn(z.shape, generator=generator, dtype=torch.float64)
    deviations = row_deviations(z, 0 * z, rows.gradient, torch.zeros(1).double())
    deviations[0][0, 0, :3] = torch.inf
    steps = 0

    def counting(apply: Any, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        def counted(x: Tensor) -> tuple[Tensor, ...]:
            nonlocal steps
            steps += 1
            return apply(x)

        return cgls(counted, *args, **options)

    monkeypatch.setattr("fedleak.systems.system.cgls", counting)
    start = torch.full_like(x, 0.5)
    found, residual = solve_layer(layer, z, e, rows.gradient, deviations, start)
    assert steps <= 10
    ((a, k),) = dense_system(layer, e[0])
    of_z, of_gradient = deviations[0].flatten(), deviations[1].flatten().expand(len(k))
    weights = of_z.min() / torch.cat([of_z, of_gradient])
    u = torch.cat([a, k]) * weights.unsqueeze(1)
    target = layer.target(z, rows.gradient)
    v = torch.cat([target.weight.flatten(), target.gradient.flatten()])
    step = torch.linalg.pinv(u, rtol=1e-9) @ (v * weights - u @ start.flatten())
    torch.testing.assert_close(found.flatten(), start.flatten() + step, rtol=1e-7, atol=1e-8)
    assert float(residual) > 1e-3


def test_updates_are_split_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of((8, 8), 2, 3, kernel_size=3, stride=2)
    generator = torch.Generator().manual_seed(0)
    x, e = (
        torch.randn(6, *shape, generator=generator, dtype=torch.float64)
        for shape in (layer.in_shape, layer.out_shape)
    )
    z, gradient = layer.forward(x), layer.apply(x, e).gradient.unflatten(0, (3, 2)).sum(1)
    deviations = row_deviations(z, 0 * z, gradient, torch.zeros(3).double())
    whole = solve_layer(layer, z, e, gradient, deviations, 0 * x)
    monkeypatch.setattr("fedleak.systems.system._ENTRIES", {"cpu": 2.0 * layer.solver_entries})
    parts = solve_layer(layer, z, e, gradient, deviations, 0 * x)
    torch.testing.assert_close(parts, whole, rtol=1e-8, atol=1e-9)
