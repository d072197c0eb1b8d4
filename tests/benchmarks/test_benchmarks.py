"""The benchmarks run, and what they count is right; their times are no test."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from fedleak.client.local_replay import LocalReplay
from fedleak.client.replay import Replay
from fedleak.client.training import LocalTraining
from fedleak.models import conv_chain
from tests.benchmarks import batches, card, common, fedavg, hybrid, launches, linear, real, tampers

import torch  # isort: skip


@pytest.fixture
def tiny() -> common.Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return "tiny", conv_chain([(4, 3, 1, 0), (3, 3, 2, 0)], (3, 12, 12))


def test_linear(tiny: common.Network, tmp_path: Path) -> None:
    rows = [linear.measure(tiny, repeats=1, size=12, vectors=v) for v in (False, True)]
    for row in rows:
        assert row["systems"] == "508x432 156x400"
        assert row["ratio"] > 0
    options = argparse.Namespace(threads=1, json=tmp_path / "out.json")
    common.report(rows, options, linear.NOTES)
    written = json.loads(options.json.read_text())
    assert written["rows"] == rows
    assert written["machine"]["cores"] > 0


def test_batches() -> None:
    images, labels = batches.images_of(None)
    row = batches.measure(images, labels, "linear", "cnn2-v1", batch=3, classes=10, seed=0)
    assert row["least dB"] > 60
    assert row["labels wrong"] == 0
    assert row["trusted"] == 3
    again = batches.measure(images, labels, "linear", "cnn2-v1", batch=3, classes=10, seed=1)
    assert again["ratio"] != row["ratio"]


def test_both_sides_solve_the_same_system() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        solvable = conv_chain([(6, 3, 1, 0)], (3, 12, 12))
    row = linear.measure(("solvable", solvable), repeats=1, size=12)
    assert row["residuals differ"] < 1e-6


def test_hybrid(tiny: common.Network) -> None:
    row = hybrid.measure(tiny, repeats=1, size=12, fraction=1e-3)
    assert row["hybrid s"] > 0


def test_memory() -> None:
    used = hybrid.memory("cnn2-v1")
    assert 0 < used["imports GiB"] <= used["peak GiB"]
    assert used["attack GiB"] == pytest.approx(used["peak GiB"] - used["imports GiB"])


def test_fedavg(tiny: common.Network) -> None:
    """Both attacks have a result for each client, and about the same time."""
    images = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    clients = [(images, torch.tensor([1, 0, 2, 1])), (images.flip(3), torch.tensor([3, 3, 0, 5]))]
    rows = fedavg.measure(tiny[1], clients, LocalTraining(0.05, 2, 2), steps=3)
    assert all(len(values) == 2 for values in rows.values())
    summary = fedavg.summarise(2, rows)
    assert summary["cosine steps"] >= 1
    assert "±" in summary["gain"]
    assert fedavg.half_width([1.0, 3.0]) == pytest.approx(12.706, rel=1e-3)


def test_fedavg_trains_as_its_simulation(tiny: common.Network) -> None:
    """With the order granted, the images of a client make what it sent."""
    images, labels = torch.rand(4, 3, 12, 12), torch.tensor([1, 0, 2, 1])
    training = LocalTraining(0.05, 2, 1, momentum=0.5, weight_decay=0.01)
    seen = fedavg.observe(tiny[1], images, labels, training, seed=7)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(7))
    local = LocalReplay(Replay(tiny[1], (3, 12, 12)), training)
    made = local(images[order].double()[None], labels[order][None]).gradients
    for name, value in seen.gradient.items():
        torch.testing.assert_close(made[name][0], value, atol=1e-5, rtol=1e-3)


def test_tampers() -> None:
    images, labels = batches.images_of(None)
    row = tampers.measure(images, labels, "peel", batch=16, units=200, seed=0)
    assert row["at 60 dB"] == row["back"] == 16
    assert (row["certified wrong"], row["labels wrong"]) == (0, 0)
    assert row["signs"] > 0
    honest = tampers.measure(images, labels, "none", batch=16, units=200, seed=0)
    assert honest["signs"] == 0


def test_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are appended as they come, and not made twice."""
    out = tmp_path / "real.csv"
    command = ["--network", "lenet", "--draws", "1", "--attack", "cosine", "--option", "steps=3"]
    real.main([*command, "--threads", "1", "--out", str(out)])
    first = out.read_text()
    assert first.splitlines()[1].startswith("lenet,eval,none,False,cosine,1,0,0,")
    assert "| lenet | eval | none | cosine | 1 | 1 |" in capsys.readouterr().out
    real.main([*command, "--threads", "1", "--out", str(out)])
    assert out.read_text() == first


@pytest.mark.slow
def test_card_dry_run(tmp_path: Path) -> None:
    """All of a card's run, on a CPU, and without what a bare machine does not have."""
    out = tmp_path / "card.json"
    card.main(["--device", "cpu", "--dry-run", "--json", str(out)])
    written = json.loads(out.read_text())
    assert [row["images"] for row in written["rows"]] == [1, 2]
    assert all(row["dB"] > 12 for row in written["rows"])
    assert list(card.rows("cpu", seconds=-1.0)) == []


def test_the_solver_hardly_waits(tiny: common.Network) -> None:
    """Conjugate gradients alone waited a hundred times; launches grow far slower than images."""
    one, four = (launches.count(tiny, "linear", n, size=12) for n in (1, 4))
    assert one["synchronisations"] < 120
    assert one["launches"] < 4000
    assert four["launches"] < 2 * one["launches"]
