"""A server that tampers and clients that look, in one federation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedleak.capture.run import attack_capture
from fedleak.errors import FedleakError
from fedleak.results.format import TAMPERING
from simulations.engines import Arm, simulate
from simulations.scenario import Scenario, flatten, from_run_config, make_scenario


def scenario(**sections: Any) -> Scenario:
    """Return a small federation on an MLP, whose server may tamper."""
    table: dict[str, Any] = {
        "federation": {"clients": 3, "rounds": 2},
        "data": {"max_test_images": 100},
        "training": {"batch_size": 8, "learning_rate": 0.5},
        "model": {"name": "mlp"},
        "threat": {"tamper": True},
        "attack": {"name": "rows"},
        "metric": {"predict": "none"},
    }
    for name, section in sections.items():
        inner = table.get(name)
        table[name] = {**inner, **section} if isinstance(inner, dict) else section
    return make_scenario(table)


def run(described: Scenario, out: Path, **options: Any) -> list[Arm]:
    return simulate(described, out, **options)


def tables(folder: Path) -> list[pd.DataFrame]:
    """Return leakage and rounds, without what hangs on the clock."""
    found = [pd.read_csv(folder / f"{name}.csv") for name in ("leakage", "rounds")]
    return [t.drop(columns=[c for c in t if c.startswith("seconds")]) for t in found]


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> list[Arm]:
    described = scenario(tamper={"name": "peel", "clients": 1}, guard="warn")
    return run(described, tmp_path_factory.mktemp("run") / "out", capture=True)


def test_the_honest_arm_is_that_of_a_run_without_tampering(arms: list[Arm], tmp_path: Path) -> None:
    assert [arm.label for arm in arms] == ["none", "none_peel"]
    run(scenario(threat={"tamper": False}), tmp_path / "alone")
    for own, alone in zip(tables(arms[0].out), tables(tmp_path / "alone"), strict=True):
        pd.testing.assert_frame_equal(own, alone, check_exact=True)


def test_the_record_says_what_it_gave_and_who_saw_it(arms: list[Arm]) -> None:
    honest, tampered = (pd.read_csv(a.out / "tampering.csv") for a in arms)
    assert tuple(honest.columns) == tuple(tampered.columns) == TAMPERING.columns
    assert len(honest) == len(tampered) == 6
    assert honest["tamper"].isna().all()
    assert not honest["suspected"].any()
    sent = tampered["tamper"].notna()
    assert sent.groupby(tampered["round"]).sum().tolist() == [1, 1]
    assert (tampered["recovered"][sent] == 8).all()
    assert (tampered["certified"][sent] == 8).all()
    assert (tampered["certified_wrong"] == 0).all()
    assert tampered["suspected"].astype(bool).equals(sent)
    assert tampered["signs"][sent].str.contains("equal rows").all()


def test_the_training_goes_on_on_what_was_recovered(arms: list[Arm], tmp_path: Path) -> None:
    tampered = pd.read_csv(arms[1].out / "tampering.csv")
    assert (tampered["restored"][tampered["tamper"].notna()] == 8).all()
    honest, restored = (tables(arm.out)[1] for arm in arms)
    assert restored["accuracy"].tolist() == honest["accuracy"].tolist()
    assert restored["loss"].to_numpy() == pytest.approx(honest["loss"].to_numpy(), rel=1e-4)
    described = scenario(tamper={"name": "peel", "restore": False})
    _, lost = run(described, tmp_path / "lost")
    loss = tables(lost.out)[1]["loss"]
    assert loss[0] == loss[1]  # of all clients nothing is left to learn from


def test_a_capture_holds_what_was_really_sent(arms: list[Arm]) -> None:
    found = attack_capture(arms[1].out / "captures", "rows").table
    leakage = pd.read_csv(arms[1].out / "leakage.csv")
    keys = ["round", "client", "image"]
    both = leakage.merge(found, on=keys, suffixes=("", "_later"))
    assert len(both) == len(leakage) == 48
    assert both["psnr_db_later"].to_numpy() == pytest.approx(both["psnr_db"].to_numpy(), abs=1e-3)
    sent = pd.read_csv(arms[1].out / "tampering.csv").query("tamper == 'peel'")
    of_sent = leakage.merge(sent[["round", "client"]])
    assert (of_sent["attack"] == "rows").all()
    assert (of_sent["psnr_db"] > 60).all()


def test_rounds_are_chosen_and_a_client_may_refuse(tmp_path: Path) -> None:
    described = scenario(tamper={"name": "peel", "rounds": [2], "clients": 1}, guard="refuse")
    _, arm = run(described, tmp_path / "run")
    told = pd.read_csv(arm.out / "tampering.csv")
    assert told["round"][told["tamper"].notna()].tolist() == [2]
    assert told["suspected"].astype(bool).equals(told["tamper"].notna())
    rounds = pd.read_csv(arm.out / "rounds.csv")
    assert rounds["failures"].tolist() == [0, 1]
    leakage = pd.read_csv(arm.out / "leakage.csv")
    reasons = leakage["reason"][leakage["status"] == "failed"]
    assert len(reasons) == 8
    assert reasons.str.contains("looks tampered with").all()


def test_a_guard_that_replies_with_noise_gives_nothing_away(tmp_path: Path) -> None:
    described = scenario(tamper={"name": "peel", "clients": 1}, guard="noise")
    _, arm = run(described, tmp_path / "run")
    told = pd.read_csv(arm.out / "tampering.csv").query("tamper == 'peel'")
    assert (told["recovered"].fillna(0) == 0).all()
    assert (told["restored"] == 0).all()


def test_one_image_that_stands_out_is_seen_in_the_update(tmp_path: Path) -> None:
    described = scenario(
        model={"name": "cnn2-v1"}, tamper={"name": "fishing", "clients": 1},
        guard={"action": "warn", "disparity": 5}, training={"batch_size": 16},
    )  # fmt: skip
    _, arm = run(described, tmp_path / "run")
    told = pd.read_csv(arm.out / "tampering.csv").query("tamper == 'fishing'")
    assert len(told) == 2
    assert told["suspected"].all()
    leakage = pd.read_csv(arm.out / "leakage.csv").merge(told[["round", "client"]])
    assert (leakage["attack"] == "fished").all()


def test_an_update_that_leaks_is_seen_before_it_is_sent(tmp_path: Path) -> None:
    described = scenario(
        model={"name": "cnn3-v1"}, tamper={"name": "fishing:label=6", "clients": 1},
        guard={"action": "refuse", "leakage": 60}, attack={"name": "none"},
        federation={"clients": 2, "rounds": 1},
    )  # fmt: skip
    arms = run(described, tmp_path / "run", capture=True)
    honest, tampered = (pd.read_csv(a.out / "tampering.csv")["signs"].fillna("") for a in arms)
    assert (honest == "").all()
    assert tampered.str.contains("leakage in update").tolist() == [True, False]


def test_both_attackers_of_a_defence_read_the_same_tampered_update(tmp_path: Path) -> None:
    from simulations.evaluation.cell import run_cell
    from simulations.evaluation.sweep import Cell

    described = scenario(tamper={"name": "peel", "clients": 1}, defence="quantise:16")
    cell = Cell(described)
    assert run_cell(str(tmp_path), cell).status == "ok"
    told = [
        pd.read_csv(tmp_path / "cells" / cell.key / who / "tampering.csv")
        for who in ("unaware", "informed")
    ]
    assert (told[0]["tamper"].notna() == told[1]["tamper"].notna()).all()
    assert told[0]["tamper"].notna().sum() == 2


def test_a_sum_is_tampered_with_as_a_whole(tmp_path: Path) -> None:
    described = scenario(
        tamper="peel:directions=8", threat={"view": "sum"}, federation={"clients": 2, "rounds": 1}
    )
    _, arm = run(described, tmp_path / "run")
    told = pd.read_csv(arm.out / "tampering.csv")
    assert (told["images"] == 8).all()
    assert told["recovered"].sum() >= 14


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tamper": "peel", "threat": {"tamper": False}}, "tamper = true.*tamper.name=none"),
        ({"tamper": "peal"}, "tamper: unknown tamper 'peal'; did you mean 'peel'"),
        ({"tamper": "peel:direction=2"}, "'direction'; did you mean 'directions'"),
        ({"tamper": "peel:directions=x"}, "'x' is not a number"),
        ({"tamper": {"name": "peel", "rounds": "0"}}, "tamper.rounds: '0' is no round"),
        ({"tamper": {"name": "peel", "rounds": [1, -2]}}, "'1/-2' is no round"),
        ({"tamper": {"name": "peel", "clients": -1}}, "tamper.clients = -1"),
        ({"guard": "watch"}, "guard.action = 'watch'"),
        ({"guard": {"action": "warn", "disparity": -1}}, "guard.disparity = -1"),
        ({"tamper": "peel", "model": {"name": "cnn2-v1"}}, "not fully connected to the pixels"),
        ({"tamper": {"name": "peel", "clients": 1}, "threat": {"view": "sum"}}, "tamper.clients=0"),
        ({"attack": {"memory": True}, "threat": {"view": "sum"}}, "set attack.memory=false"),
        ({"attack": {"memory": True}, "strategy": {"name": "FedAvg"},
          "training": {"epochs": 2, "share": "weights"}}, "clients that take one local step"),
        ({"guard": {"action": "warn", "leakage": 20}, "strategy": {"name": "FedAvg"},
          "training": {"local_steps": 2, "share": "weights"}}, "predicted for one local step"),
        ({"tamper": "fishing:label=12"}, "label 12 is not one of the 10 classes"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_refused_before_anything_runs(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FedleakError, match=message):
        run(scenario(**sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_keys_fit_a_flower_config() -> None:
    described = scenario(tamper={"name": "peel:directions=2", "rounds": [1, 3]}, guard="noise")
    assert from_run_config(flatten(described)).tamper == described.tamper
    assert from_run_config(flatten(described)).guard == described.guard
    assert described.tamper.when == (1, 3)
    assert [v.label for v in described.variants()] == ["none", "none_peel-directions-2"]


def test_tampers_are_an_axis_of_an_evaluation_and_it_goes_on(tmp_path: Path) -> None:
    from fedleak.report.page import write_report
    from simulations.evaluation.run import evaluate
    from simulations.evaluation.sweep import Sweep

    one = scenario(guard="warn", tamper={"clients": 1}).model_dump()
    del one["defence"], one["compare"]
    sweep = Sweep(scenario=(one,), tampers=("none", "peel", "trap"))
    assert sweep.count == 3
    first = evaluate(sweep.model_copy(update={"tampers": ("none", "peel")}), tmp_path / "out")
    assert first.table["tamper"].tolist() == ["none", "peel"]
    found = evaluate(sweep, tmp_path / "out")
    assert found.skipped == 2  # what is finished is not run again
    table = found.table.set_index("tamper")
    assert (table["status"] == "ok").all()
    assert table.loc["peel", ["recovered", "certified", "restored", "detected"]].tolist() == [1] * 4
    assert table.loc["peel", "accuracy_lost"] == pytest.approx(0, abs=0.011)
    assert table.loc[["none", "peel"], "false_alarms"].tolist() == [0, 0]
    assert table.loc["none", ["recovered", "detected", "accuracy_lost"]].isna().all()
    path, headline = write_report(tmp_path / "out")
    page = path.read_text()
    assert headline.startswith("Without a defence, the server")
    assert "A server that changes the model (peel) gets 8 of 8 images" in page
    assert page.count('class="mrow') == 3


def test_the_report_of_a_run_shows_both_arms(arms: list[Arm]) -> None:
    from fedleak.report.page import write_report

    path, _ = write_report(arms[0].out.parent)
    page = path.read_text()
    assert "an honest server" in page
    assert (
        "A client that looks at the model before it trains suspected 2 of 2 models of this kind."
        in page
    )
    assert "computed on the images that it recovered" in page
    path, _ = write_report(arms[1].out)  # of the tampered arm alone
    assert "(peel) gets 8 of 8 images" in path.read_text()
