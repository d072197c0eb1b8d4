"""What a reader of the documents has: images, models, scenarios, a federation."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.documents.reading import ROOT

#: Height and width of the images: as small as the models take, since nothing here is measured.
SIZE = 12

MY_NET = '''
from torch import nn


def make(input_shape=(3, 12, 12), classes=10):
    channels, height, width = input_shape
    pixels = (height - 2) * (width - 2)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * pixels, classes)
    )
'''  # fmt: skip

MY_SCENARIO = """
name = "mine"

[federation]
clients = 2
rounds = 1
"""

MY_SWEEP = """
name = "my-sweep"
defences = ["none"]
"""


def image(seed: int) -> Tensor:
    """Return a smooth colour image of bytes."""
    rough = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(rough, (SIZE, SIZE), mode="bicubic").clamp(0, 1)[0]
    return (smooth * 255).round().byte()


def images(folder: Path) -> None:
    """Write images of two classes, one folder for each class."""
    from torchvision.io import write_png

    for number, label in enumerate(("cat", "dog")):
        (folder / label).mkdir(parents=True)
        for n in range(6):
            write_png(image(100 * number + n), str(folder / label / f"{n}.png"))


def picture(file: Path) -> None:
    """Write one image."""
    from torchvision.io import write_png

    write_png(image(7), str(file))


def weights(file: Path) -> None:
    """Write a checkpoint of ``my_net.py:make``."""
    from safetensors.torch import save_file

    namespace: dict[str, Any] = {}
    exec(MY_NET, namespace)
    save_file(namespace["make"]().state_dict(), file)


def _text(content: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_text(content)

    return write


#: Names that the documents use for what a reader has, and how each is made.
PLACEHOLDERS: dict[str, Callable[[Path], None]] = {
    "FOLDER": images,
    "OTHER_FOLDER": images,
    "HELD_OUT": images,
    "PUBLIC": images,
    "PICTURE.png": picture,
    "my_net.py": _text(MY_NET),
    "my.toml": _text(MY_SCENARIO),
    "my-sweep.toml": _text(MY_SWEEP),
    "trained.safetensors": weights,
}


def placeholders(command: str) -> set[str]:
    """Return the words of a command that a reader has to fill in, known here or not."""
    bare = re.sub(r"\b[A-Z_]+=|RAY_ADDRESS", "", command)
    upper = set(re.findall(r"(?<![\w.$-])[A-Z][A-Z_]{2,}(?:\.\w+)?(?![\w-])", bare))
    known = {n for n in PLACEHOLDERS if re.search(rf"(?<![\w./-]){re.escape(n)}(?![\w-])", bare)}
    return {u for u in upper if not re.match(r"E?MNIST|CIFAR|JSON", u)} | known


def prepare(place: Path, texts: list[str]) -> None:
    """Make what the texts of a document need, and take along what they name of the checkout."""
    for name in {n for t in texts for n in placeholders(t) if n in PLACEHOLDERS}:
        PLACEHOLDERS[name](place / name)
    for name in ("FOLDER", "my_net.py"):  # the table puts these in the place of others
        if not (place / name).exists():
            PLACEHOLDERS[name](place / name)
    for path in {w for t in texts for w in re.findall(r"\b(?:docs|simulations)/[\w./-]+", t)}:
        source, target = ROOT / path, place / path
        if source.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, target)


def namespace(document: str) -> dict[str, Any]:
    """Return the names that a document's Python blocks take for granted."""
    from dataclasses import dataclass

    from flwr.app import ArrayRecord
    from flwr.serverapp.strategy import FedAvg

    from fedleak.defences import DEFENCES, Defence
    from simulations.grid import InlineGrid

    grey = document == "docs/capture.md"
    shape = (1, 8, 8) if grey else (3, SIZE, SIZE)

    def net() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pixels = (shape[1] - 2) * (shape[2] - 2)
            layers = nn.Conv2d(shape[0], 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * pixels, 10)
            return nn.Sequential(*layers)

    model = net()
    x = image(7)[None].float() / 255
    found: dict[str, Any] = {
        "__name__": "__main__", "FedAvg": FedAvg, "Net": net, "model": model, "torch": torch,
        "nn": nn, "dataclass": dataclass, "Defence": Defence, "DEFENCES": DEFENCES,
        "grid": InlineGrid(client_app(net, shape, 1 if grey else 2), 2),
        "arrays": ArrayRecord(model.state_dict()),
    }  # fmt: skip
    if not grey:
        loss = F.cross_entropy(model(x), torch.tensor([3]))
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradient = torch.autograd.grad(loss, parameters)
        found["gradient"] = dict(zip(names, gradient, strict=True))
        found |= {"images": x, "labels": [3]}
    return found


def client_app(make: Callable[[], nn.Module], shape: tuple[int, int, int], count: int) -> Any:
    """Return clients that share nothing with fedleak: one step of SGD on ``count`` images."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        model = make()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(client))
        labels = (torch.arange(count) + client) % 10
        F.cross_entropy(model(x), labels).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
        metrics = MetricRecord({"num-examples": count, "train_loss": 1.0})
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": count, "eval_loss": 1.0})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app
