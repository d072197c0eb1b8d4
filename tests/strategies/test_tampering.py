"""A server that tampers, and clients that look at what they receive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedleak import LocalTraining, ThreatModel
from fedleak.errors import ForbiddenError, InvalidInputError, UnsupportedModelError
from fedleak.metric.prediction import leakage_db
from fedleak.quality import score_batch
from fedleak.tampers import make_tamper
from fedleak.tampers.signs import Sign, disparity, signs_of_tampering
from simulations.grid import InlineGrid, OrderedGrid
from strategies import Leak, MaliciousServer, TamperGuard, TamperingServer

CLIENTS, IMAGES, SHAPE = 3, 16, (1, 8, 8)
_DATA = load_digits()


def data(client: int) -> tuple[Tensor, Tensor]:
    chosen = slice(client * IMAGES, (client + 1) * IMAGES)
    images = torch.tensor(_DATA.images[chosen] / 16, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(_DATA.target[chosen])


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 16), nn.ReLU(),
            nn.Linear(16, 10),
        )  # fmt: skip


def app(*mods: Any) -> ClientApp:
    made = ClientApp(mods=list(mods))

    @made.query()
    def query(message: Message, context: Context) -> Message:
        known = ConfigRecord({"partition-id": int(context.node_config["partition-id"])})
        return Message(RecordDict({"known": known}), reply_to=message)

    @made.train()
    def train(message: Message, context: Context) -> Message:
        images, labels = data(int(context.node_config["partition-id"]))
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        F.cross_entropy(model(images), labels).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        records = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": IMAGES}),
        }
        return Message(RecordDict(records), reply_to=message)

    return made


def run(strategy: Strategy, client: ClientApp, rounds: int = 2) -> dict[str, np.ndarray]:
    grid = OrderedGrid(InlineGrid(client, CLIENTS), CLIENTS, seed=3)
    arrays = strategy.start(grid, ArrayRecord(net().state_dict()), num_rounds=rounds).arrays
    return {k: v.numpy() for k, v in arrays.items()}


def server(leaks: list[Leak], **options: Any) -> TamperingServer:
    return TamperingServer(
        FedAvg(fraction_evaluate=0.0), net, SHAPE, training=LocalTraining(0.1, IMAGES),
        num_images=IMAGES, on_leak=leaks.append, **{"tamper": "peel", "attack": "rows", **options},
    )  # fmt: skip


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_tampered_client_leaks_its_batch_and_is_left_out_of_the_training() -> None:
    leaks: list[Leak] = []
    made = server(leaks, rounds=[2], clients=1)
    run(made, app())
    assert [(t.server_round, t.reason) for t in made.tampered] == [(2, "")]
    assert made.tampered[0].change > 0.1
    (leak,) = [k for k in leaks if k.nodes == (made.tampered[0].node,) and k.server_round == 2]
    assert leak.reconstruction is not None
    truths = [data(c) for c in range(CLIENTS)]
    best = max(
        sum(
            s.quality is not None and s.quality.psnr_db > 60
            for s in score_batch(leak.reconstruction.images, leak.reconstruction.labels, *truth)
        )
        for truth in truths
    )
    assert best == IMAGES
    assert len([k for k in leaks if k.server_round == 2]) == CLIENTS


def test_rounds_without_tampering_are_the_same_bit_for_bit() -> None:
    honest = run(FedAvg(fraction_evaluate=0.0), app())
    assert equal(run(server([], rounds=[]), app()), honest)
    assert equal(
        run(MaliciousServer(FedAvg(fraction_evaluate=0.0), net, SHAPE, attack="rows",
                            training=LocalTraining(0.1, IMAGES), num_images=IMAGES), app()),
        honest,
    )  # fmt: skip
    lost = run(server([], rounds=[2], clients=1, restore=False), app())
    assert not equal(lost, honest)  # one client's data


@pytest.mark.slow
def test_where_all_are_tampered_with_nothing_is_learned() -> None:
    final = run(server([], rounds=[1, 2], restore=False), app())
    assert equal(final, {k: v.numpy() for k, v in net().state_dict().items()})


@pytest.mark.slow
def test_the_server_trains_on_what_it_read_off() -> None:
    made = server([], rounds=[1, 2])
    final = run(made, app())
    assert {t.restored for t in made.tampered} == {IMAGES}
    honest = run(FedAvg(fraction_evaluate=0.0), app())
    for name, value in honest.items():
        assert np.allclose(final[name], value, atol=1e-6)
    few = server([], rounds=[1], tamper="fishing")  # of each batch one class at most
    run(few, app(), rounds=1)
    assert {t.restored for t in few.tampered} == {0}


def test_a_sum_leaks_too() -> None:
    leaks: list[Leak] = []
    threat = ThreatModel(tamper=True, view="sum")
    made = server(leaks, threat=threat, tamper=make_tamper("peel", directions=8))
    run(made, app(), rounds=1)
    (leak,) = leaks
    assert leak.reconstruction is not None
    assert len(leak.nodes) == CLIENTS
    images = torch.cat([data(c)[0] for c in range(CLIENTS)])
    labels = torch.cat([data(c)[1] for c in range(CLIENTS)])
    scored = score_batch(leak.reconstruction.images, leak.reconstruction.labels, images, labels)
    assert sum(s.quality is not None and s.quality.psnr_db > 40 for s in scored) >= 40


def test_what_is_not_allowed_or_does_not_suit_is_refused() -> None:
    with pytest.raises(ForbiddenError, match=r"tamper = true\) or use MaliciousServer"):
        server([], threat=ThreatModel())
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(UnsupportedModelError, match="not fully connected to the pixels"):
        TamperingServer(FedAvg(), conv, SHAPE, "trap")
    with pytest.raises(InvalidInputError, match="clients"):
        server([], clients=-1)
    with pytest.raises(InvalidInputError, match="rounds"):
        server([], rounds=[0])


@pytest.mark.parametrize(
    ("tamper", "kinds"),
    [
        ("peel", {"equal rows", "equal columns"}),
        ("imprint", {"equal rows", "equal columns"}),
        ("trap", {"leaning rows"}),
        ("fishing", {"silent rows", "large bias"}),
    ],
)
def test_each_tamper_leaves_signs(tamper: str, kinds: set[str]) -> None:
    state = make_tamper(tamper).prepare(net(), SHAPE, num_images=64)
    assert kinds <= {s.kind for s in signs_of_tampering(state)}
    seen = signs_of_tampering(state, net().state_dict())
    assert kinds | {"jump"} <= {s.kind for s in seen}


def test_honest_models_leave_none() -> None:
    for seed in range(20):
        assert signs_of_tampering(net(seed).state_dict()) == []
    signs: list[Sign] = []
    run(FedAvg(fraction_evaluate=0.0), app(TamperGuard(on_signs=lambda r, s: signs.extend(s))), 10)
    assert signs == []


def test_a_guard_refuses_and_the_training_goes_on() -> None:
    leaks: list[Leak] = []
    seen: list[int] = []
    guard = TamperGuard("refuse", on_signs=lambda r, s: seen.append(r))
    made = server(leaks, rounds=[2], clients=1)
    final = run(made, app(guard), rounds=3)
    assert seen == [2]
    (leak,) = [k for k in leaks if k.nodes == (made.tampered[0].node,) and k.server_round == 2]
    assert leak.reconstruction is None
    assert "tampered" in leak.reason
    assert not equal(final, {k: v.numpy() for k, v in net().state_dict().items()})


def test_a_guard_sends_noise_that_shows_nothing() -> None:
    leaks: list[Leak] = []
    made = server(leaks, rounds=[1], clients=1)
    run(made, app(TamperGuard("noise")), rounds=1)
    (leak,) = [k for k in leaks if k.nodes == (made.tampered[0].node,)]
    assert leak.reconstruction is None or len(leak.reconstruction.images) == 0


def test_one_image_that_stands_out_is_a_sign() -> None:
    assert disparity(torch.tensor([1.0, 1.0, 1.0, 1.0])) == pytest.approx(1 / 3**0.5)
    assert disparity(torch.tensor([9.0, 1.0])) == pytest.approx(9.0)
    assert disparity(torch.tensor([1.0])) == 0.0
    of_tensors = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0]])
    assert disparity(of_tensors) == float("inf")  # below a head that fishes
    assert disparity(of_tensors[:1]) == pytest.approx(1 / 3**0.5)
    assert disparity(torch.zeros(3)) == 0.0
    seen: list[Sign] = []
    guard = TamperGuard(
        norms=lambda arrays, context: torch.tensor([800.0, 1.0]),
        on_signs=lambda r, s: seen.extend(s),
    )
    run(FedAvg(fraction_evaluate=0.0), app(guard), rounds=1)
    assert {s.kind for s in seen} == {"disparity"}
    assert len(seen) == CLIENTS


def test_an_update_that_would_show_an_image_is_a_sign() -> None:
    predicted: dict[int, float] = {}

    def leakage(arrays: dict[str, Tensor], context: Context) -> Tensor:
        client = int(context.node_config["partition-id"])
        model = net()
        model.load_state_dict(arrays)
        images, labels = data(client)
        told = leakage_db(model, images[:4], labels[:4])
        predicted[client] = float(told.max())
        return told

    seen: list[Sign] = []
    guard = TamperGuard(leakage=leakage, on_signs=lambda r, s: seen.extend(s))
    run(FedAvg(fraction_evaluate=0.0), app(guard), rounds=1)
    assert {s.kind for s in seen} == {"leakage"}
    assert sorted(s.value for s in seen) == sorted(predicted.values())
    assert min(predicted.values()) > 60  # an honest model that shows small batches
    seen.clear()
    guard.most_db = 1e3
    run(FedAvg(fraction_evaluate=0.0), app(guard), rounds=1)
    assert not seen
    with pytest.raises(UnsupportedModelError, match="several local steps"):
        leakage_db(net(), *data(0), LocalTraining(0.1, 4))


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="'ignore'"):
        TamperGuard("ignore")  # type: ignore[arg-type]
