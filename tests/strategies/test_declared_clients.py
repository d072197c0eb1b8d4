"""Clients that declare what they do: live, from a capture, and simulated, with the same words."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedleak import LocalTraining, make_attack
from fedleak.capture import Capture
from fedleak.capture.update import load_sent
from fedleak.client import train
from fedleak.errors import InvalidInputError
from fedleak.models import build_model
from fedleak.quality import score_batch
from simulations.client_app import build_client_app
from simulations.grid import InlineGrid
from simulations.partition import client_images, training_data
from simulations.scenario import flatten, from_run_config, make_scenario
from simulations.task import make_model
from strategies import Leak, MaliciousServer
from tests.fedleak.test_client import SHAPE, digits

Declared = Callable[[int], LocalTraining]


def make() -> nn.Module:
    return build_model("cnn2-v1", SHAPE, 10, seed=0)


def app(
    declared: Declared, images: Callable[[int], tuple[Tensor, Tensor]], *mods: Mod
) -> ClientApp:
    client = ClientApp(mods=list(mods))

    @client.train()
    def fit(message: Message, context: Context) -> Message:
        model = make()
        state = message.content["arrays"].to_torch_state_dict()
        model.load_state_dict(state)
        config = message.content["config"]
        training = declared(int(config["server-round"]))
        x, y = images(int(context.node_config["partition-id"]))
        train(model, [(x, y)], training)
        new = model.state_dict()
        if training.reply == "change":
            new = {n: t - state[n] for n, t in new.items()}
        content = {"arrays": ArrayRecord(new), "metrics": MetricRecord({"num-examples": len(x)})}
        return Message(RecordDict(content), reply_to=message)

    return client


def leaks(
    declared: Declared, own: Callable[[int], tuple[Tensor, Tensor]], rounds: int = 1,
    config: dict[str, float] | None = None, **server: Any,
) -> tuple[list[Leak], list[float]]:  # fmt: skip
    found: list[Leak] = []
    strategy = MaliciousServer(FedAvg(fraction_evaluate=0.0), make, SHAPE, on_leak=found.append,
                               **server)  # fmt: skip
    strategy.start(
        grid=InlineGrid(app(declared, own), 2),
        initial_arrays=ArrayRecord(make().state_dict()),
        num_rounds=rounds,
        train_config=ConfigRecord(config or {}),
    )
    psnr = []
    for leak in found:
        assert leak.reconstruction is not None, leak.reason
        x, y = own(leak.nodes[0] - 2)
        scored = score_batch(leak.reconstruction.images, leak.reconstruction.labels, x, y)
        psnr += [one.quality.psnr_db for one in scored if one.quality is not None]
    return found, psnr


def four(client: int) -> tuple[Tensor, Tensor]:
    return digits(*range(4 * client, 4 * client + 4))


def test_another_number_of_images_than_was_declared_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    told = LocalTraining(0.1, 4)
    for declared, times in ((4, 0), (8, 1)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="flwr"):
            leaks(lambda _: told, four, training=told, num_images=declared)
        said = [m for m in caplog.messages if "num-examples says 4 images, num_images 8" in m]
        assert len(said) == times


def test_a_learning_rate_that_falls() -> None:
    rates = (0.1, 0.05, 0.025)

    def declared(server_round: int) -> LocalTraining:
        return LocalTraining(rates[server_round - 1], 4)

    _, found = leaks(declared, four, 3, training=LocalTraining(rates, 4), num_images=4)
    assert len(found) == 24
    assert min(found) > 110


def test_a_learning_rate_of_the_message_and_unequal_clients() -> None:
    def images(client: int) -> tuple[Tensor, Tensor]:
        return four(0) if client else digits(5)

    def declared(server_round: int) -> LocalTraining:
        return LocalTraining(0.05, 4)

    asked = []

    def count(server_round: int, node: int, config: Any) -> int:
        asked.append((server_round, dict(config)["lr"]))
        return 4 if node - 2 else 1

    _, found = leaks(
        declared, images, config={"lr": 0.05}, training=LocalTraining("lr", 4), num_images=count
    )
    assert len(found) == 5
    assert min(found) > 115
    assert asked == [(1, 0.05)] * 2


def test_clients_that_differ() -> None:
    """Each says its own loss; one replies with changes would be another app's."""

    def declared(server_round: int) -> LocalTraining:
        return LocalTraining(0.1, 4, loss="cross-entropy:label_smoothing=0.1", mean=0.5, std=0.5)  # type: ignore[arg-type]

    def training(server_round: int, node: int, config: Any) -> LocalTraining:
        return declared(server_round)

    found, psnr = leaks(declared, four, training=training, num_images=4)
    assert min(psnr) > 110
    for leak in found:
        assert leak.reconstruction is not None
        assert float(leak.reconstruction.images.min()) > -0.01


@pytest.mark.parametrize(
    "client",
    [
        LocalTraining(0.1, 4, loss="cross-entropy:label_smoothing=0.1", mean=(0.5,), std=(0.5,)),
        LocalTraining(0.1, 4, reply="change", loss="bce"),
        pytest.param(
            LocalTraining(0.1, 4, optimiser="adam", loss="cross-entropy:reduction=sum"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["smoothed", "change", "adam"],
)
def test_a_capture_says_it_too(client: LocalTraining, tmp_path: Path) -> None:
    """What is attacked later is what was attacked live."""
    found, _ = leaks(
        lambda r: client, four, training=client, num_images=4, capture=tmp_path / "seen"
    )
    capture = Capture(tmp_path / "seen", "cnn2-v1")
    updates = [capture.update(name) for name in capture.names()]
    assert [u.training for u in updates] == [client] * 2
    model = load_sent(make(), updates[0].sent)
    again = make_attack("hybrid")([u.observe(model) for u in updates])
    for leak, result in zip(found, again, strict=True):
        assert leak.reconstruction is not None
        assert torch.equal(leak.reconstruction.images, result.images)


@pytest.mark.parametrize(
    "training",
    [
        {"loss": "cross-entropy:label_smoothing=0.1", "mean": [0.5], "std": 0.5, "batch_size": 4},
        {"loss": "bce", "share": "weights", "learning_rate": [0.1, 0.05]},
        {"share": "weights", "optimiser": "adamw:weight_decay=0.1", "learning_rate": 0.01},
    ],
)
def test_scenarios_say_it(training: dict[str, Any]) -> None:
    share = training.get("share", "gradient")
    described = make_scenario(
        {
            "training": training,
            "model": {"name": "cnn2-v1"},
            "federation": {"clients": 2, "rounds": 2},
            "strategy": {"name": "FedAvg" if share == "weights" else "FedSGD"},
        }
    )
    assert from_run_config(flatten(described)) == described
    found: list[Leak] = []
    count = described.training.images
    strategy = MaliciousServer(
        FedAvg(fraction_evaluate=0.0), make_model(described), SHAPE,
        training=described.training.local, num_images=count, on_leak=found.append,
    )  # fmt: skip
    client = build_client_app(lambda context: described)
    strategy.start(
        grid=InlineGrid(client, 2),
        initial_arrays=ArrayRecord(make_model(described).state_dict()),
        num_rounds=2 if share == "weights" else 1,
    )
    least = 20 if "optimiser" in training else 110
    for leak in found:
        assert leak.reconstruction is not None, leak.reason
        places = client_images(described, leak.nodes[0] - 2, leak.server_round)
        x, y = training_data(described).batch(places)
        scored = score_batch(leak.reconstruction.images, leak.reconstruction.labels, x, y)
        assert all(one.quality is not None and one.quality.psnr_db > least for one in scored)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"loss": "cross-entrophy"}, "did you mean 'cross-entropy'"),
        ({"mean": "0.5"}, "must both be given"),
        ({"learning_rate": "0.1/0.05"}, "one for each round"),
        ({"share": "weights", "learning_rate": "fast"}, "no number"),
        ({"share": "weights", "learning_rate": 0}, "above 0"),
        ({"optimiser": "adam", "share": "weights", "momentum": 0.9}, "sgd:momentum"),
    ],
)
def test_what_a_scenario_cannot_mean_is_refused(training: dict[str, Any], message: str) -> None:
    strategy = "FedAvg" if training.get("share") == "weights" else "FedSGD"
    with pytest.raises(InvalidInputError, match=message):
        make_scenario({"training": training, "strategy": {"name": strategy}})
