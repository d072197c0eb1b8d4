"""Networks that people federate: what one update gives, over random draws.

``python -m tests.benchmarks.real [--data FOLDER] [--network resnet18] [--images 1] [--draws 10]
[--attack hybrid] [--seconds 90] [--jobs 1] [--device cpu] [--train-mode] [--defence noise:0.1]
[--out results/runs/real.csv]``

Each draw takes random images and new random weights (seeds 0, 1, ...); the client computes one
float32 gradient, the attack knows neither labels nor images. Rows are appended to ``--out`` as they
come, and what is there already is not done again. Without ``--data`` the images are parts of
photographs that are installed along, 32x32 pixels.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fedleak  # before torch: it sets how torch's threads wait

import torch  # isort: skip
import torch.nn.functional as F
import torchvision.models as zoo
from torch import Tensor, nn

from fedleak import Observation, ThreatModel
from fedleak.attacks import attack_for, run_attack
from fedleak.commands.console import read_options
from fedleak.defences import defend, parse_defence
from fedleak.images import read_images
from fedleak.paper.photographs import photographs
from fedleak.quality import score_batch


def conv_pool() -> nn.Module:
    """Two convolutions (32, 64 filters), a max pool, two fully connected layers, ReLU."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 256, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def strided() -> nn.Module:
    """Three convolutions (32, 64, 64 filters), two of them strided, ReLU."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 64, 10),
    )  # fmt: skip


def lenet() -> nn.Module:
    """The network of most Flower tutorials: two convolutions with max pools, three layers."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84),
        nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def vgg11() -> nn.Module:
    """VGG-11 with batch normalisation and one fully connected layer."""
    model = zoo.vgg11_bn(num_classes=10)
    model.avgpool, model.classifier = nn.Identity(), nn.Linear(512, 10)
    return model


def vit() -> nn.Module:
    """ViT-B/16 with a head that is drawn: torchvision's is zero, and then nothing below learns."""
    model = zoo.vit_b_16(num_classes=10)
    model.heads.head.reset_parameters()
    return model


def _small_stem(model: nn.Module) -> nn.Module:
    """Give a residual network the stem for 32x32 pixels: 3x3, no stride, no pool."""
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def _groups(channels: int) -> nn.Module:
    return nn.GroupNorm(min(32, channels // 4), channels)


#: Factories by name, and the side of the images in pixels.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "conv-pool": (conv_pool, 32),
    "strided": (strided, 32),
    "lenet": (lenet, 32),
    "vgg11": (vgg11, 32),
    "resnet18": (lambda: _small_stem(zoo.resnet18(num_classes=10)), 32),
    "resnet18-group": (lambda: _small_stem(zoo.resnet18(num_classes=10, norm_layer=_groups)), 32),
    "resnet34": (lambda: _small_stem(zoo.resnet34(num_classes=10)), 32),
    "resnet50": (lambda: _small_stem(zoo.resnet50(num_classes=10)), 32),
    "mobilenet-v2": (lambda: zoo.mobilenet_v2(num_classes=10), 32),
    "densenet121": (lambda: zoo.densenet121(num_classes=10), 32),
    "resnet18-224": (lambda: zoo.resnet18(num_classes=10), 224),
    "vit-b-16": (vit, 224),
}
COLUMNS = (
    "network", "mode", "defence", "informed", "attack", "images", "draw", "place", "psnr_db",
    "psnr_fitted_db", "ssim", "label_right", "fit", "certified", "by", "status", "reason",
    "seconds",
)  # fmt: skip


def draw_images(data: str | None, count: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random images of a folder, or of photographs, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    if data is None:
        _, pool = photographs(0, side)
        chosen = torch.randperm(len(pool), generator=generator)[:count]
        return pool[chosen], torch.randint(10, (count,), generator=generator)
    files = sorted(f for f in Path(data).rglob("*") if f.is_file())
    names = sorted({f.parent.name for f in files})
    chosen = torch.randperm(len(files), generator=generator)[:count].tolist()
    pixels = torch.cat([read_images([files[i]], 3, size=(side, side))[1] for i in chosen])
    return pixels, torch.tensor([names.index(files[i].parent.name) for i in chosen])


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Attack one update; a row for each image."""
    torch.set_num_threads(job["threads"])
    make, side = NETWORKS[job["network"]]
    images, labels = draw_images(job["data"], job["images"], side, job["draw"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job["draw"])
        model = make().train(job["mode"] == "train")
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradient = torch.autograd.grad(F.cross_entropy(model(images.float()), labels), parameters)
    spec = parse_defence(job["defence"])
    sent = defend(dict(zip(names, gradient, strict=True)), spec, job["draw"])
    seen = Observation.from_gradient(
        model, sent, (3, side, side), len(images), defence=spec if job["informed"] else None,
        threat=ThreatModel(defence=job["informed"]),
    )  # fmt: skip
    attack = attack_for(job["attack"], job["options"], device=job["device"], seed=job["draw"])
    begin = time.perf_counter()
    (outcome,) = run_attack(attack, [seen], seconds=job["seconds"])
    seconds = time.perf_counter() - begin
    found = outcome.reconstruction
    made, guessed = (None, None) if found is None else (found.images, found.labels)
    rows = []
    for place, one in enumerate(score_batch(made, guessed, images, labels)):
        row = {k: job[k] for k in ("network", "mode", "defence", "informed", "attack", "images",
                                   "draw")}  # fmt: skip
        row |= {"place": place, "status": getattr(outcome, "status", ""), "reason": outcome.reason}
        row["seconds"] = round(seconds, 1)
        if found is not None and one.quality is not None:
            row |= {
                "psnr_db": round(one.quality.psnr_db, 2),
                "psnr_fitted_db": round(getattr(one.quality, "psnr_fitted_db", float("nan")), 2),
                "ssim": round(one.quality.ssim, 4),
                "label_right": one.label == one.label_inferred,
                "fit": f"{found.fit:.2e}",
                "certified": found.details.get("certified", False),
                "by": found.details.get("by", ""),
            }
        rows.append(row)
    return rows


def jobs_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Return what is to be done, in order."""
    for network in options.network or list(NETWORKS):
        for attack in options.attack or ["hybrid"]:
            for defence in options.defence or ["none"]:
                for images in options.images or [1]:
                    for draw in range(options.draws):
                        yield {
                            "network": network, "attack": attack, "defence": defence,
                            "images": images, "draw": draw, "informed": options.informed,
                            "mode": "train" if options.train_mode else "eval",
                            "data": options.data, "seconds": options.seconds,
                            "threads": options.threads, "device": options.device,
                            "options": read_options(options.option),
                        }  # fmt: skip


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("network", "mode", "defence", "informed", "attack", "images", "draw")
    return tuple(str(row[k]) for k in names)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Do what is not done yet, and append each row as it comes."""
    done: list[dict[str, Any]] = []
    if options.out.is_file():
        with options.out.open(newline="") as file:
            done = list(csv.DictReader(file))
    known = {_key(r) for r in done}
    left = [j for j in jobs_of(options) if _key(j) not in known]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not done:
            writer.writeheader()
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            for future in as_completed([pool.submit(measure, j) for j in left]):
                rows = future.result()
                writer.writerows(rows)
                file.flush()
                done += rows
                for row in rows:
                    print(*(f"{k}={row.get(k, '')}" for k in COLUMNS if k != "options"), flush=True)
    wanted = {_key(j) for j in jobs_of(options)}
    return [r for r in done if _key(r) in wanted]


def summary(rows: list[dict[str, Any]]) -> str:
    """Return a table in Markdown: one line for each network, mode, defence, attack and size."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_key(row)[:6], []).append(row)
    lines = [
        "| network | mode | defence | attack | images | draws | mean dB | median | least | 60 dB | "
        "80 dB | labels right | certified |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (network, mode, defence, _, attack, images), part in groups.items():
        psnr = [min(float(r["psnr_db"]), 160.0) for r in part if str(r.get("psnr_db") or "")]
        draws = len({r["draw"] for r in part})
        if not psnr:
            lines.append(f"| {network} | {mode} | {defence} | {attack} | {images} | {draws} "
                         "| failed |" + " |" * 6)  # fmt: skip
            continue
        over = [sum(p >= k for p in psnr) for k in (60, 80)]
        right = sum(str(r.get("label_right")) == "True" for r in part)
        sure = sum(str(r.get("certified")) == "True" for r in part)
        lines.append(
            f"| {network} | {mode} | {defence} | {attack} | {images} | {draws} "
            f"| {statistics.fmean(psnr):.1f} | {statistics.median(psnr):.1f} | {min(psnr):.1f} "
            f"| {over[0]}/{len(part)} | {over[1]}/{len(part)} | {right}/{len(part)} "
            f"| {sure}/{len(part)} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="Folder with one folder of images per class")
    parser.add_argument("--network", action="append", choices=list(NETWORKS), default=[])
    parser.add_argument("--images", action="append", type=int, default=[])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--attack", action="append", default=[])
    parser.add_argument("--option", action="append", default=[], help="Of the attack: KEY=VALUE")
    parser.add_argument("--defence", action="append", default=[])
    parser.add_argument("--informed", action="store_true")
    parser.add_argument("--train-mode", action="store_true", help="Batch statistics in training")
    parser.add_argument("--seconds", type=float, default=90.0, help="Limit of one attack")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/runs/real.csv"))
    options = parser.parse_args(arguments)
    rows = run(options)
    print(summary(rows))
    print(
        f"\nfedleak {fedleak.__version__}, torch {torch.__version__}, {options.device}, "
        f"{options.threads} thread(s) a job, at most {options.seconds:g} s an attack."
    )


if __name__ == "__main__":
    main()
