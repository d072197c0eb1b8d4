"""Everything a run leaves behind, written as it happens.

The recorder owns the truth: it alone knows which images a client used, and scores what
the attack made of them. Nothing flows back from here to the attack.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fedleak.errors import InvalidInputError
from fedleak.quality import match, score
from simulations.partition import client_batches, training_data
from simulations.scenario import Scenario
from strategies import Leak

LEAKAGE = (
    "round", "client", "image", "attack", "defence", "strength", "psnr_db", "ssim", "mse",
    "label_true", "label_inferred", "seconds", "status", "reason",
)  # fmt: skip
ROUNDS = (
    "round", "accuracy", "loss", "c_metric", "clients", "failures", "seconds_train",
    "seconds_attack",
)  # fmt: skip
_PACKAGES = ("fedleak", "flwr", "ray", "torch", "torchvision", "numpy", "pandas")
#: What a run writes; ``overwrite`` removes these and nothing else.
OUTPUTS = (
    "leakage.csv", "rounds.csv", "run.json", "leakage_vs_rounds.png", "reconstructions.png",
    "reconstructions",
)  # fmt: skip


def prepare_folder(out: Path, overwrite: bool = False) -> None:
    """Make an empty output folder.

    Raises
    ------
    InvalidInputError
        If it holds anything and ``overwrite`` is not set, or is no folder.
    """
    if out.exists() and not out.is_dir():
        raise InvalidInputError(f"output folder {str(out)!r} is a file; choose another with --out")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InvalidInputError(
                f"output folder {str(out)!r} is not empty; choose another with --out, or replace "
                "the earlier run with --overwrite"
            )
        for folder in [out, *(p.parent for p in out.glob("*/run.json"))]:
            for name in OUTPUTS:
                path = folder / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


class Recorder:
    """Writes one run's tables and reconstructions.

    Parameters
    ----------
    out : Path
        An empty folder.
    scenario : Scenario
    engine : str
        Named in ``run.json``.
    """

    def __init__(self, out: Path, scenario: Scenario, engine: str):
        self.out, self.scenario = out, scenario
        self.partitions: Mapping[int, int] = {}
        self.psnr: list[float] = []
        self._attack_seconds = 0.0
        self._pictures: list[tuple[int, int, np.ndarray, np.ndarray, float]] = []
        self._about: dict[str, Any] = {
            "status": "running",
            "reason": "",
            "simulated": True,
            "engine": engine,
            "started": _now(),
            "finished": None,
            "seed": scenario.seed,
            "scenario": scenario.model_dump(mode="json"),
            "versions": _versions(),
            "commit": _commit(),
        }
        out.mkdir(parents=True, exist_ok=True)
        self._write_about()
        for name, columns in (("leakage.csv", LEAKAGE), ("rounds.csv", ROUNDS)):
            self._append(name, columns)

    def _append(self, name: str, row: Any) -> None:
        with (self.out / name).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)

    def _write_about(self) -> None:
        # Written beside and moved, so that a kill leaves the old file or the new one.
        fresh = self.out / "run.json.new"
        fresh.write_text(json.dumps(self._about, indent=2) + "\n", encoding="utf-8")
        fresh.replace(self.out / "run.json")

    def leak(self, leak: Leak) -> None:
        """Score one client's leak against the images it used, and write a row for each."""
        scenario = self.scenario
        client = self.partitions.get(leak.node_id, leak.node_id)
        self._attack_seconds += leak.seconds
        images = training_data(scenario)
        used = [i for b in client_batches(scenario, client, leak.server_round) for i in b]
        truth, labels = images.batch(used)
        pairs = {}
        if leak.reconstruction is not None:
            found = match(leak.reconstruction.images, truth)
            pairs = {true: made for made, true in found}
        for place, image in enumerate(used):
            scores: tuple[Any, ...] = ("", "", "")
            inferred: Any = ""
            status, reason = "failed", leak.reason or "not reconstructed"
            if leak.reconstruction is not None and place in pairs:
                made = leak.reconstruction.images[pairs[place]]
                quality = score(made, truth[place])
                scores = (quality.psnr_db, quality.ssim, quality.mse)
                inferred = int(leak.reconstruction.labels[pairs[place]])
                status, reason = "ok", ""
                self.psnr.append(quality.psnr_db)
                self._pictures.append(
                    (client, image, truth[place].numpy(), made.float().numpy(), quality.psnr_db)
                )
            defence = scenario.defence
            self._append(
                "leakage.csv",
                (
                    leak.server_round, client, image, scenario.attack.name, defence.name,
                    defence.strength, *scores, int(labels[place]), inferred,
                    f"{leak.seconds:.4f}", status, reason,
                ),
            )  # fmt: skip

    def round(self, number: int, row: Mapping[str, Any]) -> None:
        """Write one round's row, and its reconstructions."""
        values = {**row, "round": number, "seconds_attack": f"{self._attack_seconds:.4f}"}
        self._append("rounds.csv", [_plain(values[c]) for c in ROUNDS])
        self._attack_seconds = 0.0
        if self._pictures:
            folder = self.out / "reconstructions"
            folder.mkdir(exist_ok=True)
            clients, ids, truth, made, psnr = zip(*self._pictures, strict=True)
            np.savez_compressed(
                folder / f"round-{number:04d}.npz",
                client=np.array(clients),
                image=np.array(ids),
                truth=np.stack(truth),
                reconstruction=np.stack(made),
                psnr_db=np.array(psnr),
            )
            self._pictures = []

    def finish(self, status: str, reason: str = "") -> None:
        """Note how the run ended: ``finished``, ``failed`` or ``interrupted``."""
        self._about |= {"status": status, "reason": reason, "finished": _now()}
        self._write_about()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else round(value, 6)
    return value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str | None:
    """Return the commit of the code that runs, with ``-dirty`` if files were changed."""
    where = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=where, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
