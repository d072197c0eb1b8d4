"""Defences on their way through Flower."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedleak.defences import DefenceSpec, defend, parse_defence
from simulations.grid import InlineGrid
from strategies import defence_mod

SENT = {"w": np.linspace(-1, 1, 50, dtype=np.float32), "count": np.array(3, np.int64)}
CHANGE = np.linspace(0, 0.1, 50, dtype=np.float32)


def _reply(spec: DefenceSpec, shared: str, server_round: int = 1) -> dict[str, np.ndarray]:
    app = ClientApp()

    @app.train(mods=[defence_mod(spec, shared, seed=3)])  # type: ignore[arg-type]
    def train(message: Message, context: object) -> Message:
        made = {"w": SENT["w"] + CHANGE, "count": np.array(4)}
        if shared == "gradient":
            made = {"w": CHANGE}
        arrays = ArrayRecord({k: Array(v) for k, v in made.items()})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    grid = InlineGrid(app, 1)
    arrays = ArrayRecord({k: Array(v) for k, v in SENT.items()})
    config = ConfigRecord({"server-round": server_round})
    message = Message(RecordDict({"arrays": arrays, "config": config}), 2, "train")
    (reply,) = grid.send_and_receive([message])
    (record,) = reply.content.array_records.values()
    return {k: a.numpy() for k, a in record.items()}


@pytest.mark.parametrize("shared", ["gradient", "weights"])
@pytest.mark.parametrize("name", ["none", "noise", "prune"])
def test_strength_zero_is_bit_identical(shared: str, name: str) -> None:
    expected = CHANGE if shared == "gradient" else SENT["w"] + CHANGE
    assert np.array_equal(_reply(DefenceSpec(name, 0.0), shared)["w"], expected)


def test_weights_are_defended_as_a_change() -> None:
    """Pruning zeroes the change, not the weights; counters pass; dtypes stay."""
    reply = _reply(DefenceSpec("prune", 0.6), "weights")
    expected = defend(
        {"w": torch.from_numpy((SENT["w"] + CHANGE).astype(np.float64) - SENT["w"])},
        DefenceSpec("prune", 0.6),
        0,
    )["w"]
    np.testing.assert_allclose(reply["w"] - SENT["w"], expected.numpy(), atol=1e-6)
    assert (np.abs(reply["w"] - SENT["w"]) < 1e-9).sum() == 30
    assert reply["count"] == 4
    assert {k: v.dtype for k, v in reply.items()} == {"w": np.float32, "count": np.int64}


def test_noise_differs_by_round_and_repeats_by_seed() -> None:
    spec = DefenceSpec("noise", 0.5)
    first, second = _reply(spec, "gradient", 1)["w"], _reply(spec, "gradient", 2)["w"]
    assert not np.array_equal(first, second)
    assert np.array_equal(first, _reply(spec, "gradient", 1)["w"])


@pytest.mark.parametrize("shared", ["gradient", "weights"])
def test_compositions_are_carried(shared: str) -> None:
    """In order: clipped, then pruned, then quantised."""
    spec = parse_defence("clip:0.1+prune:0.5+quantise:4")
    made = _reply(spec, shared)["w"].astype(np.float64)
    if shared == "weights":
        made = made - SENT["w"]
    before = CHANGE if shared == "gradient" else (SENT["w"] + CHANGE).astype(np.float64) - SENT["w"]
    expected = defend({"w": torch.from_numpy(before.astype(np.float64))}, spec, 0)["w"].numpy()
    np.testing.assert_allclose(made, expected, atol=1e-7)
    assert len(np.unique(expected)) <= 15
    assert np.linalg.norm(expected) < 0.11
