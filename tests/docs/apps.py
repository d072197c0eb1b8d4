"""Small apps of the kinds that people run, on digits enlarged to 32x32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fedleak.simulations.grid import InlineGrid  # type: ignore[import-not-found]
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedleak.strategies import Leak, MaliciousServer

SHAPE = (3, 32, 32)


def images(client: int, count: int) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    own = slice(client * count, (client + 1) * count)
    small = torch.tensor(digits.images[own] / 16, dtype=torch.float32).unsqueeze(1)
    large = F.interpolate(small, size=SHAPE[1:], mode="bilinear").expand(-1, 3, -1, -1)
    return large.contiguous(), torch.tensor(digits.target[own])


class LeNet(nn.Module):
    """The network of Flower's quickstart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x))).view(-1, 400)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def batch_normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1),
        nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def attacked(
    make: Callable[[], nn.Module], optimiser: Any, options: dict[str, float], count: int,
    middle: float, only: str = "", **server: Any,
) -> tuple[Leak, bool]:  # fmt: skip
    """Run one round of two clients; return the first leak, and whether its classes are right."""
    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        torch.manual_seed(1)  # what is not sent is the same everywhere, as pretrained weights
        model = make().train()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
        x, y = images(int(context.node_config["partition-id"]), count)
        step = optimiser([p for p in model.parameters() if p.requires_grad], **options)
        F.cross_entropy(model((x - middle) / middle if middle else x), y).backward()
        step.step()
        state = {n: t for n, t in model.state_dict().items() if n.startswith(only)}
        metrics = MetricRecord({"num-examples": count})
        content = {"arrays": ArrayRecord(state), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    def same() -> nn.Module:
        torch.manual_seed(1)
        return make()

    leaks: list[Leak] = []
    strategy = MaliciousServer(
        FedAvg(fraction_evaluate=0.0), same, SHAPE, on_leak=leaks.append, **server
    )
    first = {n: t for n, t in same().state_dict().items() if n.startswith(only)}
    strategy.start(grid=InlineGrid(app, 2), initial_arrays=ArrayRecord(first), num_rounds=1)
    leak = leaks[0]
    assert leak.reconstruction is not None, leak.reason
    truth = images(leak.nodes[0] - 2, count)[1]
    return leak, torch.equal(leak.reconstruction.labels.sort().values, truth.sort().values)
