"""Run one cell: one federated training, two attackers on the same updates."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fedleak.files import flush, to_json, write_atomically
from fedleak.results.format import CELLS, DONE, INFORMED, UNAWARE
from fedleak.threads import threads
from simulations.engines import quiet_flower, run_inline
from simulations.evaluation.sweep import Cell
from simulations.scenario import Scenario

#: End of the folder's name of a cell that runs, or was interrupted.
_PART = ".part"


@dataclass(frozen=True)
class CellOutcome:
    """How a cell ended.

    Attributes
    ----------
    status : {"ok", "failed"}
    reason : str
    seconds : float
    """

    status: str
    reason: str = ""
    seconds: float = 0.0


def finished(out: Path, cell: Cell) -> CellOutcome | None:
    """Return how a cell ended that is finished; else None."""
    try:
        stored = json.loads((out / CELLS / cell.key / DONE).read_text(encoding="utf-8"))
        return CellOutcome(stored["status"], stored["reason"], float(stored["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def clear_interrupted(out: Path) -> None:
    """Remove what interrupted cells left."""
    for part in (out / CELLS).glob(f"*{_PART}"):
        shutil.rmtree(part, ignore_errors=True)


def run_cell(out: str, cell: Cell) -> CellOutcome:
    """Run a cell into ``out``; its folder appears once it is finished.

    The result is that of the cell alone, whatever the process did before.

    Returns
    -------
    CellOutcome
        Also where the run raised: one cell must not end the others.
    """
    begin = time.perf_counter()
    folder = Path(out) / CELLS / cell.key
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{cell.key}.", suffix=_PART, dir=folder.parent))
    try:
        _train_and_attack(cell.scenario, part)
        outcome = CellOutcome("ok", "", round(time.perf_counter() - begin, 3))
        write_atomically(part / DONE, to_json(vars(outcome)), durable=True)
        shutil.rmtree(folder, ignore_errors=True)  # one that has lost its DONE
        os.replace(part, folder)
        flush(folder.parent)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        return CellOutcome("failed", " ".join(f"{type(error).__name__}: {error}".split()))
    return outcome


def _train_and_attack(scenario: Scenario, folder: Path) -> None:
    import torch

    from simulations.client_app import build_client_app
    from simulations.recorder import Recorder
    from simulations.server_app import build_server_app

    quiet_flower()
    recorders = [Recorder(folder / UNAWARE, scenario, "inline")]
    if scenario.defence.spec.parts or scenario.strategy.clients_clip:
        threat = scenario.threat.model_copy(update={"defence": True})
        knowing = scenario.model_copy(update={"threat": threat})
        recorders.append(Recorder(folder / INFORMED, knowing, "inline"))
    server = build_server_app(scenario, recorders[0], informed=(*recorders, None)[1])
    client = build_client_app(lambda context: scenario)
    # A sum in several threads rounds differently: one number makes one table everywhere.
    with threads(scenario.training.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(scenario.seed)
        run_inline(server, client, scenario.federation.clients)
    for recorder in recorders:
        recorder.finish()
