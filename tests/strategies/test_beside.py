"""``fedleak.strategies`` is ``strategies``, also where an app has a file of that name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SAME = """
import sys
import fedleak
assert not {"flwr", "ray", "strategies", "simulations"} & set(sys.modules)
import fedleak.strategies, strategies
assert fedleak.strategies is strategies
from fedleak.strategies.leak import Leak
assert Leak is strategies.Leak and Leak.__module__ == "strategies.leak"
assert strategies.malicious_server.__spec__.name == "strategies.malicious_server"
import simulations.evaluation.run
from fedleak.simulations.evaluation.run import evaluate
assert evaluate is simulations.evaluation.run.evaluate
"""
HIDDEN = """
from strategies import of_the_app
from fedleak.strategies import MaliciousServer, defence_mod
from fedleak.strategies.malicious_server import MaliciousServer as again
assert MaliciousServer is again
from flwr.serverapp.strategy import FedAvg
from torch import nn
server = MaliciousServer(
    FedAvg(), nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (1, 2, 2), attack="linear"
)
assert server.fraction_train == 1.0
import simulations.server_app
import strategies
assert strategies.of_the_app == 7
"""


@pytest.mark.parametrize(("script", "hides"), [(SAME, False), (HIDDEN, True)])
def test_one_package_by_two_names(script: str, hides: bool, tmp_path: Path) -> None:
    if hides:
        (tmp_path / "strategies.py").write_text("of_the_app = 7\n")
    (tmp_path / "app.py").write_text(script)
    command = [sys.executable, str(tmp_path / "app.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
