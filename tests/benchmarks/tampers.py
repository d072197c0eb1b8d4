"""Tampers: how much of a batch comes back, how sure that is, and what a guard would see.

``python -m tests.benchmarks.tampers [--data FOLDER] [--tamper peel] [--batch-size 64]
[--units 1000] [--draws 10] [--steps 0]``

Each draw takes random images and new random weights, trained for ``--steps`` of 0.1, of a network
of two fully connected layers with ReLU; ``none`` is the honest network. Labels are unknown.
``fishing`` is tried on a convolutional network of the paper instead, for the rarest class of the
batch. Without ``--data`` the images are digits, 8x8 pixels.
"""

from __future__ import annotations

import copy
import math
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak import Observation, ThreatModel, build_model
from fedleak.attacks import attack_for
from fedleak.quality import score_batch
from fedleak.tampers import make_tamper
from fedleak.tampers.signs import signs_of_tampering
from tests.benchmarks.batches import images_of
from tests.benchmarks.common import parse, parser_of, report


def network(shape: tuple[int, int, int], units: int, classes: int, seed: int) -> nn.Module:
    """Return two fully connected layers with ReLU, of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(shape), units),
            nn.ReLU(),
            nn.Linear(units, classes),
        )


def measure(
    images: Tensor, labels: Tensor, name: str, batch: int, units: int, seed: int, steps: int = 0
) -> dict[str, Any]:
    """Tamper, let a client compute one gradient, and read what comes back."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:batch]
    x, y = images[chosen], labels[chosen]
    shape = (images.shape[1], images.shape[2], images.shape[3])
    classes = int(labels.max()) + 1
    options = {}
    if name == "fishing":
        honest = build_model("cnn2-v1", shape, classes, seed)
        counts = torch.bincount(y, minlength=classes)
        options["label"] = int(torch.where(counts > 0, counts, batch + 1).argmin())
    else:
        honest = network(shape, units, classes, seed)
    train(honest, images, labels, 0.1, steps, generator)
    model, attack = copy.deepcopy(honest), attack_for("rows", {})
    if name != "none":
        tamper = make_tamper(name, **options)
        model.load_state_dict(tamper.prepare(honest, shape, num_images=batch))
        attack = attack_for(tamper.attack, tamper.attack_options)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    sent = dict(zip(names, gradient, strict=True))
    threat = ThreatModel(tamper=name != "none")
    (found,) = attack([Observation.from_gradient(model, sent, shape, batch, threat=threat)])
    scored = [s for s in score_batch(found.images, found.labels, x, y) if s.quality is not None]
    psnr = [s.quality.psnr_db for s in scored if s.quality is not None]
    sure = found.details.get("certified", [False] * len(found.images))
    right = {s.place: s.quality.psnr_db >= 60 for s in scored if s.quality is not None}
    return {
        "tamper": name,
        "draw": seed,
        "fished": found.details.get("fished", batch),
        "back": len(found.images),
        "at 60 dB": sum(p >= 60 for p in psnr),
        "certified": sum(sure),
        "certified wrong": sum(s and not right.get(n, False) for n, s in enumerate(sure)),
        "least dB": min([*psnr, 160.0]),
        "labels wrong": sum(s.label != s.label_inferred for s in scored),
        "signs": len(signs_of_tampering(model.state_dict())),
    }


def train(
    model: nn.Module, images: Tensor, labels: Tensor, rate: float, steps: int, draw: torch.Generator
) -> None:
    """Take steps of minibatches of 32."""
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        chosen = torch.randint(len(images), (32,), generator=draw)
        optimiser.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimiser.step()


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, help="Folder with one folder of images per class")
    parser.add_argument("--tamper", action="append", default=[])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--steps", type=int, default=0, help="Of training before")
    options = parse(parser)
    images, labels = images_of(options.data)
    for name in options.tamper or ["none", "trap", "imprint", "peel"]:
        rows = [
            measure(images, labels, name, options.batch_size, options.units, seed, options.steps)
            for seed in range(options.draws)
        ]
        share = [r["at 60 dB"] / options.batch_size for r in rows]
        note = (
            f"{name}, batches of {options.batch_size}, {options.units} units: "
            f"{100 * statistics.fmean(share):.1f} % of the images at 60 dB ({100 * min(share):.1f} "
            f"to {100 * max(share):.1f}); rounds with an image at 60 dB: "
            f"{sum(s > 0 for s in share)} of {len(rows)}; certified and wrong: "
            f"{sum(r['certified wrong'] for r in rows)}."
        )
        report(rows, options, note)


if __name__ == "__main__":
    main()
