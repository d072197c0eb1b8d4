"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from fedleak.commands.app import app, main
from simulations.tables import SHIPPED

ROOT = Path(__file__).parents[2]


def fedleak(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "fedleak", *arguments],
        capture_output=True, text=True, cwd=cwd, env=environment, timeout=250, check=False,
    )  # fmt: skip


def test_a_small_run(tmp_path: Path) -> None:
    done = fedleak(
        "simulate", "demo", "--set", "federation.clients=4", "--set", "federation.rounds=2",
        "--seed", "5", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "simulated" in done.stdout
    for word in ("none", "noise-0.3", "prune-0.9", "results/runs/demo", "leakage_vs_rounds.png",
                 "fedleak report results/runs/demo"):  # fmt: skip
        assert word in done.stdout
    assert "…" not in done.stdout  # nothing is cut off at 80 columns
    assert "INFO" not in done.stderr  # Flower is quiet
    assert (tmp_path / "results" / "runs" / "demo" / "none" / "leakage.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "federation.round=3"], "did you mean 'rounds'"),
        (["--set", "model.name=cnn2v1"], "did you mean 'cnn2-v1'"),
        (["--set", "data.name=CIFAR10", "--set", "data.root=nowhere"], "Three ways out"),
        (["--set", "attack.name=linaer"], "did you mean 'linear'"),
        (["--set", "defence=prune:7"], "strength 7.0 is not in"),
        (["--set", "federation.fraction=2"], "federation.fraction = 2"),
        (["--set", "federation.clients=9999"], "9999 images"),
        (["--engine", "rya"], "did you mean 'ray'"),
        (["nowhere.toml"], "there is no scenario"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    errors = refused(["simulate", *arguments], monkeypatch, capsys)
    assert words in errors
    assert errors.startswith("fedleak: ")
    assert errors.count("\n") == 1
    assert not (tmp_path / "results").exists()


def refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run the command line in this process; return its message after exit code 2."""
    monkeypatch.setattr(sys, "argv", ["fedleak", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_bad_input_has_no_traceback(tmp_path: Path) -> None:
    done = fedleak("simulate", "--set", "federation.round=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'rounds'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_folder_and_a_wrong_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    errors = refused(["simulate", "--out", str(tmp_path / "out")], monkeypatch, capsys)
    assert "is not empty" in errors
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"no checkpoint")
    arguments = ["simulate", "--set", f"model.weights={weights}", "--out", str(tmp_path / "new")]
    assert "cannot be read as a state dict" in refused(arguments, monkeypatch, capsys)
    assert not (tmp_path / "new").exists()


def test_help_says_what_there_is() -> None:
    done = fedleak("simulate", "--help")
    assert done.returncode == 0
    for option in ("--set", "--engine", "--out", "--seed", "--overwrite"):
        assert option in done.stdout


def run_small(options: list[str], out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    words = ["simulate", "--set", "federation.clients=2", "--set", "federation.rounds=2", *more]
    monkeypatch.setattr(sys, "argv", ["fedleak", *options, *words, "--out", str(out)])
    main()


def test_events_are_what_the_tables_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_small(["--log-json"], tmp_path / "run", monkeypatch, "--set", "defence=noise:0.1")
    shown = capsys.readouterr()
    events = [json.loads(line) for line in shown.err.splitlines()]
    # A loop that takes long tells its steps as well, once a second: the clock decides how many.
    lasting = [e["event"] for e in events if e["event"] != "step"]
    assert lasting == ["start", "progress", "round", "round", "end"]
    assert "noise-0.1" in shown.out  # results stay where they were
    leakage, rounds = (pd.read_csv(tmp_path / "run" / f"{n}.csv") for n in ("leakage", "rounds"))
    told = pd.DataFrame([e for e in events if e["event"] == "round"])
    assert list(told["round"]) == [1, 2]
    assert list(told["accuracy"]) == pytest.approx(list(rounds["accuracy"]), abs=1e-5)
    of_round = leakage.groupby("round")
    assert list(told["psnr_db_median"]) == pytest.approx(list(of_round["psnr_db"].median()))
    assert list(told["psnr_db_best"]) == pytest.approx(list(of_round["psnr_db"].max()))
    assert list(told["ssim_median"]) == pytest.approx(list(of_round["ssim"].median()))
    wanted = of_round["predicted_psnr_db"].median()
    assert list(told["predicted_psnr_db"]) == pytest.approx(list(wanted), abs=1e-5)
    assert set(told["images"]) == {2}


def test_a_line_for_each_arm_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_small([], tmp_path / "a", monkeypatch)
    assert "fedleak: defence none: 2/2 rounds, median " in capsys.readouterr().err
    run_small(["--quiet"], tmp_path / "b", monkeypatch)
    assert capsys.readouterr().err == ""


def test_a_stopped_run_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simulations.engines.simulate", stop)
    with pytest.raises(SystemExit) as caught:
        run_small([], tmp_path / "run", monkeypatch)
    assert caught.value.code == 130
    assert "fedleak: stopped; finished rounds are kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "command"),
    [
        ("fedleak.models.build_model", ["audit", "--model", "cnn2-v2"]),
        ("fedleak.laboratory.read_images", ["reconstruct", "--model", "m", "--images", "."]),
        ("fedleak.results.runs.read_runs", ["compare", "a", "b"]),
        ("fedleak.report.page.write_report", ["report", "a"]),
    ],
)
def test_any_command_ends_with_a_message_when_stopped(
    where: str,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, stop)
    monkeypatch.setattr("sys.argv", ["fedleak", *command])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "fedleak: stopped; the same command begins again\n"


def test_an_unknown_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["simulate", "--log-to", "tensorbord", "--out", str(tmp_path / "run")]
    assert "did you mean 'tensorboard'" in refused(arguments, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@pytest.mark.ray
@pytest.mark.slow
def test_flwr_run(tmp_path: Path) -> None:
    """``flwr run .`` with overrides, in its own home, on its own ports."""
    flwr = shutil.which("flwr", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert flwr is not None
    http, control = _free_ports(2)
    environment = {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    out = tmp_path / "out"
    command = [
        flwr, "run", ".", "--stream",
        "--run-config",
        f"out='{out}' capture=true federation.rounds=2 defence.name='noise' defence.strength=0.1",
        "--federation-config", "num-supernodes=10 client-resources-num-cpus=1",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250,
            check=False,
        )  # fmt: skip
        listed = subprocess.run(
            [flwr, "list", "--format", "json"], cwd=ROOT, env=environment,
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    finally:
        _stop_superlink(control)
    runs = json.loads(listed.stdout)["runs"]
    assert [r["status"] for r in runs] == ["finished:completed"], done.stdout + done.stderr
    rows = (out / "leakage.csv").read_text().splitlines()
    assert len(rows) == 21
    assert all(",noise,0.1," in row for row in rows[1:])
    assert json.loads((out / "run.json").read_text())["engine"] == "flwr run"
    assert (out / "leakage_vs_rounds.png").is_file()
    assert len(list((out / "captures").glob("round-*/client-*.json"))) == 20


def _stop_superlink(port: int) -> None:
    """End the SuperLink that listens on our port, and no other."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            environment = (folder / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "flower-superlink" in command and f"FLWR_LOCAL_CONTROL_API_PORT={port}" in environment:
            os.kill(int(folder.name), 15)


def test_help_names_every_shipped_scenario() -> None:
    shown = CliRunner().invoke(app, ["simulate", "--help"], env={"COLUMNS": "200"}).output
    assert all(path.stem in shown for path in SHIPPED.glob("*.toml"))
