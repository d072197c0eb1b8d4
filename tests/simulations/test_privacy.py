"""Flower's differential privacy in scenarios: who is protected, and from whom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedleak.errors import FedleakError
from simulations import simulate
from simulations.evaluation.run import evaluate
from simulations.evaluation.sweep import load_sweep
from simulations.scenario import Scenario, load_scenario
from simulations.server_app import check

FIXED = "noise_multiplier=0.1,clipping_norm=0.1"
SMALL = [
    "federation.clients=2", "federation.rounds=2", "data.max_images=20", "training.share=weights",
    "strategy.name=FedAvg",
]  # fmt: skip


def small(*more: str) -> Scenario:
    return load_scenario("demo", ["compare=[]", *SMALL, "threat.defence=true", *more])


@pytest.mark.parametrize(
    "privacy",
    [
        f"DifferentialPrivacyServerSideFixedClipping:{FIXED}",
        "DifferentialPrivacyServerSideAdaptiveClipping:noise_multiplier=0.1",
        f"DifferentialPrivacyClientSideFixedClipping:{FIXED}",
        "DifferentialPrivacyClientSideAdaptiveClipping:noise_multiplier=0.1",
    ],
)
def test_central_privacy_hides_nothing_from_its_own_server(privacy: str, tmp_path: Path) -> None:
    before = np.random.get_state()[1][:3].tolist()
    simulate(small(f"strategy.privacy={privacy}"), tmp_path / "a")
    assert np.random.get_state()[1][:3].tolist() == before
    simulate(small(f"strategy.privacy={privacy}"), tmp_path / "b")
    simulate(small(), tmp_path / "plain")
    tables = {n: pd.read_csv(tmp_path / n / "rounds.csv") for n in ("a", "b", "plain")}
    assert tables["a"]["loss"].tolist() == tables["b"]["loss"].tolist()  # the noise is seeded
    assert tables["a"]["loss"].tolist() != tables["plain"]["loss"].tolist()
    leakage = pd.read_csv(tmp_path / "a" / "leakage.csv")
    assert (leakage["status"] == "ok").all(), leakage["reason"].tolist()
    assert leakage["psnr_db"].min() > 80


def test_clipping_clients_have_an_informed_attacker_in_sweeps(tmp_path: Path) -> None:
    privacy = f"DifferentialPrivacyClientSideFixedClipping:{FIXED}"
    overrides = [*SMALL, f"strategy.privacy={privacy}", 'defences=["none"]', "seeds=[0]"]
    sweep = load_sweep("noise-pruning", [*overrides, "strengths={}"])
    table = evaluate(sweep, tmp_path).table
    assert table["status"].tolist() == ["ok"]
    assert list(tmp_path.glob("cells/*/informed/run.json"))


_WRAPPER = "strategy.privacy=DifferentialPrivacyServerSideFixedClipping"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["strategy.privacy=LocalDpMod"], "DifferentialPrivacyServerSideFixedClipping"),
        ([f"{_WRAPPER}:{FIXED},x=1"], "'x'"),
        ([f"{_WRAPPER}:0.1"], "KEY=NUMBER"),
        ([_WRAPPER], "noise_multiplier"),
        ([f"{_WRAPPER}:{FIXED}", "training.share=gradient", "strategy.name=FedSGD"], "clips weigh"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(change: list[str], said: str) -> None:
    with pytest.raises(FedleakError, match=said):
        check(small(*change))
