"""Apps of Flower's old API: captured in two lines, attacked from there."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flwr.server.strategy as old
import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerConfig
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat import LegacyContext
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp.strategy import FedAvg

from fedleak import LocalTraining
from fedleak.capture import Capture, read_captures
from fedleak.capture.run import attack_capture
from fedleak.client.compute import gradient, train
from fedleak.data import load_data
from fedleak.errors import InvalidInputError
from fedleak.models import build_model
from simulations.grid import InlineGrid
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


class _Grid(InlineGrid):
    """With the number of its run, which the old API asks for."""

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=1)


def secure_round(strategy: Any, sizes: Sequence[int]) -> list[np.ndarray]:
    """Run one round of SecAgg+, from its keys to its mean, with so many images of each client."""

    class Numpy(NumPyClient):
        def __init__(self, client: int):
            self.images = [10 * client + n for n in range(sizes[client])]

        def fit(self, parameters: Any, config: Any) -> Any:
            instructions = FitIns(ndarrays_to_parameters(parameters), {})
            sent = Client("", self.images).train(instructions)
            return parameters_to_ndarrays(sent.parameters), sent.num_examples, {}

    app = ClientApp(
        client_fn=lambda context: Numpy(int(context.node_config["partition-id"])).to_client(),
        mods=[secaggplus_mod],
    )
    strategy.initial_parameters = ndarrays_to_parameters(
        [v.numpy() for v in make().state_dict().values()]
    )
    context = LegacyContext(
        Context(1, 1, {}, RecordDict(), {}), ServerConfig(num_rounds=1), strategy
    )
    workflow = SecAggPlusWorkflow(num_shares=len(sizes), reconstruction_threshold=2)
    np.random.seed(0)  # the clients' rounding is random
    DefaultWorkflow(fit_workflow=workflow)(_Grid(app, len(sizes)), context)
    return [a.numpy() for a in context.state.array_records["parameters"].values()]


def secured() -> Any:
    return old.FedAvg(min_available_clients=3, fraction_evaluate=0.0)


def test_under_secure_aggregation_the_sum_is_captured_and_nothing_else(tmp_path: Path) -> None:
    plain = secure_round(secured(), [2, 2, 2])
    kept = capture_fit(secured(), make, SHAPE, TRAINING, tmp_path / "captures")
    for one, other in zip(plain, secure_round(kept, [2, 2, 2]), strict=True):
        np.testing.assert_array_equal(one, other)
    capture = Capture(tmp_path / "captures", "cnn2-v1")
    (name,) = capture.names()
    update = capture.update(name)
    assert (update.summed, len(update.nodes)) == (True, 3)
    assert (update.terms.threat.view, update.terms.clients) == ("sum", 3)
    # It is the mean gradient of all six images, but for SecAgg+'s rounding.
    images = load_data("digits")[0].batch([0, 1, 10, 11, 20, 21])
    mean, _ = gradient(make(), *images)
    for name, value in mean.items():
        assert (update.received[name] - value).norm() < 0.2 * value.norm()  # of one client: 1


def test_of_unequal_clients_the_capture_says_that_their_mean_is_not_attacked(
    tmp_path: Path,
) -> None:
    kept = capture_fit(secured(), make, SHAPE, TRAINING, tmp_path / "captures")
    secure_round(kept, [2, 3, 2])
    (stored,) = read_captures(tmp_path / "captures", "cnn2-v1")
    assert "one mean over clients, with 2 to 3 images each" in stored.reason


def test_strategies_of_the_message_api_have_another_way(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="MaliciousServer"):
        capture_fit(FedAvg(), make, SHAPE, TRAINING, tmp_path)  # type: ignore[arg-type]
