"""Which replies are left out: by what was sent and by the majority, never by which came first."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedleak.errors import InvalidInputError
from simulations.grid import InlineGrid
from strategies import RejectInvalid

SENT = {"w": np.ones((2, 3), np.float32), "steps": np.array(5, np.int64)}
Reply = tuple[dict[str, np.ndarray], dict[str, Any]]


def honest(value: float = 2.0) -> Reply:
    arrays = {"w": np.full((2, 3), value, np.float32), "steps": np.array(6, np.int64)}
    return arrays, {"num-examples": 1, "train_loss": 0.5}


def w(value: Any) -> Callable[[], Reply]:
    return lambda: ({**honest()[0], "w": np.asarray(value)}, honest()[1])


def metrics(**changes: Any) -> Callable[[], Reply]:
    renamed = {name.replace("_", "-") if name == "num_examples" else name: v
               for name, v in changes.items()}  # fmt: skip
    return lambda: (honest()[0], {**honest()[1], **renamed})


def run(replies: list[Reply], **options: Any) -> tuple[RejectInvalid, dict[str, np.ndarray]]:
    strategy = RejectInvalid(
        FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0), **options
    )
    grid = InlineGrid(ClientApp(), len(replies))
    current = ArrayRecord({name: Array(v) for name, v in SENT.items()})
    asked = sorted(
        strategy.configure_train(1, current, ConfigRecord(), grid),
        key=lambda message: message.metadata.dst_node_id,
    )
    got = [_message(message, *reply) for message, reply in zip(asked, replies, strict=True)]
    arrays, _ = strategy.aggregate_train(1, got)
    return strategy, {} if arrays is None else {n: a.numpy() for n, a in arrays.items()}


def _message(to: Message, arrays: dict[str, np.ndarray], metric: dict[str, Any]) -> Message:
    record = ArrayRecord({name: Array(v) for name, v in arrays.items()})
    content = RecordDict({"arrays": record, "metrics": MetricRecord(metric)})
    return Message(content, reply_to=to)


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize(
    "hostile",
    [
        w(np.full((2, 3), 2, np.longdouble)),
        w(np.full((2, 3), 2, np.float16)),
        w(np.full((2, 3), 2, ">f4")),
        w(np.full((2, 3), 2, np.float64)),
        w(np.full((2, 3), 2, np.int8)),
        w(np.full((2, 3), True)),
        w(np.full((3, 2), 2, np.float32)),
        w(np.full((2, 3), np.nan, np.float32)),
        w(np.full((2, 3), 1e30, np.float32)),
        w(np.full((2, 3), -3e6, np.float32)),
        metrics(x=1.0),
        metrics(train_loss=[0.5, 0.5]),
        metrics(num_examples=2**62),
        metrics(num_examples=0),
        metrics(num_examples=float("nan")),
        metrics(num_examples=[1]),
        lambda: ({"w": honest()[0]["w"]}, honest()[1]),
        lambda: ({**honest()[0], "more": np.zeros(1, np.float32)}, honest()[1]),
    ],
)  # fmt: skip
def test_one_hostile_reply_costs_itself_alone_wherever_it_comes(
    hostile: Callable[[], Reply], place: int
) -> None:
    replies = [honest(value) for value in (1.0, 2.0, 3.0)]
    replies.insert(place, hostile())
    strategy, average = run(replies)
    assert strategy.accepted == 3
    np.testing.assert_allclose(average["w"], 2.0)


def test_a_type_that_most_have_is_right() -> None:
    """Clients that clip or add noise may all return float64."""
    wide = w(np.full((2, 3), 3.0))()
    strategy, average = run([honest(), wide, wide])
    assert strategy.accepted == 2
    np.testing.assert_allclose(average["w"], 3.0)


def test_but_no_majority_makes_a_type_that_torch_has_not() -> None:
    strategy, _ = run([honest(), *[w(np.full((2, 3), 3, np.longdouble))()] * 2])
    assert strategy.accepted == 1


@pytest.mark.parametrize("first", [True, False])
def test_of_two_the_one_nearest_to_what_was_sent(first: bool) -> None:
    wide = w(np.full((2, 3), 3.0))()
    strategy, average = run([wide, honest(2.0)] if first else [honest(2.0), wide])
    assert strategy.accepted == 1
    np.testing.assert_allclose(average["w"], 2.0)


def test_the_bound_is_a_choice() -> None:
    large = w(np.full((2, 3), 3e6, np.float32))()
    assert run([large], bound=1e7)[0].accepted == 1
    assert run([large])[0].accepted == 0
    with pytest.raises(InvalidInputError, match="bound"):
        RejectInvalid(FedAvg(), bound=0)


def test_a_node_counts_once_and_only_if_asked() -> None:
    strategy = RejectInvalid(FedAvg(min_train_nodes=1, min_available_nodes=1))
    grid = InlineGrid(ClientApp(), 2)
    current = ArrayRecord({name: Array(v) for name, v in SENT.items()})
    one, two = strategy.configure_train(1, current, ConfigRecord(), grid)
    stranger = _message(two, *honest(9.0))
    stranger.metadata.__dict__["_src_node_id"] = 12345
    got = [_message(one, *honest(1.0)), _message(one, *honest(9.0)), stranger]
    arrays, _ = strategy.aggregate_train(1, [*got, _message(two, *honest(3.0))])
    assert strategy.accepted == 2
    assert arrays is not None
    np.testing.assert_allclose(arrays["w"].numpy(), 2.0)
