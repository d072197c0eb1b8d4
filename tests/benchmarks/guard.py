"""A client's guard: how often it errs over honest training, and what it sees of each tamper.

``python -m tests.benchmarks.guard [--rounds 100] [--draws 10] [--honest | --tampered | --leakage]``

Honest: digits, three networks, learning rates 0.02, 0.1 and 0.5; fresh weights, weights trained ten
times as long, and a new head on those; five steps of 32 images between two models that a client
receives. Beside the signs in the weights, D-SNR: how far the largest gradient of one of its 32
images stands out. Tampered: a model of the same kind after 50 rounds, then the tampered one; seen
without the model before (a client that is deceived from the first round on), and with it. ``noise``
is an evasion: a server that knows the guard adds noise to the rows of its peeling, relative to
their size, so that no two are alike, and takes their means out, so that they lean to no side.
Leakage: what a client predicts for its own update, honest and tampered, after 50 rounds.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak import Observation, ThreatModel, build_model
from fedleak.attacks import attack_for
from fedleak.client.compute import gradient
from fedleak.metric.prediction import leakage_db
from fedleak.quality import score_batch
from fedleak.tampers import parse_tamper
from fedleak.tampers.signs import disparity, signs_of_tampering
from tests.benchmarks.batches import images_of
from tests.benchmarks.common import parse, parser_of, report
from tests.benchmarks.tampers import network, train

SHAPE, CLASSES, BATCH = (1, 8, 8), 10, 32
#: Disparities from which an alarm is counted.
LIMITS = (5.0, 100.0, 1e6)
#: (tamper, network, images, noise on the rows of the first layer)
TAMPERED = (
    ("peel", "mlp", 64, 0.0), ("peel", "mlp", 64, 1e-3), ("peel", "mlp", 64, 0.1),
    ("imprint", "mlp", 64, 0.0), ("trap", "mlp", 64, 0.0), ("trap", "mlp", 8, 0.0),
    ("fishing:by=class", "cnn2-v1", 64, 0.0), ("fishing:by=class", "cnn2-v1", 8, 0.0),
)  # fmt: skip
#: (network, tamper) of what a client predicts.
LEAKING = (
    ("mlp", "peel"), ("mlp", "trap"), ("cnn2-v1", "fishing:by=class"),
    ("cnn3-v1", "fishing:by=class"),
)  # fmt: skip


def made(kind: str, seed: int) -> nn.Module:
    """Return a network with fresh weights."""
    if kind == "mlp":
        return network(SHAPE, 1000, CLASSES, seed)
    return build_model(kind, SHAPE, CLASSES, seed)


def norms(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the norms of each image's gradient, (tensors, B)."""
    each = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        found, _ = gradient(model, image, label)
        each.append(torch.stack([g.double().norm() for g in found.values()]))
    return torch.stack(each, 1)


def honest(images: Tensor, labels: Tensor, kind: str, rate: float, rounds: int) -> Iterator[dict]:
    """Train honestly, and count the models that show a sign, or in which one image stands out."""
    model, draw = made(kind, 0), torch.Generator().manual_seed(0)
    for phase in ("fresh", "trained", "fine tuning"):
        if phase == "trained":
            train(model, images, labels, rate, 10 * rounds, draw)
        if phase == "fine tuning":
            head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                head.reset_parameters()
        before, alarms, stand_out = None, 0, []
        for _ in range(rounds):
            state = {k: v.detach().clone() for k, v in model.state_dict().items()}
            alarms += bool(signs_of_tampering(state, before))
            chosen = torch.randint(len(images), (BATCH,), generator=draw)
            stand_out.append(disparity(norms(model, images[chosen], labels[chosen])))
            before = state
            train(model, images, labels, rate, 5, draw)
        found = torch.tensor(stand_out)
        yield {
            "network": kind, "rate": rate, "phase": phase, "rounds": rounds, "signs": alarms,
            **{f"D-SNR {limit:g}": int((found >= limit).sum()) for limit in LIMITS},
            "D-SNR median": round(float(found.median()), 2),
        }  # fmt: skip


def tampered(
    images: Tensor, labels: Tensor, name: str, kind: str, batch: int, noise: float, draws: int
) -> dict[str, Any]:
    """Send a changed model in the course of a training, and look at it."""
    seen: dict[str, int] = dict.fromkeys(("alone", "before", *map(str, LIMITS)), 0)
    recovered = 0.0
    for seed in range(draws):
        model, draw = made(kind, seed), torch.Generator().manual_seed(seed)
        train(model, images, labels, 0.1, 250, draw)
        before = {k: v.detach().clone() for k, v in model.state_dict().items()}
        tamper = parse_tamper(name)
        state = tamper.prepare(model, SHAPE, seed + 1, 0, batch)
        if noise:
            rows = state["1.weight"]
            drawn = torch.randn(rows.shape, generator=draw).to(rows)
            rows = rows + noise * rows.square().mean().sqrt() * drawn
            state["1.weight"] = rows - rows.mean(1, keepdim=True)  # none leans to one side
            column = state["3.weight"]
            drawn = torch.randn(column.shape, generator=draw).to(column)
            state["3.weight"] = column * (1 + noise * drawn)
        other = copy.deepcopy(model)
        other.load_state_dict(state)
        seen["alone"] += bool(signs_of_tampering(state))
        seen["before"] += bool(signs_of_tampering(state, before))
        chosen = torch.randperm(len(images), generator=draw)[:batch]
        x, y = images[chosen], labels[chosen]
        value = disparity(norms(other, x, y))
        for limit in LIMITS:
            seen[str(limit)] += value >= limit
        names, parameters = zip(*other.named_parameters(), strict=True)
        step = torch.autograd.grad(F.cross_entropy(other(x), y), parameters)
        sent = dict(zip(names, step, strict=True))
        threat = ThreatModel(tamper=True)
        observed = Observation.from_gradient(other, sent, SHAPE, batch, threat=threat)
        if tamper.attack == "rows":  # what fishing gets takes its own attack, and minutes
            (found,) = attack_for("rows", {})([observed])
            scored = score_batch(found.images, found.labels, x, y)
            good = sum(s.quality is not None and s.quality.psnr_db >= 60 for s in scored)
            recovered += good / batch / draws
    return {
        "tamper": name, "images": batch, "noise": noise, "draws": draws,
        "recovered": round(recovered, 3) if tamper.attack == "rows" else "-",
        "seen alone": seen["alone"], "with the one before": seen["before"],
        **{f"D-SNR {limit:g}": seen[str(limit)] for limit in LIMITS},
    }  # fmt: skip


def leakage(images: Tensor, labels: Tensor, kind: str, name: str, batch: int) -> dict[str, Any]:
    """Predict what an update would show of its images: of the honest model, and tampered."""
    row: dict[str, Any] = {"network": kind, "tamper": name, "images": batch}
    model = made(kind, 0)
    train(model, images, labels, 0.1, 250, torch.Generator().manual_seed(0))
    for who in ("honest", "tampered"):
        if who == "tampered":
            model.load_state_dict(parse_tamper(name).prepare(model, SHAPE, 1, 0, batch))
        begin = time.perf_counter()
        told = leakage_db(model.eval(), images[:batch], labels[:batch])
        row |= {f"{who}, best": round(float(told.max()), 1),
                f"{who}, median": round(float(told.median()), 1)}  # fmt: skip
    return {**row, "seconds": round(time.perf_counter() - begin, 1)}


def main() -> None:
    """Print both tables."""
    parser = parser_of(__doc__, repeats=1)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--honest", action="store_true", help="Only false alarms")
    parser.add_argument("--tampered", action="store_true", help="Only detection")
    parser.add_argument("--leakage", action="store_true", help="Only what a client predicts")
    options = parse(parser)
    images, labels = images_of(None)
    if options.leakage:
        rows = [leakage(images, labels, k, t, b) for k, t in LEAKING for b in (8, 32)]
        report(rows, options, "PSNR in dB, predicted by the client for its own images.")
        return
    if not options.tampered:
        rows = [
            row
            for kind in ("mlp", "cnn2-v1", "cnn3-v1")
            for rate in (0.02, 0.1, 0.5)
            for row in honest(images, labels, kind, rate, options.rounds)
        ]
        total = sum(r["rounds"] for r in rows)
        told = [f"signs {100 * sum(r['signs'] for r in rows) / total:.2f} %"]
        told += [
            f"D-SNR {limit:g}: {100 * sum(r[f'D-SNR {limit:g}'] for r in rows) / total:.2f} %"
            for limit in LIMITS
        ]
        report(rows, options, f"False alarms in {total} honest rounds: {', '.join(told)}.")
    if not options.honest:
        rows = [tampered(images, labels, *one, options.draws) for one in TAMPERED]
        report(rows, options, "How many of the draws were seen.")


if __name__ == "__main__":
    main()
