"""Apps of Flower's old API: captured in two lines, attacked from there."""

from pathlib import Path
from typing import Any

import flwr.server.strategy as old
import numpy as np
import pytest
import torch
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp.strategy import FedAvg

from fedleak import LocalTraining
from fedleak.capture.run import attack_capture
from fedleak.client.compute import train
from fedleak.data import load_data
from fedleak.errors import InvalidInputError
from fedleak.models import build_model
from strategies import capture_fit

SHAPE = (1, 8, 8)
TRAINING = LocalTraining(0.1, batch_size=2)


def make() -> torch.nn.Module:
    return build_model("cnn2-v1", SHAPE, 10, seed=0)


class Client(ClientProxy):
    """As a NumPyClient is seen from the server."""

    def __init__(self, cid: str, images: list[int]):
        super().__init__(cid)
        self.images = images

    def train(self, instructions: Any) -> FitRes:
        model = make()
        arrays = parameters_to_ndarrays(instructions.parameters)
        names = list(model.state_dict())
        sent = {n: torch.from_numpy(a.copy()) for n, a in zip(names, arrays, strict=True)}
        model.load_state_dict(sent)
        train(model, [load_data("digits")[0].batch(self.images)], TRAINING)
        found = [v.numpy() for v in model.state_dict().values()]
        return FitRes(Status(Code.OK, ""), ndarrays_to_parameters(found), len(self.images), {})

    fit = reconnect = evaluate = get_parameters = get_properties = None  # type: ignore[assignment]


Client.__abstractmethods__ = frozenset()


def one_round(strategy: Any) -> list[np.ndarray]:
    manager = SimpleClientManager()
    for client in (Client("7", [0, 1]), Client("8", [2, 3])):
        manager.register(client)
    start = ndarrays_to_parameters([v.numpy() for v in make().state_dict().values()])
    asked = strategy.configure_fit(server_round=1, parameters=start, client_manager=manager)
    asked = sorted(asked, key=lambda pair: pair[0].cid)
    results = [(client, client.train(fit)) for client, fit in asked]
    merged, _ = strategy.aggregate_fit(1, results, [])
    return parameters_to_ndarrays(merged)


def test_two_lines_capture_what_clients_send_and_leave_the_training_as_it_is(
    tmp_path: Path,
) -> None:
    plain = one_round(old.FedAvg())
    kept = one_round(capture_fit(old.FedAvg(), make, SHAPE, TRAINING, tmp_path / "captures"))
    for one, other in zip(plain, kept, strict=True):
        np.testing.assert_array_equal(one, other)
    attacked = attack_capture(tmp_path / "captures", model="cnn2-v1")
    assert attacked.table["client"].tolist() == [7, 7, 8, 8]
    assert (attacked.table["fit"] < 1e-3).all()
    labels = load_data("digits")[0].batch([0, 1, 2, 3])[1].tolist()
    assert sorted(attacked.table["label_inferred"]) == sorted(labels)


def test_what_cannot_be_captured_does_not_end_the_round(tmp_path: Path) -> None:
    other = capture_fit(old.FedAvg(), lambda: torch.nn.Linear(64, 10), SHAPE, TRAINING,
                        tmp_path / "captures")  # fmt: skip
    for one, two in zip(one_round(old.FedAvg()), one_round(other), strict=True):
        np.testing.assert_array_equal(one, two)


def test_strategies_of_the_message_api_have_another_way(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="MaliciousServer"):
        capture_fit(FedAvg(), make, SHAPE, TRAINING, tmp_path)  # type: ignore[arg-type]
