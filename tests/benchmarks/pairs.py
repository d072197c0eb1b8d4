"""The security metric against the attack, over pairs of an architecture and a defence.

``python -m tests.benchmarks.pairs [--images FOLDER] [--limit 4] [--out results/metric]``

For each pair: c(M), its normalised form and the predicted PSNR, which see no image, and the PSNR
that ``hybrid`` attains (data-free prior, informed of the defence) as the mean over the images.
Finished pairs are kept in ``pairs.csv``: the same command again goes on. Without ``--images``
the photographs are attacked that are installed along.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from fedleak import laboratory, make_attack
from fedleak.metric import security_metric
from fedleak.metric.prediction import natural_prior, predict
from fedleak.metric.reference import make_references
from fedleak.models import PAPER_NETWORKS, conv_chain
from fedleak.paper.photographs import photographs
from fedleak.plots import compress

SHAPE = (3, 32, 32)
#: (filters, kernel, stride, padding) of each convolution, from narrow to wide, shallow to deep.
CHAINS = {
    **PAPER_NETWORKS,
    "1 filter, stride 1": [(1, 3, 1, 0)],
    "2 filters, stride 2": [(2, 4, 2, 0)],
    "4 filters, stride 2": [(4, 4, 2, 0)],
    "9 filters, stride 2": [(9, 4, 2, 0)],
    "6 filters, stride 3": [(6, 5, 3, 1)],
    "3 filters, stride 4": [(3, 6, 4, 1)],
    "12 filters, stride 4": [(12, 6, 4, 1)],
    "lenet": [(12, 5, 2, 2), (12, 5, 2, 2), (12, 5, 1, 2)],
    "narrow, 3 convolutions": [(4, 3, 2, 1), (4, 3, 2, 1), (4, 3, 1, 1)],
    "wide, 3 convolutions": [(16, 3, 2, 1), (24, 3, 2, 1), (24, 3, 1, 1)],
    "5 convolutions": [(8, 3, 1, 1), (8, 3, 2, 1), (8, 3, 1, 1), (8, 3, 2, 1), (8, 3, 1, 1)],
}
DEFENCES = (
    "noise:0.001", "noise:0.01", "noise:0.1", "noise:0.5",
    "prune:0.5", "prune:0.9", "prune:0.99", "quantise:4", "sign:1",
)  # fmt: skip
DEFENDED = ("cnn2-v2", "cnn4-v1", "cnn2-v1")
COLUMNS = (
    "network", "defence", "c", "c_normalised", "predicted_psnr_db", "attained_psnr_db",
    "attained_sd_db", "images", "fit",
)  # fmt: skip
#: Predictions and attacks above this are exact for every purpose.
EXACT_DB = 100.0


@dataclass(frozen=True)
class Pair:
    """An architecture and a defence."""

    network: str
    defence: str

    def model(self) -> nn.Module:
        """Return the network with the weights of seed 0."""
        torch.manual_seed(0)
        return conv_chain(CHAINS[self.network], SHAPE, 10, name=self.network).eval()


PAIRS = [Pair(n, "none") for n in CHAINS] + [Pair(n, d) for n in DEFENDED for d in DEFENCES]


def measure(pair: Pair, images: Tensor, labels: list[int]) -> dict[str, object]:
    """Predict without the images, and attack them."""
    model = pair.model()
    metric = security_metric(model, SHAPE)
    references = make_references(model, SHAPE, defence=pair.defence, count=1)
    predicted = predict(references, natural_prior(SHAPE))
    trials = laboratory.reconstruct(
        model, images, labels, make_attack("hybrid"), pair.defence, informed=True
    )
    attained = [min(p, 160.0) for p in trials.psnr_db]
    return {
        "network": pair.network,
        "defence": pair.defence,
        "c": metric.c,
        "c_normalised": round(metric.c_normalised, 4),
        "predicted_psnr_db": round(predicted.psnr_db, 2),
        "attained_psnr_db": round(statistics.fmean(attained), 2),
        "attained_sd_db": round(statistics.stdev(attained), 2) if len(attained) > 1 else "",
        "images": len(attained),
        "fit": f"{statistics.fmean(t.reconstruction.fit for t in trials.trials):.1e}",
    }


def spearman(x: np.ndarray, y: np.ndarray, draws: int = 5000) -> tuple[float, float, float]:
    """Return Spearman's correlation, with a 95% interval from bootstrap draws of pairs."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        chosen = rng.integers(len(x), size=len(x))
        value = spearmanr(x[chosen], y[chosen]).statistic
        if math.isfinite(value):
            found.append(value)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(spearmanr(x, y).statistic), float(low), float(high)


def conclude(table: pd.DataFrame) -> str:
    """Return the correlations and errors as Markdown."""
    attained = table["attained_psnr_db"].to_numpy()
    lines = ["| metric | Spearman with the attack's PSNR | 95% interval |", "|---|---|---|"]
    for name, column in (
        ("predicted PSNR", "predicted_psnr_db"),
        ("c(M)", "c"),
        ("normalised c(M)", "c_normalised"),
    ):
        for what, part in (("", table), (", undefended", table[table["defence"] == "none"])):
            y = part["attained_psnr_db"].to_numpy()
            rho, low, high = spearman(part[column].to_numpy(), y)
            lines.append(
                f"| {name}{what} ({len(part)} pairs) | {rho:.3f} | {low:.3f} ... {high:.3f} |"
            )
    predicted = table["predicted_psnr_db"].to_numpy()
    inside = (predicted >= 10) & (predicted <= 60)
    error = predicted[inside] - attained[inside]
    lines += [
        "",
        f"Where the prediction lies between 10 and 60 dB ({inside.sum()} pairs): mean absolute "
        f"error {np.abs(error).mean():.2f} dB, mean error {error.mean():+.2f} dB, largest "
        f"{np.abs(error).max():.1f} dB.",
    ]
    return "\n".join(lines)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw each metric against the attack's PSNR."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    shown = table.assign(kind=table["defence"].str.partition(":")[0])
    sns.set_theme(style="whitegrid", context="notebook")
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.5))
    for ax, column, title in (
        (axes[0], "predicted_psnr_db", "predicted PSNR (dB)"),
        (axes[1], "c", "c(M), as published"),
        (axes[2], "c_normalised", "c(M), normalised"),
    ):
        sns.scatterplot(
            shown, x=column, y="attained_psnr_db", hue="kind", style="kind", s=70, ax=ax,
            palette="colorblind", legend=ax is axes[0], alpha=0.85,
        )  # fmt: skip
        compress(ax, "y")
        rho, low, high = spearman(table[column].to_numpy(), table["attained_psnr_db"].to_numpy())
        ax.set_title(f"Spearman {rho:.2f} ({low:.2f} ... {high:.2f})")
        ax.set(xlabel=title, ylabel="PSNR that the attack attains (dB)")
        for name, offset in (("cnn4-v1", (14, -22)), ("cnn4-v2", (14, 16))):
            row = table[(table["network"] == name) & (table["defence"] == "none")]
            for x, y in zip(row[column], row["attained_psnr_db"], strict=True):
                ax.annotate(
                    name, (x, y), offset, textcoords="offset points", fontsize=10,
                    arrowprops={"arrowstyle": "-", "color": "0.3"},
                )  # fmt: skip
    compress(axes[0], "x")
    axes[0].plot([10, 165], [10, 165], color="0.6", linewidth=1, zorder=0)
    axes[0].legend(title="defence", loc="upper left")
    figure.suptitle("What a metric says without an attack, and what the attack then attains")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Measure what is missing, then write the table, the figure and the correlations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, default=None)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("results/metric"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.images is None:
        images, labels = photographs(args.limit)[1], [n % 10 for n in range(args.limit)]
    else:
        files, images = laboratory.read_images([args.images], 3, args.limit)
        labels = laboratory.labels_of(files, 10, 0)
    path = args.out / "pairs.csv"
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    done = {(r.network, r.defence) for r in pd.read_csv(path).itertuples()}
    for pair in PAIRS:
        if (pair.network, pair.defence) in done:
            continue
        begin = time.perf_counter()
        row = measure(pair, images, labels)
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([row[c] for c in COLUMNS])
        print(row, f"{time.perf_counter() - begin:.0f} s", flush=True)
    table = pd.read_csv(path)
    draw(table, args.out / "pairs.png")
    print(conclude(table))


if __name__ == "__main__":
    main()
