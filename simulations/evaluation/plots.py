"""Pictures of an evaluation: what a defence costs, and what it really buys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedleak.plots import compress, front, plt, save
from fedleak.results.format import CELLS, EVALUATION, EVALUATION_ROUNDS, INFORMED, LEAKAGE, UNAWARE
from fedleak.results.pictures import read_round
from fedleak.results.reading import read_table
from fedleak.wording import CEILING_DB, ENOUGH_DB, strength_words
from simulations.evaluation.sweep import Cell

_GROUP = ["scenario", "data", "model"]
_ARM = ["defence", "strength"]
#: Tiles beside each other in the picture of one image under every defence.
_TILES = 7
_PANELS = 4
#: Pictures of one scenario, data set and model.
NAMES = ("frontier", "leakage_vs_rounds", "predicted_vs_attained", "pictures")


def plot_evaluation(folder: Path, cells: Sequence[Cell]) -> list[Path]:
    """Draw the pictures of an evaluation, a set for each scenario, data set and model.

    Parameters
    ----------
    folder : Path
        Holds ``evaluation.csv``, ``rounds.csv`` and the cells.
    cells : sequence of Cell
        Those of the table, in its order.

    Returns
    -------
    list of Path
        The pictures drawn.
    """
    table = read_table(folder / EVALUATION.file)
    rounds = read_table(folder / EVALUATION_ROUNDS.file)
    table = table[(table["status"] == "ok") & (table["tamper"] == "none")]
    rounds = rounds[rounds["tamper"] == "none"]  # defences are compared with an honest server
    cells = [c for c in cells if c.scenario.tamper.made is None]
    groups = list(table.groupby(_GROUP, sort=False))
    made: list[Path] = []
    for key, rows in groups:
        suffix = "" if len(groups) == 1 else "_" + "_".join(str(k) for k in key)
        suffix = suffix.replace("/", "-").replace(":", "-")
        title = ", ".join(str(k) for k in key) + " (simulated)"
        own = rounds[(rounds[_GROUP] == list(key)).all(axis=1)]
        chosen = [c for c in cells if (c.scenario.name, *c.setting[1:3]) == tuple(map(str, key))]
        first = [c for c in chosen if c.scenario.seed == chosen[0].scenario.seed]
        paths = [folder / f"{name}{suffix}.png" for name in NAMES]
        frontier(rows, paths[0], title)
        leakage_vs_rounds(own, paths[1], title)
        predicted(rows, paths[2], title)
        pictures(folder, first, paths[3], title)
        made += paths
    return made


def frontier(table: pd.DataFrame, path: Path, title: str = "") -> None:
    """Draw what an informed attacker recovers against accuracy; the Pareto front is a line.

    Points are means over seeds, with 95 % confidence intervals; points of one defence are
    joined in the order of their strengths, where these are numbers.

    Parameters
    ----------
    table : DataFrame
        Rows of ``evaluation.csv``, of one scenario, data set and model.
    path : Path
        The PNG to write.
    title : str
    """
    points = _mean_of_seeds(table, ["accuracy", "psnr_db_median_informed"])
    palette = _palette(points)
    with sns.axes_style("whitegrid"), mpl.rc_context({"text.parse_math": False}):
        figure, axis = plt.subplots(figsize=(8.5, 5.5), layout="constrained")
        _fit(axis, points["psnr_db_median_informed"], "y")
        best = points.iloc[
            front(points["accuracy"].to_numpy(), points["psnr_db_median_informed"].to_numpy())
        ]
        axis.plot(
            best["accuracy"], best["psnr_db_median_informed"], color="0.6", lw=6, alpha=0.5,
            solid_joinstyle="round", solid_capstyle="round", zorder=1,
        )  # fmt: skip
        for name, group in points.groupby("defence", sort=False):
            ordered = pd.to_numeric(group["strength"], errors="coerce").notna().all()
            axis.errorbar(
                group["accuracy"], group["psnr_db_median_informed"],
                xerr=group["accuracy_ci"], yerr=group["psnr_db_median_informed_ci"],
                color=palette[str(name)], marker="o", lw=1.2 if ordered else 0, elinewidth=1,
                capsize=2,
            )  # fmt: skip
            left = list(palette).index(str(name)) % 2  # neighbours are often of two defences
            for row in group.itertuples():
                axis.annotate(
                    "" if name == "none" else strength_words(row.strength),
                    (float(row.accuracy), float(row.psnr_db_median_informed)),  # type: ignore[arg-type]
                    xytext=(-6 if left else 6, 5), textcoords="offset points", fontsize=8,
                    color=palette[str(name)], ha="right" if left else "left", zorder=5,
                    bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.7},
                )  # fmt: skip
        handles = _handles(palette)
        handles.append(Line2D([], [], color="0.6", lw=6, alpha=0.5, label="Pareto front"))
        axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        low, high = axis.get_xlim()
        axis.set(
            xlim=(max(0, low - 0.02), min(1.0, high + 0.03)),
            xlabel="test accuracy (better: right)",
            ylabel="PSNR of the median image, informed attacker, dB (better: down)",
        )
        axis.set_title(f"What a defence costs, and what it buys: {title}", fontsize=11)
        save(figure, path)
        plt.close(figure)


def leakage_vs_rounds(rounds: pd.DataFrame, path: Path, title: str = "") -> None:
    """Draw the median PSNR over rounds, a panel for each defence; informed and unaware.

    Parameters
    ----------
    rounds : DataFrame
        Rows of ``rounds.csv``, of one scenario, data set and model.
    path : Path
        The PNG to write.
    title : str
    """
    names = [n for n in dict.fromkeys(rounds["defence"]) if n != "none"] or ["none"]
    columns = min(_PANELS, len(names))
    lines = math.ceil(len(names) / columns)
    psnr = ["psnr_db_informed", "psnr_db_unaware"]
    with sns.axes_style("whitegrid"), mpl.rc_context({"text.parse_math": False}):
        figure, axes = plt.subplots(
            lines, columns, figsize=(max(7.0, 4.3 * columns), 3.4 * lines + 0.6), squeeze=False,
            sharey=True, sharex=True, layout="constrained",
        )  # fmt: skip
        for axis, name in zip(axes.flat, names, strict=False):
            _fit(axis, rounds[psnr].max(), "y")
            arms = rounds[rounds["defence"] == name]
            strengths = list(dict.fromkeys(arms["strength"]))
            colours = sns.color_palette("flare", len(strengths))
            for colour, strength in zip(colours, strengths, strict=True):
                own = arms[arms["strength"] == strength]
                for column, style in zip(psnr, ("-", ":"), strict=True):
                    _line(axis, own, column, colour, style)
            handles = [
                Line2D([], [], color=c, lw=3, label=strength_words(s))
                for c, s in zip(colours, strengths, strict=True)
            ]
            axis.legend(handles=handles, fontsize=8, ncols=2 if len(strengths) > 3 else 1)
            axis.set(xlabel="round", ylabel="PSNR (dB), median image", title=name)
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        figure.suptitle(
            f"Leakage over the rounds: {title}\ndotted: unaware attacker; solid: informed, "
            "with 95 % confidence over seeds", fontsize=11,
        )  # fmt: skip
        save(figure, path)
        plt.close(figure)


def _line(axis: Axes, rows: pd.DataFrame, column: str, colour: Any, style: str) -> None:
    per_round = rows.assign(**{column: rows[column].clip(upper=CEILING_DB)}).groupby("round")[
        column
    ]
    mean = per_round.mean()
    half = per_round.agg(_half_width)
    axis.plot(mean.index, mean, style, color=colour, marker="o", ms=3.5, lw=1.5)
    if style == "-":  # bands of both hide each other
        axis.fill_between(mean.index, mean - half, mean + half, color=colour, alpha=0.15, lw=0)


def predicted(table: pd.DataFrame, path: Path, title: str = "") -> None:
    """Draw what an informed attacker attained against what the metric predicted.

    Parameters
    ----------
    table : DataFrame
        Rows of ``evaluation.csv``, of one scenario, data set and model.
    path : Path
        The PNG to write.
    title : str
    """
    columns = ["predicted_psnr_db", "psnr_db_median_informed"]
    points = _mean_of_seeds(table.dropna(subset=columns[0]), columns)
    palette = _palette(_mean_of_seeds(table, columns[1:]))
    with sns.axes_style("whitegrid"), mpl.rc_context({"text.parse_math": False}):
        figure, axis = plt.subplots(figsize=(7.5, 5.5), layout="constrained")
        both = points[columns].max()
        for which in ("x", "y"):
            _fit(axis, both, which)
        axis.plot([0, CEILING_DB], [0, CEILING_DB], color="0.6", lw=1, zorder=1)
        for name, group in points.groupby("defence", sort=False):
            axis.errorbar(
                group[columns[0]], group[columns[1]], xerr=group[f"{columns[0]}_ci"],
                yerr=group[f"{columns[1]}_ci"], color=palette[str(name)], fmt="o", capsize=2,
            )  # fmt: skip
        if points.empty:
            axis.text(0.5, 0.5, "nothing is predicted here", transform=axis.transAxes, ha="center")
        kept = {k: v for k, v in palette.items() if k in set(points["defence"])}
        handles = [*_handles(kept), Line2D([], [], color="0.6", lw=1, label="equal")]
        axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        axis.set(xlabel="predicted PSNR (dB)", ylabel="attained PSNR (dB), informed attacker")
        axis.set_title(f"The metric against the attack: {title}", fontsize=11)
        save(figure, path)
        plt.close(figure)


def pictures(folder: Path, cells: Sequence[Cell], path: Path, title: str = "") -> None:
    """Draw one image as both attackers reconstruct it under every defence and strength.

    It is the first client's, in the last round that was attacked.

    Parameters
    ----------
    folder : Path
        That of the evaluation.
    cells : sequence of Cell
        Of one seed.
    path : Path
        The PNG to write.
    title : str
    """
    tiles = list(_tiles(folder, cells))
    lines = max(1, math.ceil(len(tiles) / _TILES))
    columns = max(1, math.ceil(len(tiles) / lines))
    figure, axes = plt.subplots(
        2 * lines, columns, figsize=(1.35 * columns + 0.6, 3.1 * lines + 0.5), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        sns.despine(ax=axis, left=True, bottom=True)
    for place, (label, shown) in enumerate(tiles):
        line, column = divmod(place, columns)
        for above, (image, caption) in enumerate(shown):
            axis = axes[2 * line + above, column]
            axis.set_xlabel(caption, fontsize=8)
            if not above:
                axis.set_title(label, fontsize=8)
            if image is not None:
                pixels = np.clip(np.moveaxis(image, 0, -1), 0, 1)
                axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1)
    for line in range(lines):
        axes[2 * line, 0].set_ylabel("unaware", fontsize=9)
        axes[2 * line + 1, 0].set_ylabel("informed", fontsize=9)
    figure.suptitle(f"One image under every defence: {title}", fontsize=11)
    save(figure, path)
    plt.close(figure)


Shown = tuple[np.ndarray | None, str]


def _tiles(folder: Path, cells: Sequence[Cell]) -> Iterator[tuple[str, list[Shown]]]:
    """Yield the true image, then what each cell's attackers made of it."""
    found: list[tuple[str, list[Shown]]] = []
    truth = None
    for cell in cells:
        shown: list[Shown] = []
        for who in (UNAWARE, INFORMED):
            run = folder / CELLS / cell.key / who
            if who == INFORMED and not run.is_dir():
                run = run.parent / UNAWARE  # there is no defence to know of
            picture = _last_of_first_client(run)
            if picture is None:
                shown.append((None, "failed"))
                continue
            truth, made, psnr = picture
            shown.append((made, "exact" if math.isinf(psnr) else f"{psnr:.1f} dB"))
        found.append((cell.scenario.defence.spec.label, shown))
    if truth is not None:
        yield "true image", [(truth, ""), (truth, "")]
    yield from found


def _last_of_first_client(run: Path) -> tuple[np.ndarray, np.ndarray, float] | None:
    leakage = read_table(run / LEAKAGE.file)
    if leakage["round"].isna().all():
        return None
    stored = run / "reconstructions" / f"round-{int(leakage['round'].max()):04d}.npz"
    # The first image of client 0, whichever were reconstructed.
    found = {k: v for k, v in read_round(stored, []).items() if k[0] == 0}
    if not found:
        return None
    picture = found[min(found)]
    return picture.truth, picture.made, picture.psnr_db


def _mean_of_seeds(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return means over seeds, and in ``..._ci`` half the width of their 95 % intervals."""
    clipped = table.assign(**{c: table[c].clip(upper=CEILING_DB) for c in columns})
    groups = clipped.groupby(_ARM, sort=False)[list(columns)]
    wide = groups.agg(_half_width).rename(columns={c: f"{c}_ci" for c in columns})
    return groups.mean().join(wide).reset_index()


def _half_width(values: pd.Series) -> float:
    """Return half the width of a 95 % confidence interval of a mean; 0 of a single value."""
    from scipy.stats import t

    count = values.count()
    if count < 2:
        return 0.0
    return float(t.ppf(0.975, count - 1) * values.std() / math.sqrt(count))


def _palette(points: pd.DataFrame) -> dict[str, Any]:
    names = [str(n) for n in dict.fromkeys(points["defence"])]
    others = [n for n in names if n != "none"]
    kind = "colorblind" if len(others) <= 10 else "husl"
    colours = dict(zip(others, sns.color_palette(kind, len(others)), strict=True))
    return {n: colours.get(n, (0.0, 0.0, 0.0)) for n in names}


def _handles(palette: dict[str, Any]) -> list[Line2D]:
    return [Line2D([], [], color=c, marker="o", label=name) for name, c in palette.items()]


def _fit(axis: Axes, values: pd.Series, which: Any) -> None:
    """Choose the scale of PSNR: compressed where images are exact to the eye."""
    known = values.dropna()
    top = min(float(known.max()), CEILING_DB) if len(known) else 40.0
    if top > ENOUGH_DB:
        compress(axis, which)
    else:
        axis.set(**{f"{which}lim": (0, 1.1 * top)})
