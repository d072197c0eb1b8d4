"""The predicted PSNR of what clients send, in whole runs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedleak.errors import InvalidInputError
from fedleak.status import reconstructed
from simulations import prediction, server_app
from simulations.engines import simulate
from simulations.scenario import load_scenario
from simulations.server_app import make_strategy
from strategies import DelegatingStrategy

SMALL = ["federation.clients=3", "federation.rounds=2", "data.max_test_images=20"]


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time of a small run, and others test them."""
    monkeypatch.setattr("fedleak.plots.plot_run", lambda *args: [])


def run(out: Path, *options: str, scenario: str | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return ``leakage.csv`` and ``rounds.csv`` of a small run."""
    simulate(load_scenario(scenario, [*SMALL, *options]), out)
    return pd.read_csv(out / "leakage.csv"), pd.read_csv(out / "rounds.csv")


@pytest.mark.slow
def test_the_demo_is_predicted(tmp_path: Path) -> None:
    """An attacker who knows the defence attains what is predicted, to a few dB."""
    leakage, rounds = run(tmp_path, "threat.defence=true", scenario="demo")
    assert leakage["predicted_psnr_db"].notna().all()
    per = leakage.groupby("defence")[["psnr_db", "predicted_psnr_db"]].median()
    assert per.loc["none", "predicted_psnr_db"] > 130
    for name in ("noise", "prune"):
        assert per.loc[name, "predicted_psnr_db"] < 40
        assert abs(per.loc[name].diff().iloc[1]) < 5
    middle = leakage.groupby(["defence", "round"])["predicted_psnr_db"].median()
    shown = rounds.set_index(["defence", "round"])["predicted_psnr_db"]
    pd.testing.assert_series_equal(middle, shown.sort_index())
    assert (rounds["c_normalised"] == 0).all()
    # The weights of a later round and other images tell something else.
    assert leakage.groupby("defence")["predicted_psnr_db"].nunique().min() == 6


def test_noise_lowers_the_prediction(tmp_path: Path) -> None:
    levels = ("none", "noise:0.01", "noise:0.1", "noise:1")
    found = [
        run(tmp_path / d[-4:], f"defence={d}", "attack.name=linear")[0]["predicted_psnr_db"]
        for d in levels
    ]
    for less, more in pairwise(found):
        assert (less > more).all()


def test_clipping_alone_hides_nothing(tmp_path: Path) -> None:
    """It makes the update small, and the noise that is relative to it."""
    one = ["attack.name=linear", "federation.rounds=1"]
    noise, _ = run(tmp_path / "noise", *one, "defence=noise:0.1")
    clipped, _ = run(tmp_path / "clip", *one, "defence=clip:0.01+noise:0.1")
    names = ["predicted_psnr_db"]
    pd.testing.assert_frame_equal(noise[names], clipped[names], atol=0.3)


def test_clipped_weights_round_as_much_as_they_do(tmp_path: Path) -> None:
    """Clipping makes the change small beside the weights; attack and prediction agree on it."""
    options = ["training.share=weights", "strategy.name=FedAvg", "training.learning_rate=0.5"]
    batch = ["training.batch_size=4", "model.name=cnn2-v1", "federation.rounds=1"]
    leakage, _ = run(tmp_path, *options, *batch, "defence=clip:0.1", "threat.defence=true")
    found = leakage.groupby("client")[["psnr_db", "predicted_psnr_db"]].mean()
    assert found["psnr_db"].min() > 110
    assert found.diff(axis=1)["predicted_psnr_db"].abs().max() < 8


def test_one_step_is_a_gradient(tmp_path: Path) -> None:
    """Shared weights are rounded at their own size, and nothing else is lost."""
    options = ["training.share=weights", "strategy.name=FedAvg"]
    weights, _ = run(tmp_path / "weights", *options)
    gradient, _ = run(tmp_path / "gradient")
    lost = gradient["predicted_psnr_db"] - weights["predicted_psnr_db"]
    assert lost.between(0, 60).all()
    assert weights["predicted_psnr_db"].min() > 80
    noisy = [
        run(tmp_path / f"{i}", *own, "defence=noise:0.1", "attack.name=linear")[0]
        for i, own in enumerate((options, []))
    ]
    first = [t[t["round"] == 1]["predicted_psnr_db"] for t in noisy]
    pd.testing.assert_series_equal(*first, atol=0.1)


def test_batches_and_sums(tmp_path: Path) -> None:
    """The images of a batch stand in each other's way; a sum of clients is a batch."""
    quick = ["attack.options.steps=1", "federation.rounds=1"]
    alone, _ = run(tmp_path / "alone", *quick)
    batch, _ = run(tmp_path / "batch", *quick, "training.batch_size=4")
    total, _ = run(tmp_path / "sum", *quick, "threat.view=sum")
    assert batch["predicted_psnr_db"].notna().all()
    assert batch["predicted_psnr_db"].median() < alone["predicted_psnr_db"].median()
    assert total["predicted_psnr_db"].notna().all()
    hidden, _ = run(tmp_path / "hidden", *quick, "threat.view=sum", "defence=noise:0.1")
    assert hidden["predicted_psnr_db"].isna().all()


@pytest.mark.parametrize(
    "options",
    [
        ["training.share=weights", "strategy.name=FedAvg", "training.local_steps=2"],
        ["training.share=weights", "strategy.name=FedAvg", "training.epochs=2"],
        ["metric.predict=none"],
        ["training.batch_size=2", "defence=dp:clip=1,noise=0.1,examples=2"],
    ],
    ids=["steps", "epochs", "none", "examples"],
)
def test_empty_where_it_is_not_defined(tmp_path: Path, options: list[str]) -> None:
    leakage, rounds = run(tmp_path, *options, "attack.options.steps=1")
    assert reconstructed(leakage).all(), leakage["reason"].unique()
    assert leakage["predicted_psnr_db"].isna().all()
    assert rounds["predicted_psnr_db"].isna().all()
    assert len(rounds) == 2


def test_a_failing_metric_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> None:
        raise ArithmeticError("no convergence")

    monkeypatch.setattr(prediction, "predict", broken)
    caplog.set_level("WARNING", "flwr")  # the command line of other tests quiets it
    leakage, rounds = run(tmp_path)
    assert (leakage["status"] == "ok").all()
    assert leakage["predicted_psnr_db"].isna().all()
    assert len(rounds) == 2
    assert sum("no convergence" in r.getMessage() for r in caplog.records) == 1


def test_large_images_are_predicted_for_one_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ["attack.name=linear"]
    monkeypatch.setattr(prediction, "EVERY_CLIENT", 63)
    some, _ = run(tmp_path / "some", *quick)
    assert some.groupby("round")["predicted_psnr_db"].count().tolist() == [1, 1]
    every, _ = run(tmp_path / "all", *quick, "metric.predict=all")
    assert every["predicted_psnr_db"].notna().all()
    monkeypatch.setattr(prediction, "DENSE_PREDICTION", 63)
    assert run(tmp_path / "none", *quick)[0]["predicted_psnr_db"].isna().all()


def test_the_prior_of_the_images() -> None:
    """The metric's own, else the attack's, else that of natural images."""
    given = ["attack.options.prior_options={sigma = 0.4}"]
    for options, sigma in (([], 0.25), (given, 0.4),
                           ([*given, "metric.prior_options={sigma = 0.1}"], 0.1)):  # fmt: skip
        made = prediction.UpdatePrediction(load_scenario(None, options), lambda _: ArrayRecord())
        assert made.prior.options["sigma"] == sigma
    with pytest.raises(InvalidInputError, match="does not take"):
        load_scenario(None, ["metric.prior_options={sgima = 1}"])
    with pytest.raises(InvalidInputError, match=r"metric\.predict"):
        load_scenario(None, ["metric.predict=always"])


class _Muted(DelegatingStrategy):
    """Sends the first client twice the weights, and others none at all."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        state = arrays.to_torch_state_dict()
        made = [ArrayRecord({k: factor * v for k, v in state.items()}) for factor in (2.0, 0.0)]
        for n, message in enumerate(messages):
            (name,) = message.content.array_records
            message.content = RecordDict({**message.content, name: made[min(n, 1)]})
        return messages


def test_judged_is_what_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that a wrapper changes: c(M) is that of what most clients got, each has its own."""
    quick = ["attack.name=linear", "federation.rounds=1", "data.size=8"]
    honest, rounds = run(tmp_path / "honest", *quick)
    monkeypatch.setattr(
        server_app, "make_strategy", lambda scenario: _Muted(make_strategy(scenario))
    )
    sent, other = run(tmp_path / "sent", *quick)
    assert other["c_metric"][0] < rounds["c_metric"][0]  # nothing comes through zeros
    before, after = honest["predicted_psnr_db"].to_numpy(), sent["predicted_psnr_db"].to_numpy()
    assert after[0] > 60  # the one with weights
    assert (after[1:] < 20).all()
    assert (before > 60).all()
    assert after[0] != before[0]
    measured = sent["psnr_db"].to_numpy()
    assert measured[0] > 60 > measured[1:].max()
