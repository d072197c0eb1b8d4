"""Sweeps over defences: grid, cells, table, resuming, and the same on every engine."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from typer.testing import CliRunner

from fedleak.commands.app import app
from fedleak.defences import parse_defence
from fedleak.errors import FedleakError, InvalidInputError
from fedleak.lock import only_writer
from fedleak.results.format import EVALUATION
from fedleak.threads import threads
from fedleak.workers import _call
from simulations.engines import simulate
from simulations.evaluation import cell as cell_module
from simulations.evaluation.run import evaluate
from simulations.evaluation.sweep import SHIPPED, Sweep, load_sweep
from simulations.traffic import Traffic, entry_bits

SMALL = {"federation": {"clients": 3, "rounds": 3}, "attack": {"every": 3},
         "data": {"max_test_images": 50}}  # fmt: skip


def _sweep(**values: Any) -> Sweep:
    return Sweep(**{"set": SMALL, "defences": ("none",), **values})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """Return the folder and the table of a small sweep."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    sweep = _sweep(
        defences=("none", "noise:0", "dp:clip=1,noise=1"), strengths={"prune": [0.9]}, seeds=(0, 1)
    )
    found = evaluate(sweep, out)
    assert found.skipped == 0
    return out, found.table


def test_a_row_for_each_cell_and_seed(done: tuple[Path, pd.DataFrame]) -> None:
    out, table = done
    assert tuple(table.columns) == EVALUATION.columns
    assert (table["status"] == "ok").all()
    assert table["defence"].tolist() == ["none"] * 2 + ["noise"] * 2 + ["dp"] * 2 + ["prune"] * 2
    assert table["seed"].tolist() == [0, 1] * 4
    assert (table["images"] == 6).all()
    pruned = table[table["defence"] == "prune"]
    assert (pruned["psnr_db_median_informed"] > pruned["psnr_db_median_unaware"] + 2).all()
    assert (table["psnr_db_worst_informed"] >= table["psnr_db_median_informed"]).all()
    assert table["identified_informed"].between(0, 1).all()
    assert table.loc[table["defence"] == "none", "identified_unaware"].eq(1).all()
    assert table["epsilon"].notna().tolist() == (table["defence"] == "dp").tolist()
    assert (pruned["bytes_sent"] < 400).all()
    assert (table["cramer_rao_db"] >= table["predicted_psnr_db"] - 0.5).all()
    for name in ("frontier", "leakage_vs_rounds", "predicted_vs_attained", "pictures"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    rounds = pd.read_csv(out / "rounds.csv")
    assert rounds["round"].tolist() == [1, 3] * 8
    about = json.loads((out / "sweep.json").read_text())
    (run,) = out.glob("cells/none_seed-0_*/unaware/run.json")
    ran = json.loads(run.read_text())
    assert {k: about[k] for k in ("versions", "commit")} == {
        k: ran[k] for k in ("versions", "commit")
    }


def test_strength_zero_is_no_defence_bit_for_bit(done: tuple[Path, pd.DataFrame]) -> None:
    _, table = done
    none, zero = (table[table["defence"] == d].reset_index() for d in ("none", "noise"))
    numbers = [
        c for c in EVALUATION.columns if c not in ("defence", "strength", "seconds", "reason")
    ]
    pd.testing.assert_frame_equal(none[numbers], zero[numbers])


def test_undefended_equals_simulate(done: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    out, table = done
    (described,) = [s for s in _sweep().grid() if s.seed == 0]
    with threads(1):  # two threads round differently
        simulate(described, tmp_path)
    (folder,) = (out / "cells").glob("none_seed-0_*")
    for name in ("leakage.csv", "rounds.csv"):
        here = pd.read_csv(folder / "unaware" / name)
        there = pd.read_csv(tmp_path / name)
        columns = [c for c in here if not c.startswith("seconds")]
        pd.testing.assert_frame_equal(here[columns], there[columns])
    leakage, rounds = (pd.read_csv(tmp_path / n) for n in ("leakage.csv", "rounds.csv"))
    assert table["accuracy"][0] == rounds["accuracy"].iloc[-1]
    assert table["psnr_db_median_informed"][0] == pytest.approx(leakage["psnr_db"].median())


def test_both_attackers_see_one_training(done: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    out, _ = done
    described = _sweep(defences=("prune:0.9",)).grid()[0]
    known = described.threat.model_copy(update={"defence": True})
    with threads(1):
        simulate(described.model_copy(update={"threat": known}), tmp_path)
    (folder,) = (out / "cells").glob("prune-0.9_seed-0_*")
    alone = pd.read_csv(tmp_path / "leakage.csv").drop(columns=["seconds", "predicted_psnr_db"])
    beside = pd.read_csv(folder / "informed" / "leakage.csv")
    pd.testing.assert_frame_equal(alone, beside.drop(columns=["seconds", "predicted_psnr_db"]))


def test_goes_on_where_it_stopped(
    done: tuple[Path, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = done
    again = tmp_path / "out"
    shutil.copytree(out, again)
    (lost,) = (again / "cells").glob("none_seed-1_*")
    (lost / "cell.json").unlink()  # as if it had been interrupted
    (again / "cells" / "none_seed-1_x.abc.part").mkdir()
    ran = []
    real = cell_module.run_cell

    def count(where: str, cell: Any) -> Any:
        ran.append(cell.key)
        return real(where, cell)

    monkeypatch.setattr("simulations.evaluation.run.run_cell", count)
    found = evaluate(_sweep(seeds=(0, 1)), again)
    assert found.skipped == 1
    assert ran == [lost.name]
    assert not list((again / "cells").glob("*.part"))
    assert len(list((again / "cells").iterdir())) == 8  # those of the other sweep are kept
    stricter = evaluate(_sweep(seeds=(0, 1), threshold_db=200.0), again)
    assert stricter.skipped == 2  # another threshold needs no other run
    assert (stricter.table["identified_informed"] == 0).all()


@pytest.mark.parametrize("left", [0, 0.5])
def test_a_cell_whose_table_was_lost_is_run_again(
    done: tuple[Path, pd.DataFrame], tmp_path: Path, left: float
) -> None:
    """As a power cut may leave it: the cell's own file is there, its table empty or torn."""
    again = tmp_path / "out"
    shutil.copytree(done[0], again)
    (cell,) = (again / "cells").glob("none_seed-1_*")
    table = cell / "unaware" / "rounds.csv"
    whole = table.read_bytes()
    table.write_bytes(whole[: int(left * len(whole))])
    found = evaluate(_sweep(seeds=(0, 1)), again)
    assert found.skipped == 1
    assert (found.table["status"] == "ok").all()
    restored, before = (pd.read_csv(f) for f in (table, io.BytesIO(whole)))
    times = ["seconds_train", "seconds_attack"]
    pd.testing.assert_frame_equal(restored.drop(columns=times), before.drop(columns=times))


def test_a_failed_cell_is_a_row_and_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(cell_module, "_train_and_attack", broken)
        table = evaluate(_sweep(), tmp_path).table
    assert table["status"].tolist() == ["failed"]
    assert table["reason"].tolist() == ["MemoryError: no more"]
    assert evaluate(_sweep(), tmp_path).table["status"].tolist() == ["ok"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"defences": ()}, "nothing to do"),
        ({"strengths": {"prune": [2]}}, "strength 2.0 is not in"),
        ({"defences": ("none", "sign:scale=fixed,size=1+noise:0.1")}, "noise"),
        ({"strengths": {"prnue": [0.5]}}, "did you mean 'prune'"),
        ({"strengths": {"noise": [0.1, 0.1]}}, "listed twice"),
        ({"models": ("cnn2-v9",)}, "cnn2-v9"),
        ({"datasets": ("digit",)}, "did you mean 'digits'"),
        ({"scenario": "dmeo"}, "did you mean 'demo'"),
        ({"set": {"federation": {"round": 3}}}, "did you mean 'rounds'"),
        ({"set": {"attack": {"name": "none"}}}, "nothing would be attacked"),
        ({"defences": ("withhold:conv9",)}, "conv9"),
        ({"max_cells": 1, "seeds": (0, 1)}, "makes 2 cells, more than max_cells = 1"),
    ],
)
def test_bad_input_runs_nothing(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(FedleakError, match=words):
        evaluate(_sweep(**values), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sweep_files(tmp_path: Path) -> None:
    for path in SHIPPED.glob("*.toml"):
        sweep = load_sweep(path.stem)
        assert sweep.name == path.stem
        assert 1 < len(sweep.cells()) <= sweep.max_cells
    changed = load_sweep("noise-pruning", ["seeds=[7]", "data.max_images=300"])
    assert {c.scenario.seed for c in changed.cells()} == {7}
    assert {c.scenario.data.max_images for c in changed.cells()} == {300}
    assert {c.scenario.federation.rounds for c in changed.cells()} == {60}
    (tmp_path / "bad.toml").write_text('defences = ["none"]\nsede = [0]\n')
    with pytest.raises(InvalidInputError, match="unknown key 'sede'; did you mean 'seeds'"):
        load_sweep(tmp_path / "bad.toml")
    with pytest.raises(InvalidInputError, match="is listed twice"):
        load_sweep("noise-pruning", ["seeds=[1, 1]"])


def test_without_predictions_the_columns_are_empty(tmp_path: Path) -> None:
    small = {**SMALL, "metric": {"predict": "none"}}
    table = evaluate(_sweep(set=small), tmp_path).table
    assert table[["predicted_psnr_db", "cramer_rao_db", "epsilon"]].isna().all(axis=None)
    assert (tmp_path / "predicted_vs_attained.png").is_file()


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(InvalidInputError, match="holds no evaluation"):
        evaluate(_sweep(), tmp_path)


@pytest.mark.parametrize(
    ("defence", "bits"),
    [("none", 32), ("noise:1", 32), ("quantise:4", 4), ("sign:1", 1), ("quantise:4+noise:0.1", 32),
     ("prune:0.9+quantise:8", 8), ("quantise:0", 32)],
)  # fmt: skip
def test_bits_of_an_entry(defence: str, bits: int) -> None:
    assert entry_bits(parse_defence(defence)) == bits


def test_bytes_count_what_is_not_zero() -> None:
    import numpy as np

    (scenario,) = _sweep().grid()
    traffic = Traffic(scenario)
    full, sparse = np.ones(80, np.float32), np.zeros(80, np.float32)
    sparse[:2] = 1
    sizes = []
    for value in (full, sparse, np.zeros(80, np.float32)):
        message = _reply({"w": value})
        traffic.measure({}, [message])
        sizes.append(traffic.bytes_sent)
    assert sizes == [320, 2 * 4 + 10, 0]


def _reply(arrays: dict[str, Any]) -> Message:
    from flwr.app import Array

    class Reply:
        metadata = SimpleNamespace(src_node_id=0)
        content = RecordDict({"a": ArrayRecord({k: Array(v) for k, v in arrays.items()})})

        def has_error(self) -> bool:
            return False

    return Reply()  # type: ignore[return-value]


def _write(path: Path, seeds: int, defences: list[str]) -> Path:
    path.write_text(
        f"defences = {json.dumps(defences)}\nseeds = {list(range(seeds))}\n"
        "[set]\nfederation.clients = 3\nfederation.rounds = 3\nattack.every = 3\n"
        "data.max_test_images = 50\n"
    )
    return path


def test_the_command_line(done: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    path = _write(tmp_path / "mine.toml", 2, ["none", "prune:0.9"])
    found = CliRunner().invoke(app, ["evaluate", str(path), "--out", str(out)])
    assert found.exit_code == 0, found.output
    for word in ("mine (simulated): mean of 2 seeds", "prune-0.9", "evaluation.csv",
                 "frontier.png"):  # fmt: skip
        assert word in found.output


def _without_time(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "evaluation.csv").drop(columns="seconds")


#: ``fedleak evaluate`` in a process that kills itself: no clock decides where.
_KILLED_AFTER_THREE_CELLS = """
import os, signal, sys
from fedleak.commands.app import main
from simulations.evaluation import run

tell, told = run._tell, []

def tell_and_die(*given):
    tell(*given)
    told.append(given)
    if len(told) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

run._tell = tell_and_die
sys.argv[1:1] = ["evaluate"]
main()
"""


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_table(tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.toml", 3, ["none", "prune:0.9", "noise:0.1"])
    options = [str(path), "--jobs", "2", "--out"]
    command = [sys.executable, "-m", "fedleak", "evaluate", *options]
    script = [sys.executable, "-c", _KILLED_AFTER_THREE_CELLS, *options, str(tmp_path / "killed")]
    process = subprocess.run(script, check=False, stdout=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL
    cells = tmp_path / "killed" / "cells"
    kept = {p: p.stat().st_mtime_ns for p in cells.glob("*/cell.json") if ".part" not in str(p)}
    assert 3 <= len(kept) < 9
    for out in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / out)], check=True, stdout=subprocess.DEVNULL)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    pd.testing.assert_frame_equal(
        _without_time(tmp_path / "killed"), _without_time(tmp_path / "whole")
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_nodes_agree_with_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    sweep = _sweep(defences=("none", "noise:0.1", "clip:1", "prune:0.9"), seeds=(0, 1, 2, 3))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        found = evaluate(sweep, tmp_path / "ray", engine="ray")
    finally:
        cluster.shutdown()
    assert len(found.table) == 16
    assert (found.table["status"] == "ok").all()
    evaluate(sweep, tmp_path / "one")
    pd.testing.assert_frame_equal(_without_time(tmp_path / "ray"), _without_time(tmp_path / "one"))


def test_two_commands_in_one_folder(tmp_path: Path) -> None:
    """The second is refused, and nothing of the first is touched."""
    with only_writer(tmp_path / "out"), pytest.raises(InvalidInputError, match="another command"):
        evaluate(_sweep(), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_relative_model_file_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers take relative paths from where the command was given."""
    monkeypatch.chdir(tmp_path)
    assert _call(Path.exists, Path("net.py"), str(tmp_path)) is False
    (tmp_path / "net.py").touch()
    monkeypatch.chdir("/")
    assert _call(Path.exists, Path("net.py"), str(tmp_path)) is True


def test_cells_are_counted_before_they_are_made() -> None:
    sweep = Sweep(defences=("none", "noise:0.1"), seeds=tuple(range(100_000)))
    assert sweep.count == 200_000
    with pytest.raises(InvalidInputError, match="makes 200000 cells, more than max_cells = 60"):
        evaluate(sweep)
