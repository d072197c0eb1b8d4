"""What the benchmarks share. They print ratios: a machine's seconds are its own."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fedleak  # before torch: it sets how torch's threads wait

import torch  # isort: skip
import torch.nn.functional as F
from torch import nn

from fedleak.models import PAPER_NETWORKS
from fedleak.observation import Observation
from fedleak.paper.photographs import photographs

Network = tuple[str, nn.Module]


def networks(names: Sequence[str] = ()) -> list[Network]:
    """Return the paper's networks by name, with the weights of seed 0; all by default."""
    return [(n, fedleak.build_model(n, (3, 32, 32), 10, 0)) for n in names or PAPER_NETWORKS]


def observe(model: nn.Module, size: int = 32, label: int = 3) -> Observation:
    """Return the float32 gradient of the first shipped photograph, as a client sends it."""
    image = photographs(1, size)[1]
    loss = F.cross_entropy(model(image), torch.tensor([label]))
    keys, parameters = zip(*model.named_parameters(), strict=True)
    gradient = dict(zip(keys, torch.autograd.grad(loss, parameters), strict=True))
    return Observation.from_gradient(model, gradient, (3, size, size))


def seconds(work: Callable[[], object]) -> float:
    """Return how long ``work`` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def median(times: Sequence[float]) -> float:
    """Return the median: one disturbed repeat must not decide."""
    return statistics.median(times)


def peak_memory() -> int:
    """Return the greatest resident memory of this process so far, in bytes."""
    # Linux hands ``ru_maxrss`` down from the process that started this one; VmHWM is its own.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def parser_of(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """Return the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", action="append", choices=list(PAPER_NETWORKS), default=[])
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch, on both sides")
    parser.add_argument("--json", type=Path, help="Write the figures to this file, too")
    return parser


def machine() -> dict[str, Any]:
    """Return what ran the figures: they hold for it alone."""
    info = Path("/proc/cpuinfo")
    text = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in text if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    card = torch.cuda.is_available()
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory GiB": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "card": torch.cuda.get_device_name() if card else None,
    }


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and set the number of threads."""
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    return options


def report(
    rows: Sequence[dict[str, Any]],
    options: argparse.Namespace,
    notes: str,
    extra: dict[str, Any] | None = None,
    quiet: bool = False,
) -> None:
    """Print ``rows`` as a table, and write them (and ``extra``) as JSON where asked for."""
    if not quiet:
        names = list(rows[0])
        cells = [[_cell(row[name]) for name in names] for row in rows]
        widths = [max(len(n), *(len(c[i]) for c in cells)) for i, n in enumerate(names)]
        for line in [names, *cells]:
            print("  ".join(v.rjust(w) for v, w in zip(line, widths, strict=True)))
        print(f"\n{options.threads} thread(s), torch {torch.__version__}. {notes}")
    if options.json is not None:
        stored = {
            "threads": options.threads,
            "machine": machine(),
            "notes": notes,
            "rows": list(rows),
        }
        stored |= extra or {}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(stored, indent=2) + "\n")


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
