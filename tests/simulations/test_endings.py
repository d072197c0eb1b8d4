"""What a run leaves when it ends badly: stopped, killed between two files, with a full disk."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedleak import files
from fedleak.errors import InvalidInputError
from fedleak.lock import only_writer
from fedleak.results.format import ROUNDS, Table
from fedleak.stopping import Terminated, terminable
from simulations import recorder
from simulations.engines import simulate
from simulations.scenario import Scenario, load_scenario


def small(rounds: int = 3) -> Scenario:
    return load_scenario(
        None,
        ["federation.clients=2", f"federation.rounds={rounds}", "data.max_test_images=20",
         "attack.name=linear", "metric.predict=none"],
    )  # fmt: skip


def about(out: Path) -> Any:
    return json.loads((out / "run.json").read_text())


def test_only_one_run_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(InvalidInputError, match="another command is at"):
        simulate(small(), tmp_path, overwrite=True)
    simulate(small(1), tmp_path)  # the lock itself is nothing that would be overwritten
    simulate(small(1), tmp_path, overwrite=True)


def test_sigterm_is_told_in_the_run(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def end(arm: Any, progress: Any) -> None:
        if progress.server_round == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated):
        simulate(small(), tmp_path, on_progress=end)
    assert (about(tmp_path)["status"], about(tmp_path)["reason"]) == (
        "interrupted", "ended by SIGTERM",
    )  # fmt: skip
    assert pd.read_csv(tmp_path / "rounds.csv")["round"].tolist() == [1, 2]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_of_ones_own_is_kept() -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [True]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_round_that_has_its_row_has_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the pictures of the second round are written."""
    real = files.write_atomically

    def killed(path: Path, *content: Any, **options: Any) -> None:
        if path.name == "round-0002.npz":
            raise KeyboardInterrupt
        real(path, *content, **options)

    monkeypatch.setattr(files, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        simulate(small(), tmp_path)
    assert pd.read_csv(tmp_path / "rounds.csv")["round"].tolist() == [1]
    with np.load(tmp_path / "reconstructions" / "round-0001.npz") as stored:
        assert len(stored["truth"]) == 2


def test_what_a_finished_round_wrote_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flushed before the row that says so, which is flushed too."""
    order: list[str] = []
    real_flush, real_append = recorder.flush, Table.append

    def flush(path: Path) -> None:
        order.append(f"flush {path.name}")
        real_flush(path)

    def append(self: Table, folder: Path, row: Any) -> None:
        order.append(self.file)
        real_append(self, folder, row)

    monkeypatch.setattr(recorder, "flush", flush)
    monkeypatch.setattr(Table, "append", append)
    simulate(small(1), tmp_path)
    row = len(order) - 1 - order[::-1].index("rounds.csv")
    last = max(i for i, name in enumerate(order) if name in ("leakage.csv", "metric.csv"))
    assert last < order.index("flush leakage.csv") < row < order.index("flush rounds.csv")
    assert last < order.index("flush metric.csv") < row


def test_a_full_disk_is_a_message_and_finished_rounds_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = False
    real, real_writer = files.write_atomically, csv.writer

    class Writer:
        def __init__(self, file: Any):
            self.real = real_writer(file)

        def writerow(self, row: Any) -> None:
            nonlocal full
            full = full or (row[0] == 2 and len(row) == len(ROUNDS.columns))
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.real.writerow(row)

    def write(path: Path, *content: Any, **options: Any) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *content, **options)

    monkeypatch.setattr(csv, "writer", Writer)
    for module in (files, recorder):
        monkeypatch.setattr(module, "write_atomically", write)
    with pytest.raises(InvalidInputError, match=r"the disk is full.*kept"):
        simulate(small(), tmp_path)
    assert about(tmp_path)["status"] == "failed"
    assert "No space left" in about(tmp_path)["reason"]
    assert pd.read_csv(tmp_path / "rounds.csv")["round"].tolist() == [1]
