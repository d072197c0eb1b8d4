"""Every tutorial does what its page says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.simulations.test_cli import _free_ports, _stop_superlink

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"

#: Runs the app in the current folder on an engine that keeps the order of its clients.
RUN_APP = """
import random
from flwr.app import Context, RecordDict
from simulations.grid import InlineGrid
from digits_app import client_app, server_app

random.seed(0)
config = {"num-server-rounds": 3, "learning-rate": 0.1, "save-to": "final_model.npz"}
context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
server_app.app(InlineGrid(client_app.app, 10), context)
"""


def run(
    *command: str, cwd: Path = ROOT, timeout: float = 280, **environment: str
) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), environment.pop("PYTHONPATH", "")]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False,
        env={**os.environ, "COLUMNS": "100", **environment,
             "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    text = (TUTORIALS / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def both_apps(folder: Path) -> list[Path]:
    """Return the stranger's app, and a copy of it with the two lines."""
    apps = [folder / "without", folder / "with"]
    for app in apps:
        shutil.copytree(TUTORIALS / "stranger_app", app, ignore=shutil.ignore_patterns("__py*"))
    run("patch", "-p1", "-i", str(TUTORIALS / "stranger_app.diff"), cwd=apps[1])
    return apps


def same_weights(apps: list[Path]) -> bool:
    first, second = (np.load(app / "final_model.npz") for app in apps)
    return first.files == second.files and all(
        first[name].tobytes() == second[name].tobytes() for name in first.files
    )


def fits(log: str) -> list[float]:
    return [float(f) for f in re.findall(r"\(fit ([\d.e+-]+)\)", log)]


def commands(page: str, folder: Path) -> list[str]:
    """Return the commands of a page for this machine, with ``folder`` as results/runs."""
    text = "".join(blocks(page, "sh")).replace("\\\n", " ").replace("$PWD/", "")
    text = text.replace("results/runs", str(folder))
    text = text.replace("PYTHONPATH=", f"PYTHONPATH={ROOT}:")
    return [line for line in text.splitlines() if not line.startswith(("ssh", "scp", "export"))]


def shell(command: str, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run("bash", "-c", command, PATH=path, **environment)
    return done.stdout + done.stderr


def printed(command: str) -> dict[str, Any]:
    """Return the JSON that a command prints, whatever is in its log."""
    text = shell(command)
    found: dict[str, Any] = json.JSONDecoder().raw_decode(text, text.index("{"))[0]
    return found


def python(page: str, place: int, folder: Path) -> None:
    code = blocks(page, "python")[place].replace("results/runs", str(folder))
    run(sys.executable, "-c", code)


def test_the_pages_show_the_files() -> None:
    assert (TUTORIALS / "stranger_app.diff").read_text() in blocks("flower-app.md", "diff")
    assert (TUTORIALS / "deployment.diff").read_text() in blocks("deployment.md", "diff")
    package = TUTORIALS / "own_attack"
    shown = [*blocks("own-attack.md", "python"), *blocks("own-attack.md", "toml")]
    for name in ("pyproject.toml", "gallery.py", "mantissa.py"):
        assert (package / name).read_text() in shown
    sweep = (TUTORIALS / "choose.toml").read_text()
    assert all(sweep.endswith(block) for block in blocks("choose-a-defence.md", "toml"))


@pytest.mark.ray
@pytest.mark.slow
def test_two_lines_in_a_strangers_app(tmp_path: Path) -> None:
    """The training is the same, bit for bit, and the clients' images leak."""
    apps = both_apps(tmp_path)
    logs = [run(sys.executable, "-c", RUN_APP, cwd=app) for app in apps]
    assert same_weights(apps)
    assert not fits(logs[0].stderr + logs[0].stdout)
    found = fits(logs[1].stderr + logs[1].stdout)
    assert len(found) == 30
    assert np.median(found) < 1e-5


@pytest.mark.ray
@pytest.mark.slow
def test_two_lines_with_flwr_run(tmp_path: Path) -> None:
    """As the page says it: the weights of two clients add up to the same in any order."""
    http, control = _free_ports(2)
    environment = {
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    try:
        logs = [shell(line, **environment) for line in commands("flower-app.md", tmp_path)]
    finally:
        _stop_superlink(control)
    found = fits("".join(logs))
    assert len(found) == 6
    assert np.median(found) < 1e-5


@pytest.mark.slow
def test_capture_here_and_attack_there(tmp_path: Path) -> None:
    capture, hybrid, cosine = commands("gpu.md", tmp_path)
    assert "Captured" in shell(capture)
    assert not list((tmp_path / "capture").glob("reconstructions/*"))
    for command, least, most in ((hybrid, 100, 200), (cosine, 10, 30)):
        shell(command)
        (table,) = (tmp_path / "capture/captures/attacks").glob(
            f"{'cosine' if command is cosine else 'hybrid'}-*/attacks.csv"
        )
        found = pd.read_csv(table)
        assert len(found) == 20
        assert least < found["psnr_db"].median() < most


@pytest.mark.slow
def test_choose_a_defence(tmp_path: Path) -> None:
    audit, evaluate, _report = commands("choose-a-defence.md", tmp_path)
    assert "Under 15 dB come: noise of 7.3 times" in shell(audit)
    shell(evaluate)
    table = pd.read_csv(tmp_path / "choose" / "evaluation.csv")
    labels = table["defence"] + ":" + table["strength"].astype(str)
    informed = dict(zip(labels, table["psnr_db_median_informed"], strict=True))
    unaware = dict(zip(labels, table["psnr_db_median_unaware"], strict=True))
    assert informed["prune:0.7"] > 100 > 30 > unaware["prune:0.7"]
    best = min((k for k in informed if table["accuracy"][labels == k].item() > 0.86),
               key=lambda k: informed[k])  # fmt: skip
    assert best.startswith("noise:1")
    assert (tmp_path / "choose" / "frontier.png").is_file()


@pytest.mark.slow
def test_differential_privacy(tmp_path: Path) -> None:
    """Some rows of the page's table are what its command gives."""
    (evaluate,) = commands("differential-privacy.md", tmp_path)
    rows = {"0.01": (165112, 24.2), "0.1": (1762, 11.2), "1": (40, 7.3)}
    some = ", ".join(f'"dp:clip=1,noise={noise}"' for noise in rows)
    shell(f"{evaluate} --set 'defences=[{some}]'")
    table = pd.read_csv(tmp_path / "privacy" / "evaluation.csv").set_index("strength")
    page = (TUTORIALS / "differential-privacy.md").read_text()
    for noise, (epsilon, informed) in rows.items():
        found = table.loc[f"clip=1,noise={noise}"]
        assert found["epsilon"] == pytest.approx(epsilon, rel=0.01)
        assert found["psnr_db_median_informed"] == pytest.approx(informed, abs=1)
        assert f"| {noise} | {epsilon:,} |" in page


@pytest.mark.slow
def test_an_attack_and_a_defence_of_your_own(tmp_path: Path) -> None:
    python("own-attack.md", 1, tmp_path)
    shutil.copytree(TUTORIALS / "own_attack", tmp_path / "package")  # building leaves files
    install, gallery, unaware, informed = commands("own-attack.md", tmp_path)
    shell(install.replace("docs/tutorials/own_attack", str(tmp_path / "package")))
    trials = printed(f"{gallery} --json")["images"]
    assert [trial["fit"] < 1e-6 for trial in trials] == [False, False, True, True]
    assert [trial["psnr_db"] is None for trial in trials] == [False, False, True, True]  # exact
    means = []
    for command in (unaware, informed):
        images = printed(f"{command} --json")["images"]
        means.append(np.mean([i["psnr_db"] for i in images]))
    assert means[1] > means[0] + 6


def test_a_server_that_is_not_honest(tmp_path: Path) -> None:
    """``dishonest-server.md``: the whole batch comes back, and the lines for Flower run."""
    script = "\n".join(blocks("dishonest-server.md", "python"))
    said = run(sys.executable, "-c", script, cwd=tmp_path).stdout
    exact, certified = map(int, re.findall(r"(\d+) of 64 images, (\d+) of them", said)[0])
    assert exact == 64
    assert certified >= 48


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_deployment(tmp_path: Path) -> None:
    """SuperLink and SuperNodes are processes; the capture is attacked without them."""
    start, attack = blocks("deployment.md", "sh")
    start = start.replace('--run-config "', '--run-config "num-server-rounds=1 ')
    text = (start + attack).replace("$PWD/", "").replace("results/runs", str(tmp_path))
    text = text.replace("PYTHONPATH=", f"PYTHONPATH={ROOT}:")
    said = shell(f"set -e; trap 'kill $links 2>/dev/null || true' EXIT\n{text}")
    assert "reconstructed all 16 attacked images" in " ".join(said.split())
    table = pd.read_csv(next(tmp_path.glob("deployed-captures/attacks/*/attacks.csv")))
    assert len(table) == 16
    assert table["fit"].max() < 0.05
    assert "Real updates" in (tmp_path / "deployed-captures" / "report.html").read_text()


@pytest.mark.slow
def test_kinds_of_apps() -> None:
    """``kinds-of-apps.md``: classes come out, and pictures that are none are doubtful."""
    from torchvision.models import VisionTransformer

    from tests.docs.apps import LeNet, attacked, batch_normalised

    told: dict[str, Any] = {}
    for block in blocks("kinds-of-apps.md", "python"):
        exec(block, told)
    sgd = {"lr": 0.01, "momentum": 0.9}

    def transformer() -> Any:
        model = VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10)
        for name, weight in model.named_parameters():
            weight.requires_grad = name.startswith("heads")
        return model

    short = {"seconds": 60, "max_clients": 1}
    leak, right = attacked(LeNet, torch.optim.SGD, sgd, 1, 0.5, **{**told["quickstart"], **short})
    assert right
    assert leak.status == "doubtful"
    rate = {"lr": 0.001}
    leak, right = attacked(
        batch_normalised, torch.optim.Adam, rate, 4, 0, **{**told["adam"], **short}
    )
    assert right
    assert leak.status == "doubtful"
    head = {**told["head"], **short, "num_images": 1}
    leak, right = attacked(transformer, torch.optim.Adam, rate, 1, 0, "heads", **head)
    assert right
    assert leak.status == "doubtful"
    assert "650 entries of the update say anything, of 3072 unknowns" in leak.reason
