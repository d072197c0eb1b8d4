"""What clients and server compute: a local update, and the accuracy of a model."""

from __future__ import annotations

import torch
from fedleak.strategies.mods import noise_seed  # type: ignore[import-not-found]
from torch import Tensor, nn

from fedleak.client.compute import example_gradients, gradient, train
from fedleak.client.loss import BinaryCrossEntropy, CrossEntropy
from fedleak.client.training import LocalTraining
from fedleak.data import LabelledImages, load_data
from fedleak.defences import defend_examples
from fedleak.models import build_model
from simulations.partition import client_batches, training_data
from simulations.scenario import Scenario


def make_model(scenario: Scenario) -> nn.Module:
    """Return the scenario's network with its first weights."""
    images = training_data(scenario)
    return build_model(
        scenario.model.name,
        images.shape,
        images.classes,
        seed=scenario.seed,
        weights=scenario.model.weights or None,
    )


def test_data(scenario: Scenario) -> LabelledImages:
    """Return the images on which the server measures accuracy."""
    data = scenario.data
    _, images = load_data(data.name, data.root, data.download, data.size)
    if len(images) <= data.max_test_images:
        return images
    # Drawn, not the first ones: many data sets lie in the order of their classes.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images.subset(order[: data.max_test_images].tolist())


test_data.__test__ = False  # type: ignore[attr-defined]  # its name looks like a test's


def local_gradient(
    model: nn.Module, scenario: Scenario, client: int, server_round: int
) -> tuple[dict[str, Tensor], float]:
    """Return the gradient of one batch's mean loss, by parameter name, and the loss."""
    (batch,) = client_batches(scenario, client, server_round)
    images, labels = training_data(scenario).batch(batch)
    model.train()
    spec = scenario.defence.spec
    if spec.examples:
        examples, each = example_gradients(model, images, labels, scenario.local)
        stream = noise_seed(scenario.seed, client, server_round)
        return defend_examples(examples, spec, stream), each
    return gradient(model, images, labels, scenario.local)


def local_training(model: nn.Module, scenario: Scenario, client: int, server_round: int) -> float:
    """Take the local steps, in place; return the mean loss."""
    model.train()
    local, data = scenario.local, training_data(scenario)
    assert local is not None  # it shares weights
    local = local.at(server_round)
    batches = (data.batch(batch) for batch in client_batches(scenario, client, server_round))
    return train(model, batches, local)


def evaluate(
    model: nn.Module, images: LabelledImages, training: LocalTraining | None = None
) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy; the model's mode stays as it is.

    Images are normalised as ``training`` says; one output is that of a binary task.

    Attack and metric read from the mode whether clients normalise by batch statistics.
    """
    mode = model.training
    model.eval()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for first in range(0, len(images), 500):
            x, y = images.batch(range(first, min(first + 500, len(images))))
            logits = model(x if training is None else training.seen(x))
            one = logits.shape[1] == 1
            found = (logits[:, 0] > 0).long() if one else logits.argmax(1)
            correct += int((found == y).sum())
            kind = BinaryCrossEntropy if one else CrossEntropy
            loss += float(kind(reduction="sum").value(logits, y))
    model.train(mode)
    return correct / len(images), loss / len(images)
