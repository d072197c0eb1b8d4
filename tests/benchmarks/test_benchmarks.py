"""The benchmarks run, and what they count is right; their times are no test."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from fedleak.models import conv_chain
from tests.benchmarks import common, hybrid, linear

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
    assert json.loads(options.json.read_text())["rows"] == rows


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
