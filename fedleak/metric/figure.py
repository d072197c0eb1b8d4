"""Pictures of an audit: bars of the layers, and what is left open of each pixel."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

from fedleak.metric.attribution import NOISED, PRUNED
from fedleak.metric.audit import Audit
from fedleak.plots import save

_COLUMNS = 8


def draw(audit: Audit, folder: Path) -> list[Path]:
    """Draw ``layers.png`` and ``open.png`` into a folder.

    Returns
    -------
    list of Path
        The pictures drawn; no bars where nothing is told of the layers.
    """
    made = []
    if audit.metric is not None or audit.attribution is not None:
        made.append(layers(audit, folder / "layers.png"))
    return [*made, open_variance(audit, folder / "open.png")]


def layers(audit: Audit, path: Path) -> Path:
    """Draw the ranks of the layers' systems, and the dB that each layer tells."""
    panels = [p for p, there in ((_ranks, audit.metric), (_decibels, audit.attribution)) if there]
    counts = [
        len(audit.metric.layers + audit.metric.dense) if p is _ranks and audit.metric
        else 2 * len(audit.attribution.layers) if audit.attribution else 1
        for p in panels
    ]  # fmt: skip
    with sns.axes_style("whitegrid"), mpl.rc_context({"text.parse_math": False}):
        figure, axes = plt.subplots(
            len(panels), 1, squeeze=False, layout="constrained",
            figsize=(7.5, sum(1.2 + 0.3 * max(n, 1) for n in counts)),
            height_ratios=[1.2 + 0.3 * max(n, 1) for n in counts],
        )  # fmt: skip
        for panel, axis in zip(panels, axes[:, 0], strict=True):
            panel(audit, axis)
        save(figure, path)
        plt.close(figure)
    return path


def _ranks(audit: Audit, axis: Axes) -> None:
    assert audit.metric is not None
    shown = [*audit.metric.layers, *audit.metric.dense]
    names = [layer.name for layer in shown]
    solved, left = sns.color_palette("colorblind", 2)
    share = np.array([layer.rank / layer.unknowns for layer in shown])
    axis.barh(names, share, color=solved, label="determined (rank)")
    axis.barh(names, 1 - share, left=share, color=left, label="left open (deficiency)")
    for y, layer in enumerate(shown):
        text = f"{layer.rank} of {layer.unknowns}, weight {layer.weight:.2g}"
        axis.text(0.01, y, text, va="center", fontsize=8, color="white")
    axis.set(xlim=(0, 1), xlabel="part of the layer's inputs")
    axis.set_title(f"Linear systems of the layers: c(M) = {audit.metric.c}", fontsize=10)
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _decibels(audit: Audit, axis: Axes) -> None:
    found = audit.attribution
    assert found is not None
    place = np.arange(len(found.layers))
    series: dict[str, list[float | None]] = {
        "alone, above the prior": [x.alone_db - found.nothing_db for x in found.layers],
        "lost if withheld": [x.withheld_db for x in found.layers],
        f"lost if pruned by {PRUNED:g}": [x.pruned_db for x in found.layers],
        f"lost under noise {NOISED:g}": [x.noised_db for x in found.layers],
    }
    drawn = {k: [v for v in values if v is not None] for k, values in series.items()}
    drawn = {k: v for k, v in drawn.items() if len(v) == len(found.layers)}
    height = 0.8 / len(drawn)
    colours = dict(zip(series, sns.color_palette("colorblind", len(series)), strict=True))
    for n, (label, values) in enumerate(drawn.items()):
        offset = (n - (len(drawn) - 1) / 2) * height
        axis.barh(place + offset, values, height, label=label, color=colours[label])
    axis.set_yticks(place, [x.name for x in found.layers], fontsize=8)
    axis.set(xlabel="dB of predicted PSNR")
    axis.set_title(
        f"What each layer tells: {found.psnr_db:.1f} dB together, {found.nothing_db:.1f} dB "
        f"without any (gradients known to {found.level:g})",
        fontsize=10,
    )
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def open_variance(audit: Audit, path: Path) -> Path:
    """Draw the standard deviation that is left of each pixel, the mean over its channels."""
    left = audit.prediction.rms.square().mean(1).sqrt().cpu().numpy()[:_COLUMNS]
    figure, axes = plt.subplots(
        1, len(left), squeeze=False, layout="constrained", figsize=(2.6 * len(left) + 1.4, 2.9)
    )
    top = max(float(left.max()), 1e-300)
    for n, axis in enumerate(axes[0]):
        drawn = axis.imshow(left[n], cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.set_xlabel(f"image {n + 1}" if len(left) > 1 else "", fontsize=8)
    figure.colorbar(drawn, ax=axes[0, -1], label="root mean square, pixels in [0, 1]")
    figure.suptitle(f"Left open of each pixel: {audit.prediction.psnr_db:.1f} dB", fontsize=10)
    save(figure, path)
    plt.close(figure)
    return path
