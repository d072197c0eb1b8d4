"""Fishing on a residual network: does one image of a batch come back, exactly?

``python -m tests.benchmarks.fishing --data FOLDER [--network resnet18] [--batch-size 64]
[--draws 10] [--by feature] [--public FOLDER] [--catch] [--out FILE]``

Each draw is a round: random images of a folder with one folder for each class, new random weights
in evaluation mode, one gradient in float32 of the tampered model. The server knows neither labels
nor images; the gate is set by images of the prior, or those of ``--public``. ``--catch`` only
counts who passes, without the attack on the one image, which takes a minute or two. Rows are
appended to ``--out``, and draws that are in it are not run again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fedleak import Observation, ThreatModel
from fedleak.attacks import attack_for, run_attack
from fedleak.attacks.fished import catch
from fedleak.quality import score_batch
from fedleak.tampers import make_tamper
from tests.benchmarks.real import NETWORKS, draw_images

COLUMNS = ("network", "by", "batch", "draw", "class", "passed", "psnr_db", "label_right", "fit",
           "certified", "status", "reason", "seconds")  # fmt: skip


def measure(options: argparse.Namespace, draw: int) -> dict[str, Any]:
    """Tamper, let a client compute one gradient, and read what comes back."""
    make, side = NETWORKS[options.network]
    shape, batch = (3, side, side), options.batch_size
    x, y = draw_images(options.data, batch, side, draw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        model = make().eval()
    tamper = make_tamper("fishing", by=options.by, public=options.public)
    sent = tamper.prepare(model, shape, draw + 1, 0, batch)
    client = copy.deepcopy(model)
    client.load_state_dict(sent)
    names, parameters = zip(*client.named_parameters(), strict=True)
    loss = F.cross_entropy(client(x.float()), y)
    gradient = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    threat = ThreatModel(tamper=True)
    seen = Observation.from_gradient(client, gradient, shape, batch, threat=threat)
    caught = catch(seen)
    row = {"network": options.network, "by": options.by, "batch": batch, "draw": draw,
           "class": caught.label, "passed": caught.count}  # fmt: skip
    if options.catch or caught.update is None:
        return row
    begin = time.perf_counter()
    attack = attack_for(tamper.attack, tamper.attack_options, options.device, draw)
    (outcome,) = run_attack(attack, [seen], seconds=options.seconds)
    row |= {"seconds": round(time.perf_counter() - begin, 1), "reason": outcome.reason}
    found = outcome.reconstruction
    if found is None:
        return {**row, "status": "failed"}
    scored = [s for s in score_batch(found.images, found.labels, x, y) if s.quality is not None]
    best = max(scored, key=lambda s: s.quality.psnr_db)  # type: ignore[union-attr]
    return row | {
        "psnr_db": round(best.quality.psnr_db, 2),  # type: ignore[union-attr]
        "label_right": best.label == best.label_inferred,
        "fit": f"{found.fit:.2e}",
        "certified": found.details.get("certified", False),
        "status": found.status,
    }


def main() -> None:
    """Print a row for each draw, and how often an image came back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="Folder with one folder of images per class")
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet18")
    parser.add_argument("--by", choices=["class", "feature"], default="feature")
    parser.add_argument("--public", type=Path, help="Images of the server's own")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="The first draw")
    parser.add_argument("--catch", action="store_true", help="Only count who passes")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="CSV to append to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    if options.out is not None and options.out.is_file():
        with options.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    known = {int(row["draw"]) for row in rows}
    for draw in range(options.first, options.first + options.draws):
        if draw in known:
            continue
        row = measure(options, draw)
        rows.append(row)
        print(row, flush=True)
        if options.out is not None:
            new = not options.out.is_file()
            with options.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerow(row)
    alone = sum(int(row["passed"]) == 1 for row in rows)
    exact = sum(float(row.get("psnr_db") or 0) >= 60 for row in rows)
    print(f"one image alone in {alone} of {len(rows)} rounds; at 60 dB in {exact}")


if __name__ == "__main__":
    main()
