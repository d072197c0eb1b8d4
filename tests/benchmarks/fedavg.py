"""``hybrid`` against ``cosine`` on weights after local training: same captures, same time.

``python -m tests.benchmarks.fedavg [--network NAME] [--data FOLDER] [--clients 10] [--epochs 1 5]
[--batch 8] [--images 16] [--rate 0.01] [--memory] [--json FILE]``

Each client trains the network of seed 0 on images of its own, by minibatch SGD in float32, with a
new order in every epoch. Both attacks simulate the local steps: ``cosine`` as published (Geiping et
al. 2020), in a guessed order, and ``hybrid`` with the order unknown. Neither knows labels or order.
``cosine`` gets as many steps as fit into the seconds that ``hybrid`` took for the same client, from
the seconds of its own steps measured just before, so that the times of a machine cancel.

``--data`` is a folder of images, in folders by class; without it, the digits of scikit-learn.
The learning rate is ten times smaller on larger images: with 0.1, plain SGD on 32x32 images
oscillates from the first step on, and an update has no likeness to any gradient.

``--memory`` measures instead the peak memory of ``hybrid`` in a process of its own, which attacks
one client of cnn4-v2 with 16 images of 32x32 after 5 epochs.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import fedleak
from fedleak import make_attack
from fedleak.attacks import Attack, Reconstruction
from fedleak.client.training import LocalTraining
from fedleak.data import load_data
from fedleak.observation import Observation
from fedleak.paper.photographs import photographs
from fedleak.quality import pair, score
from tests.benchmarks.common import parse, parser_of, peak_memory, report, seconds

import torch  # isort: skip
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor, nn

#: Steps of ``cosine`` that are timed to know how many fit.
TIMED = 10
MEMORY_NETWORK, MEMORY_EPOCHS, MEMORY_IMAGES = "cnn4-v2", 5, 16
NOTES = (
    "PSNR in dB: mean over clients, and half the width of its 95 % confidence interval "
    "(Student's t). gain: of hybrid over cosine, client by client."
)


def trained(
    model: nn.Module, images: Tensor, labels: Tensor, training: LocalTraining, seed: int
) -> dict[str, Tensor]:
    """Return the weights that a client sends."""
    own = copy.deepcopy(model)
    optimiser = torch.optim.SGD(
        own.parameters(),
        training.learning_rate,
        training.momentum,
        weight_decay=training.weight_decay,
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(training.epochs):
        order = torch.randperm(len(images), generator=generator)
        for part in order.split(training.batch_size):
            optimiser.zero_grad()
            F.cross_entropy(own(images[part]), labels[part]).backward()
            optimiser.step()
    return own.state_dict()


def observe(
    model: nn.Module, images: Tensor, labels: Tensor, training: LocalTraining, seed: int
) -> Observation:
    """Return what the server sees of one client."""
    sent = trained(model, images, labels, training, seed)
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    return Observation.from_weights(model, sent, training, shape, len(images))


def quality(result: Reconstruction, images: Tensor) -> float:
    """Return the mean PSNR of a client's images."""
    pairs = pair(result.images, images)
    return sum(score(result.images[i], images[k]).psnr_db for i, k in pairs) / len(pairs)


def measure(
    model: nn.Module,
    clients: list[tuple[Tensor, Tensor]],
    training: LocalTraining,
    steps: int = 600,
    tv: float = 0.2,
) -> dict[str, list[float]]:
    """Return the PSNR and the seconds of both attacks, client by client."""
    rows: dict[str, list[float]] = {
        k: [] for k in ("hybrid", "cosine", "hybrid s", "cosine s", "cosine steps", "wrong labels")
    }
    made: list[Reconstruction] = []

    def run(attack: Attack, seen: Observation) -> float:
        return seconds(lambda: made.append(attack([seen])[0]))

    first = observe(model, *clients[0], training, 0)
    for name in ("hybrid", "cosine"):  # the first call also pays for what torch sets up once
        make_attack(name, steps=1, device="cpu")([first])
    for n, (images, labels) in enumerate(clients):
        seen = observe(model, images, labels, training, n)
        rows["hybrid s"].append(run(make_attack("hybrid", steps=steps, device="cpu"), seen))
        rows["hybrid"].append(quality(made[-1], images))
        counts = [y.bincount(minlength=99) for y in (made[-1].labels, labels)]
        rows["wrong labels"].append(float((counts[0] - counts[1]).abs().sum()) / 2)
        one = run(make_attack("cosine", steps=1, tv=tv, device="cpu"), seen)
        more = run(make_attack("cosine", steps=1 + TIMED, tv=tv, device="cpu"), seen)
        each = max((more - one) / TIMED, 1e-4)
        fit = max(1, int((rows["hybrid s"][-1] - one) / each))
        rows["cosine s"].append(run(make_attack("cosine", steps=fit, tv=tv, device="cpu"), seen))
        rows["cosine"].append(quality(made[-1], images))
        rows["cosine steps"].append(float(fit))
    return rows


def half_width(values: list[float]) -> float:
    """Return half the width of the mean's 95 % confidence interval."""
    if len(values) < 2:
        return float("nan")
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(student.ppf(0.975, len(values) - 1)) * spread


def summarise(epochs: int, rows: dict[str, list[float]]) -> dict[str, Any]:
    """Return one row of the table."""
    out: dict[str, Any] = {"epochs": epochs, "clients": len(rows["hybrid"])}
    gain = [a - b for a, b in zip(rows["hybrid"], rows["cosine"], strict=True)]
    for name, values in (("hybrid", rows["hybrid"]), ("cosine", rows["cosine"]), ("gain", gain)):
        out[name] = f"{np.mean(values):.2f} ± {half_width(values):.2f}"
    for name in ("hybrid s", "cosine s", "cosine steps", "wrong labels"):
        out[name] = float(np.mean(rows[name]))
    return out


def clients_of(data: Path | None, clients: int, images: int) -> list[tuple[Tensor, Tensor]]:
    """Return images and labels of each client, drawn with seed 0."""
    source = load_data("digits")[0] if data is None else load_data("folder", str(data))[0]
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [order[n * images : (n + 1) * images] for n in range(clients)]
    if len(parts[-1]) < images:
        raise SystemExit(f"{len(source)} images are too few for {clients} clients of {images}")
    return [source.batch(part) for part in parts]


def memory(network: str = MEMORY_NETWORK, epochs: int = MEMORY_EPOCHS) -> dict[str, float]:
    """Return the memory of ``hybrid`` in a fresh process, in GiB."""
    command = [sys.executable, "-m", __spec__.name, "--child", network, str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, peak = json.loads(done.stdout)
    return {"imports GiB": imported / 2**30, "peak GiB": peak / 2**30}


def _child(network: str, epochs: str) -> None:
    """Attack one client; what thirty evaluations need, with a full history, all need."""
    torch.set_num_threads(1)
    imported = peak_memory()
    model = fedleak.build_model(network, (3, 32, 32), 10, 0)
    images = photographs(MEMORY_IMAGES)[1]
    labels = torch.arange(MEMORY_IMAGES) % 10
    seen = observe(model, images, labels, LocalTraining(0.01, 8, int(epochs)), 0)
    make_attack("hybrid", steps=30, device="cpu")([seen])
    print(json.dumps([imported, peak_memory()]))


def _options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, repeats=1)
    parser.add_argument("--data", type=Path, help="Folder with a folder of images for each class")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600, help="Evaluations of hybrid")
    parser.add_argument("--tv", type=float, default=0.2, help="cosine's total variation")
    parser.add_argument("--rate", type=float, help="Learning rate; 0.1 on digits, else 0.01")
    parser.add_argument("--memory", action="store_true", help="Measure memory only")
    return parser


def main() -> None:
    """Print the tables."""
    options = parse(_options())
    if options.memory:
        used = ", ".join(f"{name} {value:.2f}" for name, value in memory().items())
        print(f"hybrid, {MEMORY_NETWORK}, 16 images, 5 epochs: {used}. Target: a peak of 4 GiB.")
        return
    clients = clients_of(options.data, options.clients, options.images)
    shape = clients[0][0].shape[1:]
    rate = options.rate or (0.1 if options.data is None else 0.01)
    rows, raw = [], {}
    for name in options.network or ["cnn2-v1"]:
        model = fedleak.build_model(name, tuple(shape), 10, 0)
        for epochs in options.epochs:
            training = LocalTraining(rate, options.batch, epochs)
            found = measure(model, clients, training, options.steps, options.tv)
            rows.append({"network": name} | summarise(epochs, found))
            raw[f"{name} {epochs}"] = found
    report(rows, options, f"Learning rate {rate:g}. {NOTES}", {"raw": raw})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(*sys.argv[2:])
    else:
        main()
