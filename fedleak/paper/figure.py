"""The comparison as a figure: targets beside what each attack made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedleak.paper.cells import AttackSpec, Images, pictures_of
from fedleak.paper.tables import select
from fedleak.plots import save
from fedleak.wording import CEILING_DB

#: How the paper and its readers call the attacks.
TITLES = {
    "linear": "R-GAP",
    "dlg": "DLG",
    "idlg": "iDLG",
    "cosine": "cosine + TV",
    "hybrid-paper": "hybrid (paper)",
    "hybrid": "hybrid (ours)",
}
_EDGE, _CAPTION, _SIDE = 0.92, 0.17, 0.85


def draw(
    table: pd.DataFrame,
    folder: Path,
    networks: Sequence[str],
    attacks: Sequence[AttackSpec],
    images: Images,
) -> Path:
    """Draw ``paper.png``: a block of rows for each image, a row for each network.

    Parameters
    ----------
    table : DataFrame
        The rows of ``paper.csv``.
    folder : Path
        Holds the reconstructions, and takes the picture.
    networks, attacks : sequence
        Rows and columns.
    images : Images
        One block for each.
    """
    columns = 1 + len(attacks)
    height = len(networks) * (_EDGE + _CAPTION)
    figure = plt.figure(
        figsize=(columns * (_EDGE + 0.06) + _SIDE, len(images) * (height + 0.5) + 0.15)
    )
    blocks = figure.subfigures(len(images), 1, squeeze=False)[:, 0]
    for n, block in enumerate(blocks):
        _block(block, table, folder, networks, attacks, images, n)
    path = folder / "paper.png"
    save(figure, path, 200)
    plt.close(figure)
    return path


def _block(
    block: Figure,
    table: pd.DataFrame,
    folder: Path,
    networks: Sequence[str],
    attacks: Sequence[AttackSpec],
    images: Images,
    n: int,
) -> None:
    width, height = block.bbox.width / block.figure.dpi, block.bbox.height / block.figure.dpi
    axes = block.subplots(
        len(networks), 1 + len(attacks), squeeze=False,
        gridspec_kw={
            "left": _SIDE / width, "right": 1 - 0.06 / width, "top": 1 - 0.42 / height,
            "bottom": 0.24 / height, "wspace": 0.06 / _EDGE, "hspace": _CAPTION / _EDGE,
        },
    )  # fmt: skip
    truth = images.pixels[n].numpy()
    for line, network in zip(axes, networks, strict=True):
        line[0].set_ylabel(network, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)
        _show(line[0], truth, "")
        for axis, spec in zip(line[1:], attacks, strict=True):
            rows = select(table, network, spec)
            rows = rows[rows["image"] == images.names[n]]
            made = _picture(folder, network, spec, n) if len(rows) else None
            psnr = float(rows["psnr_db"].iloc[0]) if len(rows) else math.nan
            _show(axis, made, _caption(psnr) if len(rows) else "not run")
    for axis, title in zip(axes[0], ["target", *map(_title, attacks)], strict=True):
        axis.set_title(title, fontsize=8, pad=4)


def _picture(folder: Path, network: str, spec: AttackSpec, n: int) -> np.ndarray | None:
    path = pictures_of(folder, network, spec.name, spec.text)
    if not path.is_file():
        return None
    with np.load(path) as stored:
        made = stored["made"]
    return made[n] if n < len(made) and np.isfinite(made[n]).all() else None


def _title(spec: AttackSpec) -> str:
    title = TITLES.get(spec.name, spec.name)
    prior = spec.options.get("prior")
    return f"{title}\n{prior}" if prior else title


def _caption(psnr_db: float) -> str:
    if math.isnan(psnr_db):
        return "failed"
    return "exact" if psnr_db >= CEILING_DB else f"{psnr_db:.1f} dB"


def _show(axis: Axes, image: np.ndarray | None, caption: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(caption, fontsize=7, labelpad=2)
    for spine in axis.spines.values():
        spine.set_visible(image is None)
        spine.set(linewidth=0.5, color="0.7")
    if image is not None:
        pixels = np.clip(np.moveaxis(image, 0, -1), 0, 1).squeeze()
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axis.set_box_aspect(1)
