"""TensorBoard and MLflow: read back what was logged, and fail without harm."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedleak.errors import InvalidInputError, UnknownNameError
from simulations import trackers
from simulations.engines import simulate
from simulations.recorder import RoundScores
from simulations.scenario import load_scenario
from simulations.server_app import Progress

SMALL = ["federation.clients=3", "federation.rounds=2"]


@pytest.mark.slow
def test_tensorboard_is_told_of_every_round(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    arms = simulate(load_scenario(None, SMALL), out, log_to=["tensorboard"])
    for arm in arms:
        read = EventAccumulator(str(out / "tensorboard" / arm.defence.spec.label))
        read.Reload()
        leakage, rounds = (pd.read_csv(arm.out / f"{n}.csv") for n in ("leakage", "rounds"))
        accuracy = read.Scalars("accuracy")
        assert [e.step for e in accuracy] == [1, 2]
        assert [e.value for e in accuracy] == pytest.approx(list(rounds["accuracy"]), abs=1e-5)
        psnr = leakage.groupby("round")["psnr_db"]
        for name, wanted in (("psnr_db_median", psnr.median()), ("psnr_db_best", psnr.max())):
            assert [e.value for e in read.Scalars(name)] == pytest.approx(list(wanted), rel=1e-5)
        predicted = [e.value for e in read.Scalars("predicted_psnr_db")]
        assert predicted == pytest.approx(list(rounds["predicted_psnr_db"]), rel=1e-5)
        assert set(read.Tags()["images"]) == {"leakage_vs_rounds", "reconstructions"}
        (text,) = read.Tensors("scenario (simulated)/text_summary")
        assert b'"clients": 3' in text.tensor_proto.string_val[0]


def test_arms_share_a_folder_that_one_tensorboard_shows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    scenario = load_scenario(None, ['compare=["noise:0.1"]'])
    for defence in scenario.arms():
        trackers.Trackers(["tensorboard"], tmp_path, scenario.arm(defence)).end(tmp_path, True)
    assert sorted(p.name for p in (tmp_path / "tensorboard").iterdir()) == ["noise-0.1", "none"]


@pytest.mark.slow
def test_mlflow_has_numbers_settings_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / "run"
    simulate(load_scenario(None, [*SMALL, "defence=prune:0.9"]), out, log_to=["mlflow"])
    client = mlflow.MlflowClient(tracking_uri=(out / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("run")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["defence"] == "prune:0.9"
    assert run.data.params["federation.clients"] == "3"
    assert run.data.tags["fedleak.simulated"] == "true"
    leakage = pd.read_csv(out / "leakage.csv")
    history = client.get_metric_history(run.info.run_id, "psnr_db_median")
    wanted = leakage.groupby("round")["psnr_db"].median()
    assert {m.step: m.value for m in history} == pytest.approx(wanted.to_dict())
    right = (leakage["label_true"] == leakage["label_inferred"])[leakage["round"] == 2].mean()
    assert run.data.metrics["labels_right"] == pytest.approx(right)
    files = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert files == {"scenario.json", "leakage_vs_rounds.png", "reconstructions.png"}
    simulate(load_scenario(None, SMALL), out, overwrite=True)
    assert not (out / "mlruns").exists()  # as all that a run writes


def test_what_cannot_be_tracked_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario, out = load_scenario(None, SMALL), tmp_path / "run"
    with pytest.raises(UnknownNameError, match="did you mean 'mlflow'"):
        simulate(scenario, out, log_to=["ml-flow"])
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", (trackers.MLflow, "no_such_mlflow"))
    with pytest.raises(InvalidInputError, match=r'pip install "fedleak\[mlflow\]"'):
        simulate(scenario, out, log_to=["mlflow"])
    assert not out.exists()


@pytest.mark.parametrize("when", ["__init__", "round", "picture", "end"])
def test_a_tracker_that_fails_warns_once(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Quiet(trackers.Tracker):
        def __init__(self, *arguments: Any) -> None: ...
        def round(self, *arguments: Any) -> None: ...
        def picture(self, *arguments: Any) -> None: ...
        def end(self, *arguments: Any) -> None: ...

    def fail(*arguments: Any) -> None:
        raise ConnectionError("the server is away")

    monkeypatch.setattr(Quiet, when, fail)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", (Quiet, "json"))
    (tmp_path / "reconstructions.png").touch()
    progress = Progress(1, 2, 0.5, 1.0, RoundScores(1, 1, 20.0, 20.0, 0.5, 1.0, math.nan))
    with caplog.at_level(logging.WARNING, "fedleak"):
        told = trackers.Trackers(["tensorboard"], tmp_path, load_scenario(None, SMALL))
        for _ in range(2):
            told.round(progress)
        told.end(tmp_path, finished=True)
    warnings = [r for r in caplog.records if r.name == "fedleak"]
    assert len(warnings) == 1
    assert "the server is away" in warnings[0].fields["reason"]  # type: ignore[attr-defined]


def test_a_run_outlives_its_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    pytest.importorskip("mlflow")
    simulate(load_scenario(None, SMALL), tmp_path / "run", log_to=["mlflow"])
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["status"] == "finished"
