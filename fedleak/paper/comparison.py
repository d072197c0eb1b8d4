"""Every attack on every network: run what is missing, then draw the table and the figure."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedleak import __version__
from fedleak.attacks.evidence import resolve_device
from fedleak.errors import FedleakError
from fedleak.files import write_atomically
from fedleak.metric import security_metric
from fedleak.models import build_model
from fedleak.paper.cells import CLASSES, AttackSpec, Images, run_cell
from fedleak.paper.figure import draw
from fedleak.paper.store import Store, digest
from fedleak.paper.tables import markdown

_IN_FIGURE = 2


def compare(
    networks: Sequence[str],
    specs: Sequence[AttackSpec],
    images: Images,
    slow_limit: int,
    out: Path,
    *,
    public: Tensor | None = None,
    seed: int = 0,
    device: str = "auto",
    command: str = "",
    overwrite: bool = False,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Run every cell that ``out`` does not have yet, then draw the table and the figure.

    Parameters
    ----------
    networks : sequence of str
        As :func:`fedleak.models.build_model` takes them.
    specs : sequence of AttackSpec
    images : Images
        All of them for the fast attacks.
    slow_limit : int
        How many of the first images the slow attacks see.
    out : Path
        ``paper.csv`` is written after every cell.
    public : Tensor, shape (P, C, H, W), optional
        Images that a learned prior may learn from.
    seed : int
        Draws the weights, and the attacks' starts.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    command : str
        Written down.
    overwrite : bool
        Start again.
    on_progress : callable, optional
        ``(finished, all, what is next)`` before every cell, and at the end.

    Raises
    ------
    InvalidInputError
        Before anything is run: an attack refuses its options, a network its images, or
        ``out`` was made with other settings.
    """
    channels, height, width = images.pixels.shape[1:]
    shape = (int(channels), int(height), int(width))
    attacks = [spec.make(device, seed, public) for spec in specs]
    models = {name: build_model(name, shape, CLASSES, seed) for name in networks}
    store = Store(out, _settings(images, slow_limit, public, seed, device),
                  _record(command), overwrite)  # fmt: skip
    cells = [(spec, run, name) for spec, run in zip(specs, attacks, strict=True) for name in models]
    for count, (spec, run, name) in enumerate(cells):
        if on_progress is not None:
            on_progress(count, len(cells), f"{spec.label} on {name}")
        part = images.first(slow_limit) if spec.slow else images
        if not store.has(name, spec.name, spec.text, part.names):
            store.add(*run_cell(name, models[name], spec, run, part, seed))
    if on_progress is not None:
        on_progress(len(cells), len(cells), "")
    table = store.table()
    metric = {name: _c_metric(model, shape) for name, model in models.items()}
    text = markdown(table, networks, specs, metric, command)
    write_atomically(out / "paper.md", text.encode())
    draw(table, out, networks, specs, images.first(_IN_FIGURE))


def _settings(
    images: Images, slow_limit: int, public: Tensor | None, seed: int, device: str
) -> dict[str, Any]:
    """Return what all cells of one folder must share."""
    return {
        "fedleak": __version__,
        "torch": torch.__version__,
        "seed": seed,
        "device": resolve_device(device).type,
        "images": images.names,
        "pixels": digest(images.pixels),
        "labels": images.labels,
        "slow_limit": slow_limit,
        "public": digest(public),
    }


def _record(command: str) -> dict[str, Any]:
    return {
        "command": command,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _c_metric(model: torch.nn.Module, shape: tuple[int, int, int]) -> int | None:
    try:
        return security_metric(model, shape).c
    except FedleakError:
        return None  # the metric does not cover every network that an attack does
