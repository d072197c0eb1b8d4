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
from fedleak.metric import SecurityMetric
from fedleak.quality import match, score
from simulations.partition import client_images, training_data
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
METRIC = ("round", "name", "kind", "unknowns", "rank", "deficiency", "weight", "exact")
_PACKAGES = ("fedleak", "flwr", "ray", "torch", "torchvision", "numpy", "pandas")
#: What a run writes; ``overwrite`` removes these and nothing else.
OUTPUTS = (
    "leakage.csv", "rounds.csv", "metric.csv", "run.json", "leakage_vs_rounds.png",
    "reconstructions.png", "reconstructions",
)  # fmt: skip


def prepare_folder(out: Path, overwrite: bool = False) -> None:
    """Make an empty output folder.

    Raises
    ------
    InvalidInputError
        If it holds anything and ``overwrite`` is not set, or is no folder.
    """
    try:
        if out.is_dir() and any(out.iterdir()):
            _clear(out, overwrite)
        out.mkdir(parents=True, exist_ok=True)
        probe = out / "run.json.new"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InvalidInputError(
            f"output folder {str(out)!r} cannot be used ({error}); choose another with --out"
        ) from error


def _clear(out: Path, overwrite: bool) -> None:
    if not overwrite:
        raise InvalidInputError(
            f"output folder {str(out)!r} is not empty; choose another with --out, or replace "
            "the earlier run with --overwrite"
        )
    try:
        about = json.loads((out / "run.json").read_text(encoding="utf-8"))
        arms = [str(a) for a in about["arms"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"output folder {str(out)!r} holds no earlier run (no run.json of fedleak), so "
            "--overwrite leaves it alone; choose another with --out"
        ) from error
    for folder in [out, *(out / Path(arm).name for arm in arms)]:
        for name in OUTPUTS:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def about_run(scenario: Scenario, engine: str) -> dict[str, Any]:
    """Return what ``run.json`` says of a run that starts now."""
    return {
        "status": "running",
        "reason": "",
        "simulated": True,
        "engine": engine,
        "started": _now(),
        "finished": None,
        "seed": scenario.seed,
        "arms": [d.spec.label for d in scenario.arms()] if scenario.compare else [],
        "scenario": scenario.model_dump(mode="json"),
        "versions": _versions(),
        "commit": _commit(),
    }


def write_about(out: Path, about: Mapping[str, Any]) -> None:
    """Write ``run.json``: beside and moved, so that a kill leaves the old or the new one."""
    fresh = out / "run.json.new"
    fresh.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    fresh.replace(out / "run.json")


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
        self._about = about_run(scenario, engine)
        out.mkdir(parents=True, exist_ok=True)
        write_about(self.out, self._about)
        tables = {"leakage.csv": LEAKAGE, "rounds.csv": ROUNDS, "metric.csv": METRIC}
        for name, columns in tables.items():
            self._append(name, columns)

    def _append(self, name: str, row: Any) -> None:
        with (self.out / name).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)

    def labels_of(self, server_round: int, node: int) -> list[int]:
        """Return a client's labels, for a server whose threat model grants them."""
        used = client_images(self.scenario, self.partitions[node], server_round)
        return training_data(self.scenario).batch(used)[1].tolist()

    def leak(self, leak: Leak) -> None:
        """Score a leak against the images that its clients used, and write a row for each."""
        self._attack_seconds += leak.seconds
        clients = [self.partitions.get(node, node) for node in leak.nodes]
        try:
            rows = self._score(leak, clients)
        except Exception as error:  # an image that cannot be read, a client that is not ours
            reason = f"{leak.reason or 'not scored'}: {type(error).__name__}: {error}"
            rows = [(c, "", "", "", "", "", "", "failed", reason) for c in clients]
        scenario, defence = self.scenario, self.scenario.defence
        for client, image, psnr, ssim, mse, true, inferred, status, reason in rows:
            self._append(
                "leakage.csv",
                (
                    leak.server_round, client, image, scenario.attack.name, defence.name,
                    defence.strength, psnr, ssim, mse, true, inferred, f"{leak.seconds:.4f}",
                    status, reason,
                ),
            )  # fmt: skip

    def _score(self, leak: Leak, clients: list[int]) -> list[tuple[Any, ...]]:
        """Return (client, image, psnr_db, ssim, mse, label_true, label_inferred, status, reason).

        The images of a batch, or of all clients in a sum, come back in any order.
        """
        used = [
            (client, i)
            for client in clients
            for i in client_images(self.scenario, client, leak.server_round)
        ]
        truth, labels = training_data(self.scenario).batch([i for _, i in used])
        made, pairs = leak.reconstruction, {}
        if made is not None:
            pairs = {true: found for found, true in match(made.images, truth)}
        rows: list[tuple[Any, ...]] = []
        for place, (client, image) in enumerate(used):
            label = int(labels[place])
            if made is None or place not in pairs:
                reason = leak.reason or "not reconstructed"
                rows.append((client, image, "", "", "", label, "", "failed", reason))
                continue
            found = made.images[pairs[place]]
            quality = score(found, truth[place])
            inferred = int(made.labels[pairs[place]])
            scores = (quality.psnr_db, quality.ssim, quality.mse)
            rows.append((client, image, *scores, label, inferred, "ok", ""))
            self.psnr.append(quality.psnr_db)
            picture = (truth[place].numpy(), found.float().numpy(), quality.psnr_db)
            self._pictures.append((client, image, *picture))
        return rows

    def round(
        self, number: int, row: Mapping[str, Any], metric: SecurityMetric | None = None
    ) -> None:
        """Write one round's row, the metric of each layer, and the reconstructions."""
        for layer in metric.layers if metric else ():
            self._append("metric.csv", [number, *(getattr(layer, c) for c in METRIC[1:])])
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

    def finish(self, error: BaseException | None = None) -> None:
        """Note that the run finished, or which error ended it."""
        self._about |= ended(error)
        write_about(self.out, self._about)


def ended(error: BaseException | None = None) -> dict[str, Any]:
    """Return what ``run.json`` says of the end of a run: finished, or ended by ``error``."""
    status, reason = "finished", ""
    if isinstance(error, KeyboardInterrupt):
        status, reason = "interrupted", "stopped by the user"
    elif error is not None:
        status, reason = "failed", f"{type(error).__name__}: {error}"
    return {"status": status, "reason": reason, "finished": _now()}


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
