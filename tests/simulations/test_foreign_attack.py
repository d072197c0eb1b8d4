"""An attack as CONTRIBUTING shows it, with neither device nor seed, at every door."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch

from fedleak import laboratory
from fedleak.attacks import ATTACKS, Attack, Reconstruction, attack_for
from fedleak.capture.run import attack_capture
from fedleak.commands.app import main
from fedleak.errors import InvalidInputError
from fedleak.models import build_model
from fedleak.observation import Observation
from fedleak.paper.cells import parse_attack
from simulations.engines import simulate
from simulations.scenario import load_scenario
from tests.fedleak.test_capture import make_capture


class Grey(Attack):
    """Guesses grey images."""

    def __init__(self, level: float = 0.5):
        self.level = level

    def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        found = []
        for seen in observations:
            images = torch.full(
                (seen.num_images, *seen.input_shape), self.level, dtype=torch.float64
            )
            labels = torch.zeros(seen.num_images, dtype=torch.int64)
            # Which explains nothing: doubtful.
            found.append(Reconstruction(images, labels, fit=1.0))
        return found


@pytest.fixture(autouse=True)
def grey(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS._entries, "grey", Grey)


def test_a_simulation(tmp_path: Path) -> None:
    small = ["federation.clients=2", "federation.rounds=1", "data.max_test_images=10"]
    described = load_scenario(None, [*small, "attack.name=grey", "attack.options.level=0.25"])
    simulate(described, tmp_path / "run")
    assert set(pd.read_csv(tmp_path / "run" / "leakage.csv")["status"]) == {"doubtful"}


def test_a_capture(tmp_path: Path) -> None:
    make_capture(tmp_path / "captures", clients=2, rounds=1)
    found = attack_capture(tmp_path / "captures", "grey", {"level": 0.25}, device="cpu")
    assert set(found.table["status"]) == {"doubtful"}


def test_the_laboratory_and_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    model = build_model("cnn2-v1", (3, 16, 16), 10, seed=0)
    trials = laboratory.reconstruct(model, torch.full((1, 3, 16, 16), 0.25), [1], "grey", seed=3)
    assert trials.trials[0].quality.mse == pytest.approx(0.0625)
    Image.new("RGB", (16, 16), (64, 64, 64)).save(tmp_path / "a.png")
    line = ["reconstruct", "--model", "cnn2-v1", "--images", str(tmp_path), "--attack", "grey"]
    monkeypatch.setattr(sys, "argv", ["fedleak", *line, "--device", "cpu", "--seed", "5"])
    main()
    assert "mean" in capsys.readouterr().out


def test_the_paper_s_table() -> None:
    assert isinstance(parse_attack("grey:level=0.25").make("cpu", 0), Grey)


def test_what_an_attack_takes_it_is_given() -> None:
    made = attack_for("cosine", {"steps": 3}, "cpu", 4)
    assert (made.device, made.seed, made.steps) == ("cpu", 4, 3)  # type: ignore[attr-defined]
    assert attack_for("cosine", {"seed": 7}, "cpu", 4).seed == 7  # type: ignore[attr-defined]
    assert attack_for("hybrid", {}, "cpu", 4).device == "cpu"  # type: ignore[attr-defined]
    with pytest.raises(InvalidInputError, match="does not take these options"):
        attack_for("grey", {"device": "cpu"})
