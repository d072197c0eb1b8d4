"""Wrapping: what is read from the wrapper and written to it is the wrapped strategy's."""

import copy
import pickle
from functools import partial
from typing import Any

import flwr.server.strategy as old
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
)

from fedleak import LocalTraining
from fedleak.errors import InvalidInputError
from simulations.grid import InlineGrid
from strategies import DelegatingStrategy, MaliciousServer, RejectInvalid


def attacker(strategy: Any) -> MaliciousServer:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    return MaliciousServer(strategy, model, (1, 2, 2), training=LocalTraining(0.1))


def test_writes_reach_the_wrapped_strategy() -> None:
    inner = FedAvgM(server_learning_rate=1.0)
    wrapper = attacker(RejectInvalid(inner))
    wrapper.server_learning_rate = 0.25
    wrapper.something_new = 3
    assert (inner.server_learning_rate, inner.something_new) == (0.25, 3)
    assert wrapper.something_new == 3


def test_own_attributes_stay_the_wrappers() -> None:
    """Also where a strategy has one of the same name."""
    inner: Any = FedAvg()
    inner.model, inner.every = "the app's own", 7
    wrapper = attacker(inner)
    wrapper.every = 2
    assert (inner.model, inner.every) == ("the app's own", 7)
    assert wrapper.every == 2
    assert isinstance(wrapper.model, torch.nn.Module)


def _unpickled(wrapper: Any) -> Any:
    return pickle.loads(pickle.dumps(wrapper))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, _unpickled])
def test_copies_write_to_their_own_strategy(again: Any) -> None:
    wrapper = DelegatingStrategy(FedAvg(fraction_train=0.5))
    twin = again(wrapper)
    twin.fraction_train = 0.25
    assert twin.strategy.fraction_train == 0.25
    assert wrapper.fraction_train == (0.25 if again is copy.copy else 0.5)


@pytest.mark.parametrize("make", [FedAdam, partial(FedAvgM, server_momentum=0.5)])
def test_an_app_that_sets_the_state_gets_what_it_gets_without_a_wrapper(make: Any) -> None:
    """As Flower's own tests of FedOpt and FedAvgM do."""

    def step(strategy: Any) -> list[np.ndarray]:
        grid = InlineGrid(ClientApp(), 2)
        sent = ArrayRecord({"w": Array(np.zeros((2, 2), np.float32))})
        messages = list(strategy.configure_train(1, sent, ConfigRecord(), grid))
        state = {"w": np.full((2, 2), 5.0, np.float32)}
        strategy.current_arrays = state if make is FedAdam else ArrayRecord(list(state.values()))
        strategy.eta = strategy.server_learning_rate = 0.5
        replies = []
        for message in messages:
            arrays = ArrayRecord({"w": Array(np.ones((2, 2), np.float32))})
            content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
            replies.append(Message(RecordDict(content), reply_to=message))  # type: ignore[arg-type]
        arrays, _ = strategy.aggregate_train(1, replies)
        return [a.numpy() for a in arrays.values()]

    def fresh() -> Any:
        return make(min_train_nodes=1, min_available_nodes=1)

    plain, wrapped = step(fresh()), step(DelegatingStrategy(fresh()))
    np.testing.assert_array_equal(plain, wrapped)
    assert not np.array_equal(plain[0], np.ones((2, 2)))


def _outcome(strategy: Any, arrays: list[dict[str, Any]], state: Any = None) -> Any:
    """Aggregate replies that no round asked for, as Flower's own tests do."""
    if state is not None:
        strategy.current_arrays = state
    replies = []
    for n, one in enumerate(arrays):
        record = ArrayRecord({name: Array(np.asarray(value)) for name, value in one.items()})
        content = {"arrays": record, "metrics": MetricRecord({"num-examples": n + 1})}
        asked = Message(RecordDict(), n + 2, "train")
        replies.append(Message(RecordDict(content), reply_to=asked))  # type: ignore[arg-type]
    try:
        made, metrics = strategy.aggregate_train(1, replies)
    except Exception as error:
        return type(error), str(error)
    if made is None:
        return None
    return {k: (v.numpy().shape, v.numpy().tobytes()) for k, v in made.items()}, metrics


@pytest.mark.parametrize(
    "make",
    [FedAdagrad, FedAdam, FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, FedYogi,
     partial(Krum, num_malicious_nodes=1), partial(MultiKrum, num_malicious_nodes=1)],
)  # fmt: skip
def test_replies_of_any_shape_end_as_without_a_wrapper(make: Any) -> None:
    """Scalars, no state, fewer replies than a strategy needs, other names: its own result or error.

    What the attacker makes of such replies, which fit no model of his, is no one's business.
    """
    InlineGrid(ClientApp(), 1)  # messages have a sender then
    same: list[dict[str, Any]] = [{"w": np.full((2, 2), float(n)), "s": float(n)} for n in range(7)]
    zeros: Any = {"w": np.zeros((2, 2)), "s": np.array(0.0)}
    if make is FedAvgM:
        zeros = ArrayRecord({k: Array(v) for k, v in zeros.items()})
    cases: list[list[dict[str, Any]]] = [same, same[:2], [], [*same[:6], {"other": 1.0}]]
    for replies in cases:
        for state in (None, zeros):
            plain = _outcome(make(), replies, state)
            assert _outcome(attacker(make()), replies, state) == plain
    assert _outcome(attacker(make()), same, zeros) is not None


def test_what_cannot_be_wrapped_is_refused_at_once() -> None:
    with pytest.raises(InvalidInputError, match="not a class: write FedAvg"):
        attacker(FedAvg)
    with pytest.raises(InvalidInputError, match="old API"):
        attacker(old.FedAvg())
    with pytest.raises(InvalidInputError, match=r"flwr\.serverapp\.strategy"):
        attacker("FedAvg")
