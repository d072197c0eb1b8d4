"""Pictures of a run: leakage versus rounds, and images beside their reconstructions."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedleak.files import write_atomically
from fedleak.results.format import COVERAGE, LEAKAGE, ROUNDS
from fedleak.status import reconstructed
from fedleak.wording import CEILING_DB, ENOUGH_DB, INDISTINGUISHABLE, defence_words

#: By how much the axis is compressed where nobody sees a difference.
_SQUEEZE = 5.0
_COLUMNS = 8


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a picture, whole, and through no link."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    write_atomically(path, stream.getvalue())


def plot_run(folder: Path, arms: Sequence[Path] | None = None, by: str = "defence") -> list[Path]:
    """Draw ``leakage_vs_rounds.png`` and ``reconstructions.png`` into ``folder``.

    Parameters
    ----------
    folder : Path
        Holds ``leakage.csv`` and ``rounds.csv``, of one run or of several together.
    arms : sequence of Path, optional
        Folders with the reconstructions; by default ``folder`` itself.
    by : str
        What tells the runs apart: the defence, or a column of both tables, whose values are
        then the names of the folders.

    Returns
    -------
    list of Path
        The pictures drawn; none where nothing was reconstructed.
    """
    leakage = pd.read_csv(folder / LEAKAGE.file)
    rounds = pd.read_csv(folder / ROUNDS.file)
    made = []
    if not rounds.empty:
        made.append(leakage_vs_rounds(leakage, rounds, folder / "leakage_vs_rounds.png", by))
    sources = [a for a in (arms or [folder]) if (a / "reconstructions").is_dir()]
    if sources:
        names = None if by == "defence" else [a.name for a in sources]
        made.append(reconstructions(sources, folder / "reconstructions.png", names))
    if (folder / COVERAGE.file).is_file():
        coverage = pd.read_csv(folder / COVERAGE.file)
        if not coverage.empty:
            made.append(coverage_vs_rounds(coverage, folder / "coverage_vs_rounds.png"))
    return made


def coverage_vs_rounds(coverage: pd.DataFrame, path: Path) -> Path:
    """Draw which share of a client's images the server holds over rounds, alone and together.

    Parameters
    ----------
    coverage : DataFrame
        As in ``coverage.csv``; where there is a column ``defence``, each has a panel.
    path : Path
        The PNG to write.
    """
    arms = list(dict.fromkeys(coverage["defence"])) if "defence" in coverage else [""]
    colours = dict(zip((20, 40, 60), sns.color_palette("colorblind", 3), strict=True))
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            1, len(arms), figsize=(2.2 + 4 * len(arms), 4), sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axis, arm in zip(axes[0], arms, strict=True):
            part = coverage[coverage["defence"] == arm] if arm else coverage
            by_round = part.groupby("round")
            share = by_round.mean(numeric_only=True)
            used = share["used"] / share["images"]
            axis.plot(share.index, used, color="0.6", lw=5, alpha=0.4)
            for level, colour in colours.items():
                for who, line in (("alone", "--"), ("together", "-")):
                    held = share[f"{who}_{level}"] / share["images"]
                    # The finest last and thinnest, so that none hides another.
                    axis.plot(held.index, held, line, color=colour, lw=5 - level / 15)
            axis.set(xlabel="round", ylim=(0, 1.03), title=arm)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0][0].set_ylabel("share of the client's images")
        handles = [Line2D([], [], color=c, lw=6, label=f"at {k} dB") for k, c in colours.items()]
        handles += [
            Line2D([], [], color="0.3", ls="-", label="rounds together"),
            Line2D([], [], color="0.3", ls="--", label="each round alone"),
            Line2D([], [], color="0.6", lw=5, alpha=0.4, label="used by then"),
        ]
        axes[0][-1].legend(
            handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False
        )
        figure.suptitle("What the server holds of a client's data (simulated)", fontsize=11)
        save(figure, path)
        plt.close(figure)
    return path


def gallery(images: Any, captions: Sequence[str], path: Path, title: str) -> Path | None:
    """Draw the images that are held of one client, each with its caption, ten in a row.

    Parameters
    ----------
    images : Tensor, shape (K, C, H, W)
        Grey or colour; of others nothing is drawn.
    captions : sequence of str
    path : Path
        The PNG to write.
    title : str
    """
    if images.shape[1] not in (1, 3):
        return None
    columns = min(10, len(images))
    lines = -(-len(images) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(max(0.95 * columns, 5), 1.15 * lines + 0.5), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        pixels = np.clip(np.moveaxis(np.asarray(image), 0, -1), 0, 1)
        axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(caption, fontsize=7, pad=2)
    figure.suptitle(title, fontsize=10)
    save(figure, path)
    plt.close(figure)
    return path


def _label(name: str, strength: object) -> str:
    return defence_words(name, strength, "none")


def _labels(table: pd.DataFrame) -> pd.Series:
    pairs = zip(table["defence"], table["strength"], strict=True)
    return pd.Series([_label(d, s) for d, s in pairs], index=table.index, dtype=object)


def leakage_vs_rounds(
    leakage: pd.DataFrame,
    rounds: pd.DataFrame,
    path: Path,
    by: str = "defence",
    title: str = "What the server reconstructs (simulated): median of clients, quartiles",
) -> Path:
    """Draw attained and predicted PSNR over rounds above accuracy over rounds.

    Parameters
    ----------
    leakage : DataFrame
        As in ``leakage.csv``: medians and quartiles of the attack's PSNR are solid, medians of
        the predicted PSNR, where there is one, dashed.
    rounds : DataFrame
        As in ``rounds.csv``; with columns ``defence`` and ``strength`` where several runs
        are overlaid.
    path : Path
        The PNG to write.
    by : str
        What has a colour of its own: the defence, or a column of both tables.
    title : str
    """
    if by == "defence":
        leakage = leakage.assign(defence=_labels(leakage))
        if "defence" in rounds:
            rounds = rounds.assign(defence=_labels(rounds))
        else:
            rounds = rounds.assign(defence=leakage["defence"].iloc[0] if len(leakage) else "none")
    order = list(dict.fromkeys(rounds[by]))
    # Ten colours can be told apart by anyone; more must at least differ.
    colours = sns.color_palette("colorblind" if len(order) <= 10 else "husl", len(order))
    palette = dict(zip(order, colours, strict=True))
    # A "$" in a folder's name begins no formula.
    wide = 8 + 0.08 * max(0, *(len(str(name)) - 18 for name in order), 0)
    with sns.axes_style("whitegrid"), mpl.rc_context({"text.parse_math": False}):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(wide, 6.5), sharex=True, height_ratios=(5, 2), layout="constrained"
        )
        common = {"x": "round", "hue": by, "hue_order": order, "palette": palette}
        _draw_leakage(leakage, top, common)
        top.set_title(title)
        sns.lineplot(rounds, y="accuracy", marker="o", legend=False, ax=bottom, **common)
        bottom.set(ylabel="test accuracy", ylim=(0, 1), xlabel="round")
        bottom.xaxis.get_major_locator().set_params(integer=True)
        save(figure, path)
        plt.close(figure)
    return path


def _draw_leakage(leakage: pd.DataFrame, axis: Axes, common: dict[str, Any]) -> None:
    """Draw the attack's PSNR solid and the predicted one dashed, in the colour of the defence."""
    made = leakage[reconstructed(leakage)]
    scored = made.dropna(subset="psnr_db").copy()
    scored["psnr_db"] = scored["psnr_db"].astype(float).clip(upper=CEILING_DB)
    predicted = leakage.iloc[:0]
    if "predicted_psnr_db" in leakage:  # tables of earlier versions have none
        predicted = leakage.dropna(subset="predicted_psnr_db").copy()
        predicted["predicted_psnr_db"] = predicted["predicted_psnr_db"].clip(upper=CEILING_DB)
    handles = [Line2D([], [], color=c, lw=6, label=d) for d, c in common["palette"].items()]
    if not scored.empty:
        sns.lineplot(
            scored, y="psnr_db", estimator="median", errorbar=("pi", 50), marker="o",
            err_kws={"alpha": 0.15}, legend=False, ax=axis, **common,
        )  # fmt: skip
        handles.append(Line2D([], [], color="0.3", marker="o", label="attack"))
    if not predicted.empty:
        sns.lineplot(
            predicted, y="predicted_psnr_db", estimator="median", errorbar=None,
            linestyle="--", legend=False, ax=axis, **common,
        )  # fmt: skip
        handles.append(Line2D([], [], color="0.3", linestyle="--", label="predicted"))
    if scored.empty:
        why = "nothing was reconstructed" if made.empty else "the true images are not known"
        axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center")
    axis.set(ylabel="PSNR (dB)", ylim=(0, 1.03 * axis.get_ylim()[1]))
    _compress(axis)
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _compress(axis: Axes) -> None:
    """Draw what is exact to the eye in less height, where there is much of it."""
    if axis.get_ylim()[1] < ENOUGH_DB:
        return
    compress(axis)
    axis.text(
        0.01, INDISTINGUISHABLE + _SQUEEZE, "nobody sees a difference here (scale compressed)",
        va="bottom", transform=axis.get_yaxis_transform(), fontsize=8, color="0.4",
    )  # fmt: skip


def compress(axis: Axes, which: Literal["x", "y"] = "y") -> None:
    """Draw PSNR above 40 dB, where nobody sees a difference, on a fifth of the scale."""
    top, knee = 1.05 * CEILING_DB, INDISTINGUISHABLE

    def down(y: np.ndarray) -> np.ndarray:
        return np.where(y > knee, knee + (y - knee) / _SQUEEZE, y)

    def up(y: np.ndarray) -> np.ndarray:
        return np.where(y > knee, knee + (y - knee) * _SQUEEZE, y)

    low, high = range(0, int(knee) + 1, 10), range(100, int(top) + 1, 50)
    set_scale = axis.set_yscale if which == "y" else axis.set_xscale
    set_scale("function", functions=(down, up))
    axis.set(**{f"{which}ticks": [*low, *high], f"{which}lim": (0, top)})
    span = axis.axhspan if which == "y" else axis.axvspan
    span(knee, top, color="0.95", zorder=0)


def front(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Return the points that no other beats in both, more of x and less of y; most of x first."""
    chosen: list[int] = []
    for n in sorted(range(len(x)), key=lambda i: (-x[i], y[i])):
        if not chosen or y[n] < y[chosen[-1]]:
            chosen.append(n)
    return chosen


def reconstructions(arms: Sequence[Path], path: Path, names: Sequence[str] | None = None) -> Path:
    """Draw true images above what each arm's attack made of them, first round first.

    Parameters
    ----------
    arms : sequence of Path
        Folders of runs; each holds ``reconstructions/round-*.npz``.
    path : Path
        The PNG to write.
    names : sequence of str, optional
        Of the arms; by default their defences.
    """
    found = [_first_round(arm) for arm in arms]
    if names is not None:
        found = [(name, images) for name, (_, images) in zip(names, found, strict=True)]
    # Joined by client and image: one that failed in one arm leaves a hole there.
    keys = sorted({key for _, images in found for key in images})[:_COLUMNS]
    truth = [next(images[k][0] for _, images in found if k in images) for k in keys]
    rows = [
        (
            label,
            [images[k][1] if k in images else None for k in keys],
            [images[k][2] if k in images else math.nan for k in keys],
        )
        for label, images in found
    ]
    title = f"Reconstructed from the update alone, round {keys[0][0]} (simulated)"
    return image_grid(truth, rows, path, title)


def image_grid(
    truth: Sequence[np.ndarray],
    rows: Sequence[tuple[str, Sequence[np.ndarray | None], Sequence[float]]],
    path: Path,
    title: str = "Reconstructed from the gradient alone",
) -> Path:
    """Draw true images above rows of reconstructions.

    Parameters
    ----------
    truth : sequence of ndarray, each (C, H, W)
        The first eight are drawn; none where the truth is not known.
    rows : sequence of (label, images, PSNR in dB)
        None in the place of an image leaves a hole.
    path : Path
        The PNG to write.
    title : str
    """
    columns = min(_COLUMNS, max([len(truth), *(len(made) for _, made, _ in rows)]))
    lines = len(rows) + bool(truth)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(1.25 * columns + 1, 1.5 * lines + 0.4),
        squeeze=False,
        layout="constrained",
    )
    if truth:
        _draw(axes[0], truth[:columns], "true image", [""] * columns)
    for line, (label, made, psnr) in zip(axes[lines - len(rows) :], rows, strict=True):
        shown = list(zip(made, psnr, strict=True))[:columns]
        captions = [_caption(image, p) if truth else "" for image, p in shown]
        _draw(line, made[:columns], label, captions)
    figure.suptitle(title, fontsize=11)
    save(figure, path)
    plt.close(figure)
    return path


Picture = tuple[np.ndarray, np.ndarray, float]


def _first_round(arm: Path) -> tuple[str, dict[tuple[int, int, int], Picture]]:
    """Return a run's defence and, by (round, client, image), what its first round gave."""
    first = min((arm / "reconstructions").glob("round-*.npz"))
    number = int(first.stem.removeprefix("round-"))
    with np.load(first) as stored:
        fields = [stored[k] for k in ("client", "image", "truth", "reconstruction", "psnr_db")]
    images = {
        (number, int(client), int(image)): (truth, made, float(psnr))
        for client, image, truth, made, psnr in zip(*fields, strict=True)
    }
    table = pd.read_csv(arm / LEAKAGE.file, nrows=1)
    return _label(table["defence"][0], table["strength"][0]), images


def _caption(image: np.ndarray | None, psnr_db: float) -> str:
    if math.isnan(psnr_db):
        return "failed" if image is None else "not known"
    return "exact" if math.isinf(psnr_db) else f"{psnr_db:.1f} dB"


def _draw(
    line: np.ndarray, images: Sequence[np.ndarray | None], label: str, captions: Sequence[str]
) -> None:
    for axis, image, caption in zip(line, images, captions, strict=True):
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(caption, fontsize=8)
        for spine in axis.spines.values():
            spine.set_visible(False)
        if image is not None:
            pixels = np.clip(np.moveaxis(image, 0, -1), 0, 1)
            axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1)  # colour needs no map
    line[0].set_ylabel(label, fontsize=9)
