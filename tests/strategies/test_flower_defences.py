"""Flower's own defences: what the server sees under each, and which of ours says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)
from flwr.clientapp.typing import Mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from flwr.supercore import differential_privacy
from torch import Tensor

from fedleak import LocalTraining
from fedleak.defences import defend, parse_defence
from fedleak.defences.accountant import epsilon
from fedleak.errors import InvalidInputError
from fedleak.quality import score_batch
from simulations.grid import InlineGrid
from strategies import Leak, MaliciousServer, clipping_told
from strategies.mods import CLIPPING_NORM
from tests.fedleak.test_client import SHAPE, digits
from tests.strategies.test_declared_clients import app as declared_app
from tests.strategies.test_declared_clients import make

RATE, CLIENTS = 0.5, 2
Wrap = Callable[[Strategy], Strategy]


def own(client: int, count: int) -> tuple[Tensor, Tensor]:
    return digits(*range(10 * client, 10 * client + count))


def app(count: int, *mods: Mod) -> ClientApp:
    return declared_app(lambda _: LocalTraining(RATE, count), lambda c: own(c, count), *mods)


def run(
    around: Callable[[Wrap], Strategy], client: ClientApp, count: int = 1, rounds: int = 2,
    attacked: bool = True, **server: Any,
) -> tuple[float, list[Leak], dict[str, Tensor]]:  # fmt: skip
    """Return the worst PSNR, the leaks and the weights at the end."""
    leaks: list[Leak] = []

    def wrap(strategy: Strategy) -> Strategy:
        if not attacked:
            return strategy
        return MaliciousServer(
            strategy, make, SHAPE, training=LocalTraining(RATE, count), on_leak=leaks.append,
            **server,
        )  # fmt: skip

    np.random.seed(0)
    torch.manual_seed(0)
    result = around(wrap).start(
        grid=InlineGrid(client, CLIENTS), num_rounds=rounds,
        initial_arrays=ArrayRecord(make().state_dict()),
    )  # fmt: skip
    psnr = []
    for leak in leaks:
        assert leak.reconstruction is not None, leak.reason
        x, y = own(leak.nodes[0] - 2, count)
        scored = score_batch(leak.reconstruction.images, leak.reconstruction.labels, x, y)
        psnr += [one.quality.psnr_db for one in scored if one.quality is not None]
    return min(psnr, default=float("nan")), leaks, result.arrays.to_torch_state_dict()


def plain() -> FedAvg:
    return FedAvg(fraction_evaluate=0.0)


#: What the server does; the clients' mods; what the attacker is told; images; dB at least.
CASES: dict[str, tuple[Callable[[Wrap], Strategy], list[Mod], Any, int, float]] = {
    "size mods": (lambda w: w(plain()), [arrays_size_mod, message_size_mod], None, 4, 120),
    "central DP hides nothing from its own server": (
        lambda w: w(DifferentialPrivacyServerSideFixedClipping(plain(), 0.3, 0.1, CLIENTS)),
        [], None, 4, 120,
    ),
    "nor does adaptive central DP": (
        lambda w: w(DifferentialPrivacyServerSideAdaptiveClipping(plain(), 0.1, CLIENTS)),
        [], None, 4, 120,
    ),
    "inside of it the update is clipped": (
        lambda w: DifferentialPrivacyServerSideFixedClipping(w(plain()), 0.3, 0.1, CLIENTS),
        [], "fixedclipping_mod:0.1", 4, 80,
    ),
    "clients clip": (
        lambda w: w(DifferentialPrivacyClientSideFixedClipping(plain(), 0.3, 0.1, CLIENTS)),
        [fixedclipping_mod], clipping_told, 4, 80,
    ),
    "clients clip adaptively": (
        lambda w: w(DifferentialPrivacyClientSideAdaptiveClipping(plain(), 0.1, CLIENTS)),
        [adaptiveclipping_mod], clipping_told, 4, 80,
    ),
    "the same from within": (
        lambda w: DifferentialPrivacyClientSideAdaptiveClipping(w(plain()), 0.1, CLIENTS),
        [adaptiveclipping_mod], clipping_told, 1, 120,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_the_server_sees_under_flowers_defences(name: str) -> None:
    around, mods, told, count, least = CASES[name]
    psnr, leaks, trained = run(around, app(count, *mods), count, defence=told)
    assert len(leaks) == 2 * CLIENTS
    assert psnr > least
    assert {leak.status for leak in leaks} == {"ok"}
    *_, alone = run(around, app(count, *mods), count, attacked=False)
    assert all(torch.equal(trained[n], alone[n]) for n in alone)


def test_adaptive_bounds_are_read_round_by_round() -> None:
    assert CLIPPING_NORM == differential_privacy.KEY_CLIPPING_NORM
    seen = []

    def told(server_round: int, node: int, config: Any) -> Any:
        seen.append(config[CLIPPING_NORM])
        return clipping_told(server_round, node, config)

    run(lambda w: w(DifferentialPrivacyClientSideAdaptiveClipping(plain(), 0.1, CLIENTS)),
        app(1, adaptiveclipping_mod), defence=told)  # fmt: skip
    assert len(set(seen)) == 2  # one a round
    assert clipping_told(1, 2, {"lr": 0.1}) is None


@pytest.mark.parametrize("clip", [0.1, 10.0])
def test_local_dp_is_flowers(clip: float) -> None:
    """The same mean and the same noise: in its own words, and in ours."""
    given = {"clipping_norm": clip, "sensitivity": 0.02, "epsilon": 5.0, "delta": 1e-5}
    spec = parse_defence("LocalDpMod:" + ",".join(f"{k}={v}" for k, v in given.items()))
    x = {"w": torch.ones(200, 200) * 0.01}
    made = defend(x, spec, 0)["w"]
    mod = LocalDpMod(**given)
    zero = ArrayRecord({"w": torch.zeros(200, 200)})
    sent = Message(RecordDict({"arrays": zero}), dst_node_id=1, message_type="train")
    np.random.seed(0)
    reply = mod(sent, None, lambda m, c: Message(  # type: ignore[arg-type]
        RecordDict({"arrays": ArrayRecord(x)}), reply_to=m))  # fmt: skip
    theirs = reply.content["arrays"].to_torch_state_dict()["w"]
    std = float(spec.parts[0].errors(x)["w"])
    assert made.mean() == pytest.approx(min(0.01, clip / 200), abs=5 * std / 200)
    assert theirs.mean() == pytest.approx(float(made.mean()), abs=8 * std / 200)
    assert made.std() == pytest.approx(std, rel=0.02)
    assert theirs.std() == pytest.approx(std, rel=0.02)
    same = f"dp:clip={clip},noise={std / clip}"
    assert epsilon(spec, 3) == pytest.approx(epsilon(parse_defence(same), 3))


def test_local_dp_with_too_few_words_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="LocalDpMod:clipping_norm=1,sensitivity=1"):
        _ = parse_defence("LocalDpMod:1").parts


def test_the_attacker_who_knows_local_dp_is_the_stronger_one() -> None:
    told = "LocalDpMod:clipping_norm=1,sensitivity=0.001,epsilon=10,delta=1e-5"
    client = app(1, LocalDpMod(1, 0.001, 10, 1e-5))
    found = [run(lambda w: w(plain()), client, rounds=1, defence=d)[0] for d in (None, told)]
    assert found[1] >= found[0] - 0.5
    assert found[1] > 15
