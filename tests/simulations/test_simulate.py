"""Whole runs, mostly in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fedleak.errors import FedleakError, InvalidInputError
from fedleak.models import build_model
from fedleak.report.page import write_report
from fedleak.results.format import COVERAGE, LEAKAGE, ROUNDS
from fedleak.status import reconstructed
from simulations.engines import simulate
from simulations.evaluation.table import covered
from simulations.partition import client_batches, client_images
from simulations.scenario import load_scenario

SMALL = ["federation.clients=4", "federation.rounds=3", "data.max_test_images=50"]


def _tables(out: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    about = json.loads((out / "run.json").read_text())
    return pd.read_csv(out / "leakage.csv"), pd.read_csv(out / "rounds.csv"), about


def test_a_run_leaves_tables_pictures_and_provenance(tmp_path: Path) -> None:
    seen = []
    described = load_scenario(None, SMALL)
    (arm,) = simulate(described, tmp_path / "run", on_progress=lambda a, p: seen.append(p))
    leakage, rounds, about = _tables(tmp_path / "run")
    assert arm.out == tmp_path / "run"
    assert tuple(leakage.columns) == LEAKAGE.columns
    assert tuple(rounds.columns) == ROUNDS.columns
    assert len(leakage) == 12
    assert (leakage["status"] == "ok").all()
    assert leakage["psnr_db"].median() > 60
    assert (leakage["label_true"] == leakage["label_inferred"]).all()
    assert leakage["image"].nunique() == 12
    assert rounds["round"].tolist() == [1, 2, 3]
    assert (rounds["c_metric"] == 0).all()
    assert (rounds["clients"] == 4).all()
    assert (rounds["failures"] == 0).all()
    assert rounds["accuracy"].between(0, 1).all()
    assert about["status"] == "finished"
    assert about["simulated"] is True
    assert about["scenario"] == described.model_dump(mode="json")
    assert {"flwr", "torch", "ray"} <= set(about["versions"])
    assert [p.server_round for p in seen] == [1, 2, 3]
    for picture in ("leakage_vs_rounds.png", "reconstructions.png"):
        assert (tmp_path / "run" / picture).read_bytes()[:4] == b"\x89PNG"
    with np.load(tmp_path / "run" / "reconstructions" / "round-0002.npz") as stored:
        assert stored["truth"].shape == stored["reconstruction"].shape == (4, 1, 8, 8)


@pytest.mark.slow
def test_same_seed_same_numbers(tmp_path: Path) -> None:
    options = [*SMALL, "federation.fraction=0.5", "defence=noise:0.1"]
    frames = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        simulate(load_scenario(None, options, seed=seed), tmp_path / name)
        frames.append(_tables(tmp_path / name)[0].drop(columns="seconds"))
    pd.testing.assert_frame_equal(frames[0], frames[1])
    assert not frames[0]["psnr_db"].equals(frames[2]["psnr_db"])


@pytest.mark.slow
def test_defences_side_by_side(tmp_path: Path) -> None:
    described = load_scenario("demo", [*SMALL, "federation.rounds=2"])
    arms = simulate(described, tmp_path)
    assert [a.out.name for a in arms] == ["none", "noise-0.3", "prune-0.9"]
    together = pd.read_csv(tmp_path / "leakage.csv")
    median = together.groupby("defence")["psnr_db"].median()
    assert median["none"] > 60
    assert median["noise"] < 30
    assert median["prune"] < 30
    # The same clients use the same images under every defence: the arms can be compared.
    for _, group in together.groupby(["round", "client"]):
        assert group["image"].nunique() == 1
    assert set(pd.read_csv(tmp_path / "rounds.csv")["defence"]) == {"none", "noise", "prune"}
    assert (tmp_path / "leakage_vs_rounds.png").is_file()
    about = json.loads((tmp_path / "run.json").read_text())
    assert (about["status"], about["arms"]) == ("finished", ["none", "noise-0.3", "prune-0.9"])
    metric = pd.read_csv(tmp_path / "none" / "metric.csv")
    assert metric["round"].tolist() == [1, 2]
    assert metric.loc[0, ["name", "unknowns", "rank", "exact"]].tolist() == ["conv1", 64, 64, True]
    # Replacing it leaves what is not ours alone.
    (tmp_path / "none" / "notes.txt").write_text("mine")
    simulate(described, tmp_path, overwrite=True)
    assert (tmp_path / "none" / "notes.txt").is_file()


@pytest.mark.slow
def test_an_arm_that_breaks_leaves_the_others(tmp_path: Path) -> None:
    def stop(arm: Any, progress: Any) -> None:
        if arm.defence.name == "prune":
            raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        simulate(load_scenario("demo", [*SMALL, "federation.rounds=2"]), tmp_path, on_progress=stop)
    together = pd.read_csv(tmp_path / "leakage.csv")
    assert together.groupby("defence").size().to_dict() == {"none": 8, "noise": 8, "prune": 4}
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_arms_in_processes_are_the_same(tmp_path: Path) -> None:
    described = load_scenario("demo", [*SMALL, "federation.rounds=2", 'compare=["noise:0.3"]'])
    seen: list[tuple[str, int]] = []

    def note(arm: Any, progress: Any) -> None:
        seen.append((arm.label, progress.server_round))

    simulate(described, tmp_path / "alone")
    simulate(described, tmp_path / "beside", jobs=2, on_progress=note)
    assert sorted(seen) == [("noise-0.3", 1), ("noise-0.3", 2), ("none", 1), ("none", 2)]
    alone, beside = (
        pd.read_csv(tmp_path / out / "leakage.csv").drop(columns="seconds")
        for out in ("alone", "beside")
    )
    # To a thousandth of a decibel: one thread or two may round differently.
    pd.testing.assert_frame_equal(alone, beside, rtol=1e-3)

    def stop(arm: Any, progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(described, tmp_path / "stopped", jobs=2, on_progress=stop)
    for out in (".", "none", "noise-0.3"):
        file = tmp_path / "stopped" / out / "run.json"
        if file.is_file():  # an arm may not have begun
            assert json.loads(file.read_text())["status"] != "running"


def test_processes_are_for_clients_that_can_be_given_to_them(tmp_path: Path) -> None:
    described = load_scenario("demo", [*SMALL, "federation.rounds=2"])
    for refused in ({"jobs": 0}, {"jobs": 2, "engine": "ray"}, {"jobs": 2, "client_app": object()}):
        with pytest.raises(InvalidInputError, match="processes beside each other, from 1"):
            simulate(described, tmp_path / "out", **refused)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_pictures_are_paired_by_client_and_image(tmp_path: Path) -> None:
    from fedleak.plots import _first_round

    for name in ("a", "b"):
        (tmp_path / name / "reconstructions").mkdir(parents=True)
        (tmp_path / name / "leakage.csv").write_text("defence,strength\nnone,0\n")
        clients = np.array([2, 0] if name == "a" else [0, 1])
        pixels = np.zeros((2, 1, 4, 4)) + clients[:, None, None, None]
        np.savez(
            tmp_path / name / "reconstructions" / "round-0003.npz",
            client=clients, image=clients + 10, truth=pixels, reconstruction=pixels,
            psnr_db=clients * 1.0,
        )  # fmt: skip
    for name, expected in (("a", {0, 2}), ("b", {0, 1})):
        _, images = _first_round(tmp_path / name)
        assert {client for _, client, _ in images} == expected
        assert all(truth.max() == psnr == k[1] for k, (truth, _, psnr) in images.items())


@pytest.mark.slow
def test_a_defence_of_strength_zero_is_none(tmp_path: Path) -> None:
    for name in ("none", "noise:0", "prune:0"):
        simulate(load_scenario(None, [*SMALL, f"defence={name}"]), tmp_path / name[:4])
    tables = [_tables(tmp_path / n)[0] for n in ("none", "nois", "prun")]
    for other in tables[1:]:
        assert other["psnr_db"].equals(tables[0]["psnr_db"])
    accuracy = [_tables(tmp_path / n)[1]["loss"].tolist() for n in ("none", "nois", "prun")]
    assert accuracy[0] == accuracy[1] == accuracy[2]


def test_the_attack_never_sees_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored against other images, the reconstructions stay the same; the scores do not."""
    described = load_scenario(None, [*SMALL, "federation.rounds=1"])
    simulate(described, tmp_path / "honest")
    import simulations.recorder as recorder

    real = recorder.client_images
    monkeypatch.setattr(
        recorder, "client_images", lambda s, client, r: real(s, (client + 1) % 4, r + 50)
    )
    simulate(described, tmp_path / "withheld")
    made, scores = [], []
    for name in ("honest", "withheld"):
        with np.load(tmp_path / name / "reconstructions" / "round-0001.npz") as stored:
            made.append(stored["reconstruction"])
            scores.append(stored["psnr_db"])
    assert np.array_equal(made[0], made[1])
    assert scores[0].min() > 60 > 30 > scores[1].max()


def test_weights_shared_after_one_step(tmp_path: Path) -> None:
    simulate(load_scenario("fedavg", ["federation.rounds=2"]), tmp_path)
    leakage, rounds, _ = _tables(tmp_path)
    assert leakage["psnr_db"].median() > 60
    assert (rounds["clients"] == 10).all()


def test_what_the_attack_cannot_do_is_in_the_table(tmp_path: Path) -> None:
    """Several local steps: rows say why, training and metric go on."""
    options = ["training.share=weights", "strategy.name=FedAvg", "training.local_steps=2"]
    options += ["training.batch_size=2", "attack.name=linear"]
    simulate(load_scenario(None, [*SMALL, *options]), tmp_path)
    leakage, rounds, about = _tables(tmp_path)
    assert len(leakage) == 4 * 3 * 4
    assert (leakage["status"] == "failed").all()
    assert leakage["reason"].str.contains("the sum of 2 local steps").all()
    assert leakage["psnr_db"].isna().all()
    assert rounds["accuracy"].notna().all()
    assert about["status"] == "finished"
    assert (tmp_path / "leakage_vs_rounds.png").is_file()


def test_batches_and_any_model_are_matched_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net(classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),\n"
        "                         nn.Linear(144, classes))\n"
    )
    options = ["training.share=weights", "strategy.name=FedAvg", "training.batch_size=4"]
    options += ["attack.options.steps=20", f"model.name={file}:net"]
    simulate(load_scenario(None, [*SMALL, *options]), tmp_path / "run")
    leakage, rounds, _ = _tables(tmp_path / "run")
    assert reconstructed(leakage).all(), leakage["reason"].dropna().unique()
    assert len(leakage) == 4 * 3 * 4
    assert leakage["psnr_db"].notna().all()
    # Batch statistics: no chain, and no image stands for itself.
    assert rounds["c_metric"].isna().all()
    assert leakage["predicted_psnr_db"].isna().all()
    assert len(rounds) == 3


def test_all_clients_fail_and_the_run_says_so(tmp_path: Path) -> None:
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    from simulations.client_app import build_client_app

    described = load_scenario(None, SMALL)
    broken = ClientApp()
    broken.query()(build_client_app(lambda context: described))

    @broken.train()
    def train(message: Message, context: object) -> Message:
        raise OSError("out of power")

    simulate(described, tmp_path, client_app=broken)
    leakage, rounds, _ = _tables(tmp_path)
    assert leakage["reason"].str.contains("out of power").all()
    assert (rounds["failures"] == 4).all()
    assert rounds["accuracy"].notna().all()


def test_an_interrupted_run_keeps_its_rounds(tmp_path: Path) -> None:
    def stop(arm: object, progress: Any) -> None:
        if progress.server_round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(load_scenario(None, SMALL), tmp_path, on_progress=stop)
    leakage, rounds, about = _tables(tmp_path)
    assert rounds["round"].tolist() == [1, 2]
    assert len(leakage) == 8
    assert about["status"] == "interrupted"


@pytest.mark.slow
def test_folders_are_not_overwritten_unasked(tmp_path: Path) -> None:
    described = load_scenario(None, [*SMALL, "federation.rounds=1"])
    simulate(described, tmp_path)
    keep = tmp_path / "notes.txt"
    keep.write_text("mine")
    with pytest.raises(InvalidInputError, match="is not empty; choose another with --out"):
        simulate(described, tmp_path)
    simulate(described, tmp_path, overwrite=True)
    assert len(pd.read_csv(tmp_path / "leakage.csv")) == 4
    assert keep.read_text() == "mine"
    # A folder of runs is not a run: what lies below it stays.
    simulate(described, tmp_path / "runs" / "one")
    with pytest.raises(InvalidInputError, match=r"holds no earlier run"):
        simulate(described, tmp_path / "runs", overwrite=True)
    assert (tmp_path / "runs" / "one" / "leakage.csv").is_file()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["federation.clients=5000"], "5000 images"),
        (["data.name=CIFAR10", "data.root=nowhere"], "Three ways out"),
        (["model.name=cnn4-v2"], "does not fit images"),
        (["strategy.options.fraction=3"], "does not take strategy.options"),
        (["strategy.options.min_train_nodes=50"], "is set by the scenario"),
        (["strategy.options.weighted_by_key=foo"], "must be a number"),
        (["attack.device=mps"], "'mps' is not one of"),
    ],
)
def test_what_cannot_run_writes_nothing(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(FedleakError) as caught:
        simulate(load_scenario(None, overrides), tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_starts_the_training(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save(build_model("cnn2-v2", (1, 8, 8), 10, seed=8).state_dict(), good)
    torch.save(build_model("cnn2-v2", (1, 12, 12), 10, seed=8).state_dict(), bad)
    simulate(load_scenario(None, [*SMALL, f"model.weights={good}"]), tmp_path / "run")
    with pytest.raises(InvalidInputError, match="does not fit the model"):
        simulate(load_scenario(None, [*SMALL, f"model.weights={bad}"]), tmp_path / "other")


@pytest.mark.slow
def test_a_killed_run_keeps_its_finished_rows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedleak", "simulate", "--out", str(tmp_path),
               "--set", "federation.rounds=100000"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    table = tmp_path / "rounds.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (table.exists() and len(table.read_text()) > 300):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    leakage, rounds, about = _tables(tmp_path)
    assert len(rounds) >= 3
    assert len(leakage) >= 10 * len(rounds)
    assert about["status"] == "running"


@pytest.mark.ray
@pytest.mark.slow
def test_ray_and_inline_give_the_same_numbers(tmp_path: Path) -> None:
    described = load_scenario("fedavg", ["federation.rounds=2", "defence=noise:0.01"])
    simulate(described, tmp_path / "inline")
    simulate(described, tmp_path / "ray", engine="ray")
    for name, sort in (("leakage.csv", ["round", "client"]), ("rounds.csv", ["round"])):
        frames = []
        for engine in ("inline", "ray"):
            frame = pd.read_csv(tmp_path / engine / name).sort_values(sort, ignore_index=True)
            frames.append(frame.drop(columns=[c for c in frame if c.startswith("seconds")]))
        pd.testing.assert_frame_equal(frames[0], frames[1], rtol=1e-4)


@pytest.mark.ray
@pytest.mark.slow
def test_an_error_on_ray_keeps_its_reason(tmp_path: Path) -> None:
    def stop(arm: object, progress: object) -> None:
        raise ZeroDivisionError("in round 1")

    with pytest.raises(ZeroDivisionError, match="in round 1"):
        simulate(load_scenario(None, SMALL), tmp_path, engine="ray", on_progress=stop)
    assert _tables(tmp_path)[2]["status"] == "failed"


def test_a_server_that_sees_only_the_sum(tmp_path: Path) -> None:
    """One observation for all clients; every image has its row and its client."""
    options = [*SMALL, "federation.rounds=1", "threat.view=sum", "attack.options.steps=20"]
    simulate(load_scenario(None, options), tmp_path)
    leakage, _, about = _tables(tmp_path)
    assert (leakage["status"] == "ok").all(), leakage["reason"].unique()
    assert sorted(leakage["client"]) == [0, 1, 2, 3]
    assert leakage["image"].nunique() == 4
    assert about["scenario"]["threat"]["view"] == "sum"


def test_labels_are_granted_by_the_threat_model_alone(tmp_path: Path) -> None:
    options = [*SMALL, "federation.rounds=1", "defence=noise:3", "attack.options.steps=1"]
    for known in ("false", "true"):
        simulate(load_scenario(None, [*options, f"threat.labels={known}"]), tmp_path / known)
    guessed, told = (_tables(tmp_path / known)[0] for known in ("false", "true"))
    assert (told["label_inferred"] == told["label_true"]).all()
    assert not (guessed["label_inferred"] == guessed["label_true"]).all()


def test_a_server_that_knows_the_defence(tmp_path: Path) -> None:
    options = [*SMALL, "federation.rounds=1", "defence=clip:0.1"]
    for known in ("false", "true"):
        simulate(load_scenario(None, [*options, f"threat.defence={known}"]), tmp_path / known)
    found = [_tables(tmp_path / known)[0]["psnr_db"].mean() for known in ("false", "true")]
    unaware, informed = found  # of one image, the factor of clipping shows by itself
    assert informed > unaware - 0.1
    assert informed > 140


def test_dp_on_single_images_in_a_federation(tmp_path: Path) -> None:
    options = [*SMALL, "federation.rounds=1", "training.batch_size=2", "attack.options.steps=5",
               "defence=dp:clip=1,noise=0.1,examples=2"]  # fmt: skip
    simulate(load_scenario(None, options), tmp_path)
    leakage, rounds, _ = _tables(tmp_path)
    assert rounds["failures"].sum() == 0
    assert set(leakage["strength"]) == {"clip=1,noise=0.1,examples=2"}


def test_epochs_use_the_images_of_the_round_again(tmp_path: Path) -> None:
    options = ["training.share=weights", "strategy.name=FedAvg", "training.local_steps=2"]
    options += ["training.batch_size=3", "training.epochs=3", "attack.options.steps=5"]
    options += ["training.momentum=0.5", "training.weight_decay=0.001"]
    described = load_scenario(None, [*SMALL, *options, "federation.rounds=1"])
    epochs = client_batches(described, 1, 1)
    assert [len(batch) for batch in epochs] == [3] * 6
    passes = [[i for batch in epochs[k : k + 2] for i in batch] for k in (0, 2, 4)]
    assert passes[0] == client_images(described, 1, 1)
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1] != passes[2]
    simulate(described, tmp_path)
    leakage, _, _ = _tables(tmp_path)
    assert len(leakage) == 4 * 6


def test_memory_covers_more_of_a_client_than_rounds_alone(tmp_path: Path) -> None:
    described = load_scenario(
        None,
        ["federation.clients=1", "federation.rounds=3", "data.max_test_images=50",
         "data.max_images=4", "attack.memory=true", "defence=noise:0.2", "threat.defence=true"],
    )  # fmt: skip
    (arm,) = simulate(described, tmp_path / "run")
    coverage = pd.read_csv(arm.out / COVERAGE.file)
    assert tuple(coverage.columns) == COVERAGE.columns
    assert coverage["images"].tolist() == [4] * 3
    assert coverage["used"].tolist() == [1, 2, 3]
    assert (coverage["invented"] == 0).all()
    assert (coverage["twice"] == 0).all()
    leakage, *_ = _tables(arm.out)
    assert (leakage["psnr_together_db"] >= leakage["psnr_db"] - 1e-6).all()
    assert (arm.out / "coverage_vs_rounds.png").read_bytes()[:4] == b"\x89PNG"
    told = covered(arm.out, described)  # as evaluation.csv says it
    last = coverage.iloc[-1]
    assert [told[f"covered_{k}"] for k in (20, 40, 60)] == [
        last[f"together_{k}"] / 4 for k in (20, 40, 60)
    ]
    assert told["invented"] == 0


def test_batches_drawn_anew_repeat_images_before_all_are_used() -> None:
    described = load_scenario(
        None, ["federation.clients=1", "data.max_images=9", "training.batch_size=4",
               "training.draw=anew"],
    )  # fmt: skip
    rounds = [client_images(described, 0, n) for n in range(1, 9)]
    assert all(len(set(used)) == 4 for used in rounds)
    assert len({tuple(sorted(used)) for used in rounds}) > 2
    assert {i for used in rounds for i in used} == set(range(9))


def test_what_was_seen_of_clients_and_used_is_in_table_and_report(tmp_path: Path) -> None:
    """A server that knows of no clipping finds the factor: a note, and no doubt."""
    clipped = ["defence=clip:0.1", "attack.name=linear", "federation.rounds=1"]
    simulate(load_scenario(None, [*SMALL, *clipped]), tmp_path)
    leakage, _, _ = _tables(tmp_path)
    assert (leakage["status"] == "ok").all()
    assert (leakage["fit"] < 1e-4).all()
    assert leakage["notes"].str.contains("times what was declared").all()
    assert leakage["certified"].isna().all()  # this attack proves nothing
    page = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "Seen, and taken into account" in page
    assert "times what was declared" in page
