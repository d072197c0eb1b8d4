"""Colours, shapes and names of many defences in one chart."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from fedleak.report.chart_styles import looks, named, write_names
from fedleak.report.sources import Arm


@pytest.mark.parametrize("size", [(720, 414), (340, 368)])
def test_names_beside_points_hide_no_other(size: tuple[int, int]) -> None:
    x = np.array([92, 92.5, 93, 92.2, 86, 24, 70, 40, 41.0])
    y = np.array([12, 13, 13.5, 20, 11, 8, 11, 145, 146.0])
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
    axis = figure.subplots()
    axis.scatter(x, y)
    write_names(figure, axis, [(f"defence {n}", n) for n in range(len(x))], x, y)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(t) for t in axis.texts]
    assert not [1 for n, a in enumerate(boxes) for b in boxes[:n] if a.overlaps(b)]


def test_of_many_defences_the_best_and_the_ends_are_named() -> None:
    x, y = np.arange(10.0), np.array([0, 5, 5, 5, 1, 5, 9, 5, 5, 3.0])
    assert named(x, y) == [0, 4, 6, 9]
    assert named(x, y, [2]) == [0, 2, 4, 6, 9]
    assert named(x[:8], y[:8]) == list(range(8))


def test_no_two_of_thirty_defences_look_alike() -> None:
    found = looks([Arm("none"), *(Arm(f"d{n}", s) for n in range(30) for s in "12")])
    assert len({(v.colour, v.shape) for v in found.values()}) == 31
    assert found["d3 1"] == found["d3 2"]
    assert found["no defence"].colour == 0
