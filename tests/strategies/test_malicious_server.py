"""The attacker sees everything, changes nothing and breaks nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from fedleak.attacks import LinearAttack, Reconstruction
from fedleak.client.training import LocalTraining
from fedleak.errors import InvalidInputError
from fedleak.observation import Observation
from fedleak.quality import score
from fedleak.threat import ThreatModel
from simulations.client_app import build_client_app
from simulations.grid import InlineGrid, OrderedGrid
from simulations.partition import client_batches, training_data
from simulations.scenario import Scenario, make_scenario
from simulations.server_app import make_strategy
from simulations.task import make_model
from strategies import DelegatingStrategy, FedSGD, Leak, MaliciousServer, RejectInvalid
from strategies.declared import named

CLIENTS = 4
SHAPE = (1, 8, 8)


def scenario(strategy: str = "FedAvg", **options: Any) -> Scenario:
    share = "gradient" if strategy == "FedSGD" else "weights"
    return make_scenario(
        {
            "federation": {"clients": CLIENTS, "rounds": 3, "fraction": 0.75},
            "training": {"share": share},
            "model": {"name": "cnn2-v1"},
            "strategy": {"name": strategy, "options": options},
        }
    )


def train(
    described: Scenario, strategy: Strategy, client_app: ClientApp | None = None
) -> ArrayRecord:
    """Run the federation, in this process, and return the final arrays."""
    app = client_app or build_client_app(lambda context: described)
    grid = OrderedGrid(InlineGrid(app, CLIENTS), CLIENTS, seed=7)
    initial = ArrayRecord(make_model(described).state_dict())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    return strategy.start(grid, initial, num_rounds=3).arrays


def attacker(described: Scenario, strategy: Strategy, **changes: Any) -> MaliciousServer:
    arguments: dict[str, Any] = {
        "attack": LinearAttack(),
        "training": described.training.local,
        "input_shape": SHAPE,
    }
    return MaliciousServer(strategy, make_model(described), **{**arguments, **changes})


def same(a: ArrayRecord, b: ArrayRecord) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[k].numpy(), b[k].numpy()) for k in a)


class _Greedy:
    """Draws from every generator and overwrites what it was given."""

    def __call__(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        random.random()
        np.random.rand(3)
        torch.rand(3)
        for o in observations:
            for value in o.gradient.values():
                value.fill_(99.0)
            for parameter in o.model.parameters():
                parameter.data.fill_(99.0)
        raise RuntimeError("and then it breaks")


@pytest.mark.parametrize("attack", [LinearAttack(), _Greedy()])
@pytest.mark.parametrize(
    "name",
    ["FedSGD", "FedAvg", "FedProx", "FedAdam", "FedAdagrad", "FedYogi", "FedAvgM", "FedMedian",
     "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "QFedAvg"],
)  # fmt: skip
def test_training_is_bit_identical_with_and_without(name: str, attack: Any) -> None:
    described = scenario(name)
    leaks: list[Leak] = []
    without = train(described, make_strategy(described))
    with_it = attacker(described, make_strategy(described), attack=attack, on_leak=leaks.append)
    assert same(train(described, with_it), without)
    assert len(leaks) == 9
    assert {leak.status for leak in leaks} == {"failed" if isinstance(attack, _Greedy) else "ok"}


def test_a_strategy_that_draws_is_not_shifted() -> None:
    """The attack draws from every generator; a random strategy must not notice."""

    class Dice(flower.FedAvg):
        drawn: ClassVar[list[float]] = []

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            self.drawn += [random.random(), float(np.random.rand()), torch.rand(1).item()]
            return super().aggregate_train(server_round, replies)

    described = scenario()
    draws = []
    for wrap in (False, True):
        Dice.drawn = []
        strategy: Strategy = Dice(fraction_train=0.75, fraction_evaluate=0.0)
        train(described, attacker(described, strategy, attack=_Greedy()) if wrap else strategy)
        draws.append(Dice.drawn)
    assert draws[0] == draws[1]


def test_wrapping_draws_nothing() -> None:
    """An app that makes its first weights after the strategy makes the same ones."""

    def make() -> torch.nn.Module:
        random.random(), np.random.rand()
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    states = []
    for wrap in (False, True):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        if wrap:
            MaliciousServer(FedSGD(), make, SHAPE)
        states.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert states[0] == states[1]


def test_a_strategy_with_a_loop_of_its_own() -> None:
    class Own(flower.FedAvg):
        rounds_seen = 0

        def start(self, *args: Any, **kwargs: Any) -> flower.Result:
            result = super().start(*args, **kwargs)
            self.rounds_seen = 3
            return result

    described = scenario()
    leaks: list[Leak] = []
    inner = Own(fraction_train=0.75, fraction_evaluate=0.0)
    wrapped = attacker(described, inner, on_leak=leaks.append)
    result = train(described, wrapped)
    assert (len(leaks), wrapped.rounds_seen) == (9, 3)
    assert same(result, train(described, Own(fraction_train=0.75, fraction_evaluate=0.0)))
    assert "configure_train" not in vars(inner)


@pytest.mark.parametrize("name", ["FedSGD", "FedAvg"])
def test_it_sees_what_the_client_used(name: str) -> None:
    """The reconstruction is the image that the client drew from its partition."""
    described = scenario(name)
    leaks: list[Leak] = []
    train(described, attacker(described, make_strategy(described), on_leak=leaks.append))
    images = training_data(described)
    for leak in leaks:
        assert leak.reconstruction is not None
        client = leak.nodes[0] - 2  # the inline grid's numbering
        truth, label = images.batch(client_batches(described, client, leak.server_round)[0])
        assert score(leak.reconstruction.images[0], truth[0]).psnr_db > 60
        assert leak.reconstruction.labels.tolist() == label.tolist()


Wreck = Callable[[RecordDict], None]


def _set(name: str, value: np.ndarray) -> Wreck:
    def change(content: RecordDict) -> None:
        (arrays,) = content.array_records.values()
        arrays[name] = Array(value)

    return change


def _empty(content: RecordDict) -> None:
    for key in list(content.array_records):
        content[key] = ArrayRecord()


def _metric(name: str, value: Any) -> Wreck:
    def change(content: RecordDict) -> None:
        (metrics,) = content.metric_records.values()
        metrics[name] = value

    return change


def _no_examples(content: RecordDict) -> None:
    (metrics,) = content.metric_records.values()
    del metrics["num-examples"]


def _renamed(content: RecordDict) -> None:
    content["other"] = content.pop("arrays")


def _undecodable(content: RecordDict) -> None:
    (arrays,) = content.array_records.values()
    arrays["fc.bias"] = Array("float32", (10,), "numpy.ndarray", b"no array")


def _raise(content: RecordDict) -> None:
    raise OSError("the client's disk is full")


@pytest.mark.parametrize(
    ("wreck", "reason"),
    [
        (_set("fc.bias", np.full(10, np.nan, np.float32)), "NaN or infinite"),
        (_set("fc.bias", np.zeros(3, np.float32)), r"shape (3,)"),
        (_empty, "holds no arrays"),
        (_raise, "the client's disk is full"),
    ],
)
@pytest.mark.parametrize("name", ["FedAvg", "FedSGD"])
def test_a_broken_client_does_not_end_the_round(name: str, wreck: Wreck, reason: str) -> None:
    leaks, result = _with_one_wrecked(scenario(name), wreck)
    assert all(np.isfinite(a.numpy()).all() for a in result.values())
    failed = [leak for leak in leaks if leak.status == "failed"]
    assert failed
    assert {leak.nodes for leak in failed} == {(3,)}
    assert all(reason in leak.reason for leak in failed)
    assert len(leaks) == 9


@pytest.mark.parametrize(
    "wreck",
    [
        _undecodable,
        _set("fc.bias", np.array(["text"] * 10)),
        _set("fc.bias", np.zeros(10, np.complex64)),
        _metric("num-examples", float("nan")),
        _metric("num-examples", -3),
        _metric("num-examples", [1, 2]),
        _metric("surprise", 1),
        _no_examples,
        _renamed,
    ],
)
@pytest.mark.parametrize("name", ["FedAvg", "FedSGD"])
def test_a_hostile_reply_does_not_end_the_round(name: str, wreck: Wreck) -> None:
    """Whatever one client sends, the others train on and their rows are there."""
    leaks, result = _with_one_wrecked(scenario(name), wreck)
    assert all(np.isfinite(a.numpy()).all() for a in result.values())
    assert len(leaks) == 9
    assert all(leak.status == "ok" for leak in leaks if leak.nodes != (3,))


def _with_one_wrecked(described: Scenario, wreck: Wreck) -> tuple[list[Leak], ArrayRecord]:
    app = build_client_app(lambda context: described)

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 1 and message.metadata.message_type == "train":
            wreck(reply.content)
        return reply

    broken = ClientApp(mods=[mod])
    broken.train()(app)
    broken.query()(app)
    leaks: list[Leak] = []
    names = [n for n, _ in make_model(described).named_parameters()]
    checked = RejectInvalid(make_strategy(described), names)
    result = train(described, attacker(described, checked, on_leak=leaks.append), broken)
    return leaks, result


def test_a_client_that_never_replies() -> None:
    described = scenario()

    class Deaf(InlineGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            replies = list(super().send_and_receive(messages, timeout=timeout))
            return [
                r
                for r in replies
                if r.metadata.src_node_id != 3 or r.metadata.message_type != "train"
            ]

    leaks: list[Leak] = []
    strategy = attacker(described, make_strategy(described), on_leak=leaks.append)
    app = build_client_app(lambda context: described)
    grid = OrderedGrid(Deaf(app, CLIENTS), CLIENTS, seed=7)
    strategy.start(grid, ArrayRecord(make_model(described).state_dict()), num_rounds=3)
    assert {(x.nodes, x.reason) for x in leaks if x.reason} == {((3,), "the client did not reply")}


def test_plain_lists_of_arrays_are_named_after_the_model() -> None:
    """NumPyClient-style apps send arrays called "0", "1", ..."""
    model = make_model(scenario())
    names = named(
        {str(i): v for i, v in enumerate(model.state_dict().values())}, model.state_dict()
    )
    assert list(names) == list(model.state_dict())


def test_an_app_that_sends_plain_lists_is_attacked() -> None:
    """Both ways without names, as ``ArrayRecord([ndarray, ...])``."""
    described = scenario()
    app = build_client_app(lambda context: described)
    names = list(make_model(described).state_dict())

    def unnamed(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type != "train":
            return call_next(message, context)
        record = message.content["arrays"]
        message.content["arrays"] = ArrayRecord(dict(zip(names, record.values(), strict=True)))
        reply = call_next(message, context)
        arrays = [a.numpy() for a in reply.content["arrays"].values()]
        reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    plain = ClientApp(mods=[unnamed])
    plain.train()(app)
    plain.query()(app)
    leaks: list[Leak] = []
    strategy = attacker(described, make_strategy(described), on_leak=leaks.append)
    grid = OrderedGrid(InlineGrid(plain, CLIENTS), CLIENTS, seed=7)
    values = [v.numpy() for v in make_model(described).state_dict().values()]
    strategy.start(grid, ArrayRecord(values), num_rounds=2)
    assert len(leaks) == 6
    assert max(leak.reconstruction.fit for leak in leaks if leak.reconstruction) < 1e-4
    assert all(leak.status == "ok" for leak in leaks), leaks[0].reason


def test_every_nth_round_and_some_clients() -> None:
    described = scenario()
    leaks: list[Leak] = []
    strategy = attacker(
        described, make_strategy(described), every=2, max_clients=2, on_leak=leaks.append
    )
    train(described, strategy)
    assert [leak.server_round for leak in leaks] == [1, 1, 2, 2]


def test_a_listener_that_raises_is_survived() -> None:
    def full_disk(leak: Leak) -> None:
        raise OSError("no space left")

    described = scenario()
    with_it = train(described, attacker(described, make_strategy(described), on_leak=full_disk))
    assert same(with_it, train(described, make_strategy(described)))


def test_bad_settings() -> None:
    described = scenario()
    for changes, words in (
        ({"threat": ThreatModel(labels=True)}, "name them by labels_of"),
        ({"threat": ThreatModel(defence=True)}, "name it by defence"),
        ({"every": 0}, "every"),
        ({"input_shape": (2, 2)}, "input_shape must be"),
        ({"input_shape": "1,8,8"}, "input_shape must be"),
        ({"training": 0.1}, "as LocalTraining"),
        ({"training": LocalTraining(0.1, epochs=2), "memory": True}, "one local step, not 2"),
        *(({"num_images": n}, "num_images must be a whole number") for n in (0, 2.5, "8", True)),
        (
            {"defence": "dp:clip=1,noise=1,examples=4", "training": LocalTraining(0.1)},
            "for weights",
        ),
    ):
        with pytest.raises(InvalidInputError, match=words):
            attacker(described, flower.FedAvg(), **changes)


def test_unknown_attributes_are_the_inner_strategys() -> None:
    inner = flower.FedAvg(fraction_train=0.3)
    wrapper = DelegatingStrategy(DelegatingStrategy(inner))
    assert wrapper.fraction_train == 0.3
    with pytest.raises(AttributeError):
        _ = wrapper.no_such_thing


def test_fedsgd_is_a_central_step() -> None:
    """Clients of different weight: the mean gradient times the learning rate, buffers kept."""
    sent = {"w": np.ones((2, 3), np.float32), "counter": np.array(5, np.int64)}
    sent["scale"] = np.array(2.0, np.float32)
    gradients = [np.full((2, 3), 1.0, np.float32), np.full((2, 3), 4.0, np.float32)]
    strategy = FedSGD(learning_rate=0.1, min_train_nodes=1, min_available_nodes=1)
    grid = InlineGrid(ClientApp(), 2)
    current = ArrayRecord({k: Array(v) for k, v in sent.items()})
    messages = list(strategy.configure_train(1, current, ConfigRecord(), grid))
    replies = [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord({"w": Array(g), "scale": Array(np.array(g[0, 0]))}),
                    "metrics": MetricRecord({"num-examples": n}),
                }
            ),
            reply_to=m,
        )
        for m, g, n in zip(messages, gradients, (1, 2), strict=True)
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    np.testing.assert_allclose(arrays["w"].numpy(), 1.0 - 0.1 * 3.0, rtol=1e-6)
    np.testing.assert_allclose(arrays["scale"].numpy(), 2.0 - 0.1 * 3.0, rtol=1e-6)
    assert arrays["counter"].numpy() == 5
    assert strategy.aggregate_train(2, [])[0] is None
