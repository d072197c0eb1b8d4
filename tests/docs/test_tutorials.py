"""Every tutorial does what its page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
    return [float(f) for f in re.findall(r"gradient matched to ([\d.e+-]+)\)", log)]


def test_the_pages_show_the_files() -> None:
    assert (TUTORIALS / "stranger_app.diff").read_text() in blocks("flower-app.md", "diff")


def test_two_lines_in_a_strangers_app(tmp_path: Path) -> None:
    """The training is the same, bit for bit, and the clients' images leak."""
    apps = both_apps(tmp_path)
    logs = [run(sys.executable, "-c", RUN_APP, cwd=app) for app in apps]
    assert same_weights(apps)
    assert not fits(logs[0].stderr + logs[0].stdout)
    found = fits(logs[1].stderr + logs[1].stdout)
    assert len(found) == 30
    assert np.median(found) < 1e-5


@pytest.mark.slow
def test_two_lines_with_flwr_run(tmp_path: Path) -> None:
    """As the page says it; of two clients, the order in which they reply does not matter."""
    apps = both_apps(tmp_path)
    flwr = shutil.which("flwr", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert flwr is not None
    http, control = _free_ports(2)
    environment = {
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    try:
        logs = [
            run(
                flwr, "run", ".", "--stream",
                "--run-config", f"save-to='{app / 'final_model.npz'}'",
                "--federation-config", "num-supernodes=2 client-resources-num-cpus=1",
                cwd=app, **environment,
            )
            for app in apps
        ]  # fmt: skip
    finally:
        _stop_superlink(control)
    assert same_weights(apps)
    found = fits(logs[1].stderr + logs[1].stdout)
    assert len(found) == 6
    assert np.median(found) < 1e-5
