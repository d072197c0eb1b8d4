"""Capture in a federation, attack without Flower: the documented recipe, and simulations."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedleak.capture import CaptureWriter, read_captures
from fedleak.capture.run import attack_capture
from fedleak.errors import InvalidInputError
from simulations.engines import simulate
from simulations.grid import InlineGrid
from simulations.scenario import load_scenario
from strategies import MaliciousServer

ROOT = Path(__file__).parents[2]
SMALL = ["federation.clients=4", "federation.rounds=2", "data.max_test_images=50"]
COMPARED = ["round", "client", "image", "psnr_db", "ssim", "mse", "label_true", "label_inferred",
            "status"]  # fmt: skip

#: Run before anything else: what the machine that attacks does not have.
BLOCKED = """
import sys
for name in ("flwr", "ray", "flwr_datasets", "datasets", "sklearn"):
    sys.modules[name] = None
"""


def recipe(language: str) -> list[str]:
    """Return the blocks of docs/capture.md."""
    text = (ROOT / "docs" / "capture.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def strangers_client() -> ClientApp:
    """Return an app that shares nothing with fedleak: one image, one step of SGD."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from net import make  # type: ignore[import-not-found]

        client = int(context.node_config["partition-id"])
        model: nn.Module = make()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(client))
        F.cross_entropy(model(x), torch.tensor([client])).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]

    return app


@pytest.mark.slow
def test_the_documented_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's app captures; a machine without Flower and Ray attacks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    network, server, library = recipe("python")
    assert len(server.strip().splitlines()) == 10
    (tmp_path / "net.py").write_text(network)
    make = importlib.import_module("net").make
    torch.manual_seed(0)
    grid: Grid = InlineGrid(strangers_client(), 3)
    arrays = ArrayRecord(make().state_dict())
    exec(server, {"FedAvg": FedAvg, "make": make, "grid": grid, "arrays": arrays})
    monkeypatch.delitem(sys.modules, "net")
    assert len(list(Path("captures").glob("round-*/client-*.json"))) == 6

    # It travels without what the training machine has.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("captures", "net.py"):
        Path(name).rename(elsewhere / name)
    (elsewhere / "sitecustomize.py").write_text(BLOCKED)
    line = next(x for x in recipe("sh")[0].splitlines() if "fedleak attack" in x)
    arguments = line.partition("fedleak ")[2].replace("cuda", "cpu").split()
    environment = {**os.environ, "PYTHONPATH": f"{elsewhere}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "fedleak", *arguments, "--json"],
        cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["images"], found["failed"]) == (6, 0)
    assert found["fit_median"] < 1e-3
    assert sorted(r["label_inferred"] for r in found["rows"]) == [0, 0, 1, 1, 2, 2]
    assert len(list(Path(found["out"]).glob("pictures/*/*.png"))) == 6
    monkeypatch.chdir(elsewhere)
    exec(library, {})


def test_what_a_simulation_captures_gives_its_table_again(tmp_path: Path) -> None:
    described = load_scenario("fedavg", [*SMALL, "attack.name=linear"])
    simulate(described, tmp_path / "run", capture=True)
    live = pd.read_csv(tmp_path / "run" / "leakage.csv")
    threads = torch.get_num_threads()
    found = attack_capture(tmp_path / "run" / "captures", "linear", threads=threads).table
    for column in COMPARED:
        assert found[column].tolist() == live[column].tolist()


@pytest.mark.parametrize(
    "options",
    [
        ["threat.view=sum", "attack.options.steps=10"],
        ["threat.labels=true", "defence=noise:0.1", "attack.options.steps=10"],
        ["federation.fraction=0.5", "attack.clients=1", "attack.every=2", "attack.name=linear"],
    ],
    ids=lambda o: o[0],
)
def test_also_under_another_threat_model(tmp_path: Path, options: list[str]) -> None:
    described = load_scenario(None, [*SMALL, *options])
    simulate(described, tmp_path, capture=True)
    live = pd.read_csv(tmp_path / "leakage.csv")
    found = attack_capture(
        tmp_path / "captures", described.attack.name, described.attack.options,
        threads=torch.get_num_threads(),
    ).table  # fmt: skip
    for column in COMPARED:
        assert found[column].tolist() == live[column].tolist()


def test_capture_only_and_each_arm_its_own(tmp_path: Path) -> None:
    described = load_scenario("demo", [*SMALL, "attack.name=none"])
    arms = simulate(described, tmp_path, capture=True)
    for arm in arms:
        assert len(pd.read_csv(arm.out / "leakage.csv")) == 0
        assert len([c for c in read_captures(arm.out / "captures") if c.observation]) == 8
    assert len(pd.read_csv(tmp_path / "rounds.csv")) == 6

    with pytest.raises(InvalidInputError, match="nothing would be attacked or kept"):
        simulate(described, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    one = tmp_path / "one"
    for _ in range(2):  # an earlier run is replaced with its captures
        simulate(described.arm(described.defence), one, overwrite=True, capture=True)


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    described = load_scenario("fedavg", SMALL)
    frames = []
    for name, capture, attack in (
        ("a", False, "linear"),
        ("b", True, "linear"),
        ("c", True, "none"),
    ):
        own = load_scenario("fedavg", [*SMALL, f"attack.name={attack}"])
        simulate(own, tmp_path / name, capture=capture)
        frames.append(pd.read_csv(tmp_path / name / "rounds.csv")[["accuracy", "loss", "c_metric"]])
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])
    assert described.attack.name == "hybrid"


def test_a_client_that_fails_has_its_row_again(tmp_path: Path) -> None:
    from simulations.client_app import build_client_app

    described = load_scenario(None, [*SMALL, "attack.name=linear"])
    real = build_client_app(lambda context: described)

    def stumble(message: Message, context: Context, call_next: Any) -> Message:
        if context.node_config["partition-id"] == 2 and message.metadata.message_type == "train":
            raise OSError("out of power")
        return call_next(message, context)

    app = ClientApp(mods=[stumble])
    app.query()(real)
    app.train()(real)
    simulate(described, tmp_path, client_app=app, capture=True)
    live = pd.read_csv(tmp_path / "leakage.csv").sort_values(["round", "client"])
    found = attack_capture(tmp_path / "captures", "linear").table.sort_values(["round", "client"])
    assert (found["status"] == "failed").sum() == 2
    for column in ("round", "client", "image", "label_true", "status", "reason"):
        assert found[column].fillna("").tolist() == live[column].fillna("").tolist()


def test_a_full_disk_costs_neither_training_nor_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CaptureWriter, "add", full)
    monkeypatch.setattr(CaptureWriter, "add_failure", full)
    simulate(load_scenario(None, [*SMALL, "attack.name=linear"]), tmp_path, capture=True)
    assert (pd.read_csv(tmp_path / "leakage.csv")["status"] == "ok").all()


def test_a_server_with_nothing_to_do_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(InvalidInputError, match="nothing to do"):
        MaliciousServer(FedAvg(), model, (1, 8, 8), attack=None)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(InvalidInputError, match="is not empty; name a new one"):
        MaliciousServer(FedAvg(), model, (1, 8, 8), capture=tmp_path)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_captures_the_same(tmp_path: Path) -> None:
    described = load_scenario("fedavg", [*SMALL, "attack.name=none"])
    for engine in ("inline", "ray"):
        simulate(described, tmp_path / engine, engine, capture=True)  # type: ignore[arg-type]
    pairs = zip(*(read_captures(tmp_path / e / "captures") for e in ("inline", "ray")), strict=True)
    for a, b in pairs:
        assert a.observation is not None
        assert b.observation is not None
        for name, value in a.observation.gradient.items():
            assert torch.allclose(value, b.observation.gradient[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_killed_simulation_keeps_what_it_captured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedleak", "simulate", "--capture", "--out", str(tmp_path),
               "--set", "federation.rounds=100000", "--set", "attack.name=none"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    captures = tmp_path / "captures"
    while time.monotonic() < deadline and not (captures / "round-0003").exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = list(read_captures(captures))
    assert len(found) >= 20
    assert all(c.observation for c in found[:-1])
