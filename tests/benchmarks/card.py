"""What a card makes of the attacks: images a second, memory and launches, in one short run.

``python -m tests.benchmarks.card --json FILE [--seconds 540] [--device cuda]``

For a bare machine with a card for ten minutes: it needs torch, numpy and scipy, nothing of Flower
or Ray. It downloads nothing: images are drawn from the data-free prior. What matters most comes
first, the file is written after every case, and no case begins that may not end in time (as long as
the one before it, four times over). On the same machine the CPU attacks one image, too, with all of
its cores. Images that come back are scored, so that a number is of an attack that works.

``--device cpu --dry-run`` runs the same code in seconds, on small images.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.common import Network, report
from tests.benchmarks.launches import Counter, drawn

import torch  # isort: skip

import fedleak
from fedleak import make_attack
from fedleak.errors import FedleakError

#: Network, attack, and images at once; smallest first, so that each tells what the next costs.
CASES = [
    (network, attack, images)
    for images in (1, 32, 256, 1024)
    for network, attack in (
        ("cnn2-v1", "hybrid"),
        ("cnn2-v2", "hybrid"),
        ("cnn4-v2", "hybrid"),
        ("cnn2-v2", "linear"),
        ("cnn4-v2", "linear"),
    )
]
NOTES = "Simulated updates of images drawn from a prior; PSNR: median, an exact image as 160 dB."
_LONGER = 4


def measure(network: Network, attack: str, images: int, device: str, size: int) -> dict[str, Any]:
    """Return what one attack on so many updates takes on one device."""
    truth, seen = drawn(network, images, size)
    run, card = make_attack(attack, device=device), device.startswith("cuda")
    run(seen[: min(2, images)])  # what is set up once
    if card:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    found = run(seen)
    if card:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    errors = [
        float((f.images[0].double() - x).square().mean())
        for f, x in zip(found, truth.double(), strict=True)
    ]
    psnr = sorted(min(160.0, -10 * math.log10(max(e, 1e-16))) for e in errors)
    row = {
        "network": network[0], "attack": attack, "device": device, "images": images,
        "s": seconds, "images/s": images / seconds, "dB": psnr[len(psnr) // 2],
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if card else 0.0,
    }  # fmt: skip
    if images == 1:
        with Counter() as counter:
            run(seen)
        row |= {"launches": counter.launches, "waits": counter.waits}
    return {**row, **{k: row.get(k, "") for k in ("launches", "waits")}}


def rows(
    device: str, seconds: float, size: int = 32, cases: Sequence[tuple[str, str, int]] = CASES
) -> Iterator[dict[str, Any]]:
    """Yield a row for every case that fits into the time; one image on the CPU as well."""
    end, took = time.monotonic() + seconds, {}
    made = {n: fedleak.build_model(n, (3, size, size), 10, 0) for n, _, _ in cases}
    for network, attack, images in cases:
        for where in [device] + (["cpu"] if images == 1 and device != "cpu" else []):
            key = (network, attack, where)
            expected = _LONGER * took.get(key, 0.0)
            if time.monotonic() + expected > end:
                continue
            begin = time.monotonic()
            try:
                yield measure((network, made[network]), attack, images, where, size)
            except (FedleakError, torch.OutOfMemoryError) as error:
                yield {
                    "network": network, "attack": attack, "device": where, "images": images,
                    "failed": str(error)[:200],
                }  # fmt: skip
            took[key] = time.monotonic() - begin


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases, and write them as they come."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="Small images, few of them")
    options = parser.parse_args(argv)
    options.threads = torch.get_num_threads()
    cases, size = CASES, 32
    if options.dry_run:
        cases, size = [("cnn2-v2", "linear", 1), ("cnn2-v2", "hybrid", 2)], 12
    done = []
    for row in rows(options.device, options.seconds, size, cases):
        done.append(row)
        print(row, flush=True)
        report(done, options, NOTES, quiet=True)


if __name__ == "__main__":
    main()
