"""The charts of a study: leakage over rounds, cost against benefit, prediction against attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedleak.plots import compress, front
from fedleak.report.chart_styles import (
    MOST_LINES,
    SHAPES,
    Legend,
    Look,
    legend,
    named,
    write_names,
)
from fedleak.report.numbers import Figures
from fedleak.report.sources import Arm
from fedleak.report.svg import BAND, FAINT, INK, chart
from fedleak.report.words import decibels, percent
from fedleak.status import reconstructed
from fedleak.wording import CEILING_DB, ENOUGH_DB, INDISTINGUISHABLE

#: Points of a scatter of single images.
_MOST_POINTS = 240

Judged = tuple[Arm, Figures]


@dataclass(frozen=True)
class Chart:
    """A chart with its legend, and what is to be said below it."""

    svg: Markup
    legend: Legend = ()
    note: str = ""


def _over_rounds(arm: Arm) -> pd.DataFrame:
    """Return median, quartiles and prediction of each round; exact images at the ceiling."""
    scored = arm.leakage[reconstructed(arm.leakage)].dropna(subset="psnr_db")
    if len(scored):
        psnr = scored["psnr_db"].clip(upper=CEILING_DB).groupby(scored["round"])
        found = psnr.quantile(np.array([0.25, 0.5, 0.75])).unstack()
        found.columns = pd.Index(["low", "median", "high"])
        best = psnr.max().rename("best")
        predicted = arm.leakage["predicted_psnr_db"].clip(upper=CEILING_DB)
        mid = predicted.groupby(arm.leakage["round"]).median().rename("predicted")
        return found.join([best, mid], how="outer")
    rows = arm.per_round.dropna(subset="round")
    names = {"psnr_db_informed": "median", "predicted_psnr_db": "predicted"}
    found = rows.groupby("round")[list(names)].mean().clip(upper=CEILING_DB)
    found = found.rename(columns=names)
    return found.assign(low=found["median"], high=found["median"], best=math.nan)


def leakage_chart(
    judged: Sequence[Judged], palette: dict[str, Look], prefix: str = ""
) -> Chart | None:
    """Draw the median PSNR of every defence over rounds, with quartiles; predictions dashed."""
    lines = [(a, _over_rounds(a)) for a, _ in judged]
    lines = [(a, t) for a, t in lines if t["median"].notna().any()]
    left_out = max(0, len(lines) - MOST_LINES)
    if left_out:  # those that leak most and least are what is asked for
        keep = {round(k * (len(lines) - 1) / (MOST_LINES - 1)) for k in range(MOST_LINES)}
        order = sorted(range(len(lines)), key=lambda n: -float(lines[n][1]["median"].mean()))
        chosen = {order[k] for k in keep}
        lines = [line for n, line in enumerate(lines) if n in chosen]
    if not lines:
        return None
    shown = [palette[a.label] for a, _ in lines]
    if len({look.colour for look in shown}) < len(lines):
        shown = [Look(n, look.shape, a.label)
                 for n, ((a, _), look) in enumerate(zip(lines, shown, strict=True))]  # fmt: skip
    shown = [Look(look.colour, shape, look.name)
             for look, shape in zip(shown, SHAPES, strict=False)]  # fmt: skip

    def draw(figure: Figure, narrow: bool) -> dict[str, list[str]]:
        axis = figure.subplots()
        titles = {}
        for n, (arm, table) in enumerate(lines):
            colour = shown[n].series
            axis.fill_between(table.index, table["low"], table["high"], color=colour, alpha=0.15,
                              linewidth=0)  # fmt: skip
            known = table[table["median"].notna()]
            axis.plot(known.index, known["median"], color=colour, linewidth=1.6)
            axis.plot(table.index, table["predicted"], color=colour, linewidth=1.2, linestyle="--")
            points = axis.scatter(known.index, known["median"], s=20, color=colour, zorder=3,
                                  marker=shown[n].shape)  # fmt: skip
            points.set_gid(f"line{n}")
            titles[f"line{n}"] = [
                f"{arm.label}, round {i:.0f}: median {decibels(m)}, best {decibels(b)}, "
                f"predicted {decibels(p)}"
                for i, m, b, p in known[["median", "best", "predicted"]].itertuples()
            ]
        _scale(axis, max(float(t[["high", "predicted"]].max().max()) for _, t in lines), "y")
        axis.set(xlabel="round", ylabel="PSNR of the median image (dB)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        return titles

    said = "; ".join(
        f"{a.label} {decibels(float(t['median'].dropna().iloc[0]))} to "
        f"{decibels(float(t['median'].dropna().iloc[-1]))}" for a, t in lines
    )  # fmt: skip
    note = f"{left_out} defences between these are left out of this chart." if left_out else ""
    svg = chart(f"{prefix}leakage", draw, f"Median PSNR from the first to the last round: {said}")
    return Chart(svg, legend(shown), note)


def accuracy_chart(
    judged: Sequence[Judged], palette: dict[str, Look], prefix: str = ""
) -> Chart | None:
    """Draw the test accuracy over rounds; the mean over seeds."""
    lines = [(a, _accuracy(a)) for a, _ in judged]
    lines = [(a, t) for a, t in lines if len(t) > 1]
    if not lines or len(lines) > MOST_LINES:
        return None

    def draw(figure: Figure, narrow: bool) -> dict[str, list[str]]:
        axis = figure.subplots()
        for arm, table in lines:
            axis.plot(table.index, 100 * table, color=palette[arm.label].series, linewidth=1.6)
        axis.set(xlabel="round", ylabel="accuracy (%)", ylim=(0, 100))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        return {}

    said = "; ".join(f"{a.label} ends at {percent(float(t.iloc[-1]))}" for a, t in lines)
    svg = chart(f"{prefix}accuracy", draw, f"Test accuracy over rounds: {said}", height=0.55)
    return Chart(svg)


def _accuracy(arm: Arm) -> pd.Series:
    table = arm.rounds.dropna(subset=["round", "accuracy"])
    return table.groupby("round")["accuracy"].mean()


def frontier_chart(
    judged: Sequence[Judged], palette: dict[str, Look], prefix: str = ""
) -> Chart | None:
    """Draw what is recovered against the accuracy: best are points at the lower right."""
    known = [j for j in judged if math.isfinite(j[1].accuracy) and not math.isnan(j[1].median_db)]
    if len(known) < 2:
        return None
    x = np.array([100 * f.accuracy for _, f in known])
    y = np.minimum([f.median_db for _, f in known], CEILING_DB)
    beside = named(x, y, [n for n, (a, _) in enumerate(known) if a.undefended])

    def draw(figure: Figure, narrow: bool) -> dict[str, list[str]]:
        axis = figure.subplots()
        best = front(x, y)
        axis.plot(x[best], y[best], color=FAINT, linewidth=7, alpha=0.3, zorder=1)
        titles = {}
        for n, (arm, f) in enumerate(known):
            look = palette[arm.label]
            across = np.array([100 * a for a in f.accuracy_range]), np.array([y[n], y[n]])
            upright = np.array([x[n], x[n]]), np.minimum(f.median_range, CEILING_DB)
            for line in (across, upright):
                axis.plot(*line, color=look.series, linewidth=1.2, zorder=3)
            point = axis.scatter(x[n : n + 1], y[n : n + 1], s=46, zorder=4,
                                 color=look.series, marker=look.shape)  # fmt: skip
            point.set_gid(f"point{n}")
            titles[f"point{n}"] = [
                f"{arm.label}: accuracy {100 * f.accuracy:.1f} %, median {decibels(f.median_db)}, "
                f"{percent(f.recognisable)} recognisable"
            ]
        _scale(axis, float(y.max()), "y")
        reach = 100 * np.array([f.accuracy_range for _, f in known])
        low, high = float(reach.min()), float(reach.max())
        room = max(3.0, 0.1 * (high - low))
        axis.set(xlim=(max(0, low - room), min(102, high + room)), xlabel="test accuracy (%)")
        axis.set_ylabel("median PSNR (dB): less is safer")
        write_names(figure, axis, [(known[n][0].label, n) for n in beside], x, y)
        return titles

    said = "; ".join(
        f"{a.label}: {100 * f.accuracy:.1f} %, {decibels(f.median_db)}" for a, f in known
    )
    svg = chart(f"{prefix}frontier", draw, f"Accuracy and median PSNR. {said}", height=1.15)
    if len(beside) == len(known):
        return Chart(svg)
    note = "Named are the best and the ends: for the others rest on a point, or see the table."
    return Chart(svg, legend(palette[a.label] for a, _ in known), note)


def predicted_chart(
    judged: Sequence[Judged], palette: dict[str, Look], prefix: str = ""
) -> Chart | None:
    """Draw the PSNR that was attained against the predicted one."""
    sets = [(a, _pairs(a)) for a, _ in judged]
    sets = [(a, p) for a, p in sets if len(p)]
    if not sets:
        return None
    most = max(8, _MOST_POINTS // len(sets))
    size = 16 if sum(len(p) for _, p in sets) > 60 else 40

    def draw(figure: Figure, narrow: bool) -> dict[str, list[str]]:
        axis = figure.subplots()
        axis.plot([0, CEILING_DB], [0, CEILING_DB], color=FAINT, linewidth=1, zorder=1)
        titles = {}
        for n, (arm, pairs) in enumerate(sets):
            own = pairs.iloc[:: max(1, math.ceil(len(pairs) / most))]
            points = axis.scatter(
                own["predicted"], own["attained"], s=size, alpha=0.75, linewidths=0,
                color=palette[arm.label].series, marker=palette[arm.label].shape, zorder=3,
            )  # fmt: skip
            points.set_gid(f"set{n}")
            titles[f"set{n}"] = [
                f"{arm.label}{what}: predicted {decibels(p)}, attained {decibels(a)}"
                for what, p, a in zip(own["what"], own["predicted"], own["attained"], strict=True)
            ]
        top = max(float(p[["predicted", "attained"]].max().max()) for _, p in sets)
        _scale(axis, top, "x")
        _scale(axis, top, "y")
        axis.set(xlabel="predicted without an attack (dB)", ylabel="attained (dB)")
        return titles

    every = pd.concat([p for _, p in sets])
    gap = (every["attained"] - every["predicted"]).abs().median()
    said = f"Attained against predicted PSNR; the median distance is {gap:.1f} dB"
    shown = sum(math.ceil(len(p) / max(1, math.ceil(len(p) / most))) for _, p in sets)
    note = f"{shown} of {len(every)} points are drawn." if shown < len(every) else ""
    svg = chart(f"{prefix}predicted", draw, said, height=1.1)
    return Chart(svg, legend(palette[a.label] for a, _ in sets), note)


def _pairs(arm: Arm) -> pd.DataFrame:
    """Return predicted and attained PSNR of each image, or else of each seed."""
    if len(arm.leakage):
        rows = arm.leakage[reconstructed(arm.leakage)]
        rows = rows.dropna(subset=["psnr_db", "predicted_psnr_db"])
        what = [
            f", client {c}, round {r:.0f}"
            for c, r in zip(rows["client"], rows["round"], strict=True)
        ]
        names = ("psnr_db", "predicted_psnr_db")
    else:
        names = ("psnr_db_median_informed", "predicted_psnr_db")
        rows = arm.table.dropna(subset=list(names))
        what = [f", seed {s:.0f}" for s in rows["seed"].fillna(0)]
    found = rows[list(names)].clip(upper=CEILING_DB)
    return found.set_axis(["attained", "predicted"], axis=1).assign(what=what)


def _scale(axis: Axes, top: float, which: str) -> None:
    """Compress what is exact to the eye, where there is much of it."""
    if top > ENOUGH_DB:
        compress(axis, which)  # type: ignore[arg-type]
        if which == "y":
            axis.text(0.015, 126, "nobody sees a difference (scale compressed)", fontsize=10,
                      va="center", transform=axis.get_yaxis_transform(), color=INK)  # fmt: skip
        return
    high = max(10.0, 1.1 * top)
    axis.set(**{f"{which}lim": (0, high)})
    if high > INDISTINGUISHABLE:
        span = axis.axhspan if which == "y" else axis.axvspan
        span(INDISTINGUISHABLE, high, color=BAND, zorder=0)
