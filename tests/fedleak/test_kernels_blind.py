"""The input of a convolution from its weight's gradient alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.graph.kernels.blind import blind_convolution, blind_criterion
from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kernels.refusal import Refused

SAME = (1, 1, 1, 1)


def factors(
    geometry: Geometry, out: int, channels: int, images: int, seed: int, training: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return an input after ReLU, a derivative by the output, and the float32 gradient."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(images, channels, *geometry.size, **draw).relu()
    e = torch.randn(images, out, *geometry.out, **draw)
    if training:  # batch normalisation takes each filter's mean away
        e = e - e.mean((0, 2, 3), keepdim=True)
    gradient = geometry.gradient(x, e).unflatten(2, geometry.kernel).float()
    return x, e, gradient


def beside_a_mixture(found: Tensor, truth: Tensor) -> float:
    """Relative error of the images' best fit by mixtures of those found."""
    basis, truth = found.flatten(1).mT, truth.flatten(1).mT
    return float((basis @ torch.linalg.lstsq(basis, truth).solution - truth).norm() / truth.norm())


@given(
    st.tuples(st.integers(2, 4), st.integers(2, 4)),
    st.sampled_from([((3, 3), SAME), ((3, 3), (0, 0, 0, 0)), ((2, 2), (0, 1, 0, 1)),
                     ((3, 2), (1, 0, 1, 1)), ((5, 5), (2, 2, 2, 2))]),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_input_and_derivative_are_found_beside_a_mixture(
    size: tuple[int, int],
    shape: tuple[tuple[int, int], tuple[int, int, int, int]],
    images: int,
    training: bool,
    seed: int,
) -> None:
    kernel, padding = shape
    try:
        geometry = Geometry(size, kernel, padding=padding)
    except InvalidInputError:
        assume(False)
    wide = images * geometry.positions + 8
    assume(blind_criterion(geometry, wide, wide, images).by_inputs)
    x, e, gradient = factors(geometry, wide, wide, images, seed, training)
    by_position = torch.linalg.svdvals(x.transpose(0, 1).flatten(1))
    assume(by_position[-1] > 0.02 * by_position[0])  # of full rank, as the criterion supposes
    if training and (padding == (0, 0, 0, 0) or images * geometry.outputs <= 2):
        # No border: the gradient does not change with a constant added to the input.
        with pytest.raises(Refused):
            blind_convolution(gradient, geometry, images)
        return
    found = blind_convolution(gradient, geometry, images)
    assert beside_a_mixture(found.inputs, x) < max(1e-4, 20 * found.error)
    assert found.error < 1e-3
    assert found.residual < 3e-7
    assert beside_a_mixture(found.cotangents, e) < 1e-3
    if images == 1:
        scale = x.norm() / found.inputs.norm()
        assert torch.allclose(found.inputs * scale, x, atol=1e-4)  # of the right sign too


@pytest.mark.parametrize("channels", [64, 20], ids=["both", "few input channels"])
def test_one_side_of_full_rank_suffices(channels: int) -> None:
    geometry = Geometry((5, 5), (3, 3), padding=SAME)
    criterion = blind_criterion(geometry, 40, channels)
    assert criterion.by_outputs
    assert criterion.by_inputs == (channels == 64)
    x, _, gradient = factors(geometry, 40, channels, 1, 0)
    found = blind_convolution(gradient, geometry)
    error = beside_a_mixture(found.inputs, x)
    assert error < 1e-4
    assert error / 10 < found.error < error * 10


def test_dead_filters_are_borne() -> None:
    geometry = Geometry((4, 4), (3, 3), padding=SAME)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 24, 4, 4, generator=generator, dtype=torch.float64)
    e = torch.randn(1, 20, 4, 4, generator=generator, dtype=torch.float64)
    e[:, 8:] = 0  # fewer live filters than positions
    gradient = geometry.gradient(x, e).unflatten(2, (3, 3)).float()
    found = blind_convolution(gradient, geometry)
    assert beside_a_mixture(found.inputs, x) < 1e-4
    assert found.rank == 8


@pytest.mark.parametrize(
    ("geometry", "out", "channels", "images"),
    [
        (Geometry((4, 4), (1, 1)), 40, 40, 1),  # no shifts
        (Geometry((4, 4), (3, 3), padding=SAME), 15, 15, 1),
        (Geometry((4, 4), (3, 3), padding=SAME), 40, 40, 3),
        (Geometry((8, 8), (3, 3), (2, 2), SAME), 90, 90, 1),  # shifts from one side only
        (Geometry((4, 4), (3, 3), padding=SAME, mode="circular"), 40, 40, 1),  # no corner
        (Geometry((4, 4), (3, 3), padding=SAME, groups=2), 80, 80, 1),
    ],
)
def test_where_the_criterion_fails_it_refuses(
    geometry: Geometry, out: int, channels: int, images: int
) -> None:
    criterion = blind_criterion(geometry, out, channels, images)
    assert not criterion.holds
    assert str(geometry.outputs * images) in criterion.reason
    gradient = torch.ones(out, channels, *geometry.kernel)
    with pytest.raises(Refused, match="positions"):
        blind_convolution(gradient, geometry, images)


def test_what_is_no_gradient_of_so_many_images_is_refused() -> None:
    geometry = Geometry((3, 3), (3, 3), padding=SAME)
    _, _, gradient = factors(geometry, 30, 30, 2, 0)
    with pytest.raises(Refused):
        blind_convolution(gradient, geometry, 1)
    with pytest.raises(Refused):
        blind_convolution(
            torch.randn(30, 30, 3, 3, generator=torch.Generator().manual_seed(0)), geometry
        )
    with pytest.raises(Refused, match="zero"):
        blind_convolution(torch.zeros(30, 30, 3, 3), geometry)
    with pytest.raises(InvalidInputError, match="kernel is"):
        blind_convolution(gradient[..., :2], geometry)


def test_the_criterion_counts_positions_times_images() -> None:
    geometry = Geometry((4, 4), (3, 3), padding=SAME)
    holds = [blind_criterion(geometry, 512, 512, images).holds for images in (1, 32, 33)]
    assert holds == [True, True, False]
    assert blind_criterion(geometry, 512, 512, 1).reason == ""
