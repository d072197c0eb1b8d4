"""How a defence looks in charts: its colour, its shape, and which points have their name beside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedleak.plots import front
from fedleak.report.sources import Arm
from fedleak.report.svg import FAINT, SERIES
from fedleak.wording import clean

#: Defences that one chart tells apart by lines, or names at their points.
MOST_LINES = 8
#: Shapes of points: of matplotlib, and in a square of 8 for the legend.
SHAPES = {
    "o": "M4 .2a3.8 3.8 0 1 0 .01 0z",
    "s": "M.6 .6h6.8v6.8H.6z",
    "^": "M4 .3 7.9 7.4H.1z",
    "D": "M4 0 8 4 4 8 0 4z",
    "v": "M4 7.7 .1 .6h7.8z",
    "P": "M2.6 0h2.8v2.6H8v2.8H5.4V8H2.6V5.4H0V2.6h2.6z",
    "X": "M2 0 4 2 6 0 8 2 6 4 8 6 6 8 4 6 2 8 0 6 2 4 0 2z",
    "*": "M4 0 5 3h3L5.6 4.9 6.5 8 4 6.1 1.5 8l.9-3.1L0 3h3z",
}
#: Length of a name, height of a line and width of a letter beside a point, in pixels.
_LABEL, _LINE, _LETTER = 22, 13.0, 6.2

#: Class of the colour, text, and path of the shape.
Legend = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Look:
    """Colour (a number of the page's), shape, and what both stand for."""

    colour: int
    shape: str
    name: str

    @property
    def series(self) -> str:
        """The colour as matplotlib is given it."""
        return SERIES[self.colour]


def looks(arms: Sequence[Arm]) -> dict[str, Look]:
    """Return by label how each defence looks; strengths of one look alike where there are many.

    The first colour is that of no defence. Where colours run out, they come back in other shapes.
    """
    tried = [a for a in arms if not a.undefended]
    by_name = len(arms) > MOST_LINES and len({a.defence for a in tried}) < len(tried)
    names = {a.label: _family(a) if by_name else a.label for a in tried}
    places = {name: n for n, name in enumerate(dict.fromkeys(names.values()))}
    shapes = list(SHAPES)
    found = {}
    for arm in arms:
        if arm.undefended:
            found[arm.label] = Look(0, shapes[0], arm.label)
            continue
        name = names[arm.label]
        again, colour = divmod(places[name], len(SERIES) - 1)
        found[arm.label] = Look(1 + colour, shapes[again % len(shapes)], name)
    return found


def _family(arm: Arm) -> str:
    return clean(arm.defence.replace("+", " + "))


def legend(shown: Iterable[Look]) -> Legend:
    """Return an entry for each look."""
    return tuple((f"c{x.colour}", x.name, SHAPES[x.shape]) for x in dict.fromkeys(shown))


def named(x: np.ndarray, y: np.ndarray, always: Iterable[int] = ()) -> list[int]:
    """Return the points that have their name beside: all of few; else the front and the ends."""
    if len(x) <= MOST_LINES:
        return list(range(len(x)))
    ends = {int(f(v)) for v in (x, y) for f in (np.argmin, np.argmax)}
    return sorted({*front(x, y), *ends, *always})


def write_names(
    figure: Figure, axis: Axes, names: Sequence[tuple[str, int]], x: np.ndarray, y: np.ndarray
) -> None:
    """Write names beside points, where they hide no other name and as few points as can be.

    Parameters
    ----------
    names : sequence of (text, index of its point)
    x, y : ndarray
        All points.
    """
    figure.draw_without_rendering()
    points = axis.transData.transform(np.column_stack([x, y]))
    (left, bottom), (right, top) = axis.transAxes.transform([(0, 0), (1, 1)])
    taken: list[tuple[float, float, float]] = []
    for text, index in sorted(names, key=lambda n: -points[n[1]][1]):
        text = text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"
        width, (px, py) = _LETTER * len(text), points[index]
        best, place = math.inf, (True, 0)
        for up in (sign * step for step in range(0, 66, 6) for sign in (1, -1)):
            for to_left in (False, True):
                begin = px - 9 - width if to_left else px + 9
                end, height = begin + width, py + up
                # Nearer to another's point than to its own, a name is read as the other's.
                away = np.hypot(
                    np.maximum(0, np.maximum(begin - points[:, 0], points[:, 0] - end)),
                    points[:, 1] - height,
                )
                others = np.delete(away, index)
                hidden, misread = (others < 9).sum(), (others < math.hypot(9, up)).any()
                over = sum(abs(height - h) < _LINE and begin < e and b < end for b, e, h in taken)
                outside = begin < left or end > right or not bottom + 6 < height < top - 6
                cost = 100 * over + 30 * outside + 20 * hidden + 3 * misread + abs(up) / 10
                if cost < best:
                    best, place = cost, (to_left, up)
        to_left, up = place
        begin = px - 9 - width if to_left else px + 9
        taken.append((begin, begin + width, py + up))
        axis.annotate(
            text, (x[index], y[index]), textcoords="offset points",
            xytext=(-9 if to_left else 9, up), ha="right" if to_left else "left", va="center",
            fontsize=11, zorder=5,
            arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.6} if abs(up) > 8 else None,
        )  # fmt: skip
