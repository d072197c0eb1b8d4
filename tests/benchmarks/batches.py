"""Batches: every image of it, told apart at the head, over random draws.

``python -m tests.benchmarks.batches [--data FOLDER] [--network cnn2-v1] [--batch-size 8]
[--draws 20] [--attack hybrid] [--classes 10]``

Each draw takes random images, of which at least two have one label, and new random weights; the
attack knows neither labels nor order. With more classes than the folder has, labels are drawn.
Without ``--data`` the images are digits, 8x8 pixels.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedleak import build_model, laboratory, make_attack
from fedleak.data import load_data
from tests.benchmarks.common import parse, parser_of, report


def images_of(data: Path | None) -> tuple[Tensor, Tensor]:
    """Return images and labels of a folder with one folder for each class, or digits."""
    if data is None:
        digits, _ = load_data("digits")
        return digits.batch(range(len(digits)))
    files, pixels = laboratory.read_images([data], 3, 0)
    return pixels, torch.tensor(laboratory.labels_of(files, 10**6, 0))


def measure(
    images: Tensor, labels: Tensor, attack: str, network: str, batch: int, classes: int, seed: int
) -> dict[str, Any]:
    """Attack one random batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randperm(len(images), generator=generator)[:batch]
        y = labels[chosen]
        if classes > int(labels.max()) + 1:
            y = torch.randint(classes, (batch,), generator=generator)
        if batch == 1 or len(y.unique()) < batch:
            break
    shape = (images.shape[1], images.shape[2], images.shape[3])
    model = build_model(network, shape, classes, seed).eval()
    trials = laboratory.reconstruct(model, images[chosen], y, make_attack(attack), batch_size=batch)
    details = trials.trials[0].reconstruction.details
    head = details.get("head", {})
    psnr = [min(p, 160.0) for p in trials.psnr_db]
    return {
        "draw": seed,
        "least dB": min(psnr),
        "mean dB": statistics.fmean(psnr),
        "labels wrong": sum(t.label != t.label_inferred for t in trials.trials),
        "trusted": sum(bool(t.trusted) for t in trials.trials),
        "ratio": head.get("singular_value_ratio", 0.0),
        "by": details["by"],
        "s": trials.seconds,
    }


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, help="Folder with one folder of images per class")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--attack", default="hybrid")
    parser.add_argument("--classes", type=int, default=10)
    options = parse(parser)
    images, labels = images_of(options.data)
    for network in options.network or ["cnn2-v1"]:
        rows = [
            measure(
                images, labels, options.attack, network, options.batch_size, options.classes, seed
            )
            for seed in range(options.draws)
        ]
        mean = statistics.fmean(r["mean dB"] for r in rows)
        least = sorted(r["least dB"] for r in rows)
        over = ", ".join(f"{sum(v >= k for v in least)} over {k}" for k in (30, 60, 80, 115))
        note = (
            f"{options.attack} on {network}, batches of {options.batch_size}, {options.classes} "
            f"classes: mean {mean:.1f} dB, worst image {least[0]:.1f} dB; of {len(rows)} draws "
            f"with every image: {over} dB. An exact image counts as 160 dB."
        )
        report(rows, options, note)


if __name__ == "__main__":
    main()
