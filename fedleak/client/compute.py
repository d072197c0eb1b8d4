"""What a client computes: for simulations, laboratory and the tests' oracle alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedleak.client.optimiser import clipped
from fedleak.client.training import LocalTraining
from fedleak.modules import logits_of


def gradient(
    model: nn.Module, images: Tensor, labels: Tensor, training: LocalTraining | None = None
) -> tuple[dict[str, Tensor], float]:
    """Return the gradient of one batch's loss, by parameter name, and the loss.

    Parameters
    ----------
    model : nn.Module
        In the mode of the client.
    images : Tensor, shape (B, C, H, W)
    labels : Tensor, int64, shape (B,)
    training : LocalTraining, optional
        Says what clients minimise and how they normalise; by default the mean cross-entropy of
        images as they are.

    Returns
    -------
    gradients : dict of str to Tensor
    loss : float
    """
    client = training or LocalTraining(reply="gradient")
    with _mode(model, client):
        value = client.criterion.value(logits_of(model(client.seen(images))), labels)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        value, list(trained.values()), materialize_grads=True, allow_unused=True
    )
    return dict(zip(trained, clipped(found, client.max_norm), strict=True)), value.item()


@contextmanager
def _mode(model: nn.Module, client: LocalTraining) -> Iterator[None]:
    """Compute in the declared mode of normalisation layers; the model's own comes back."""
    modes = {m: m.training for m in model.modules()} if client.norm else {}
    client.in_mode(model)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def example_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, training: LocalTraining | None = None
) -> tuple[dict[str, Tensor], float]:
    """Return the gradient of each image alone, and the mean loss.

    Parameters
    ----------
    model : nn.Module
        Normalisation by the statistics of a batch sees one image at a time.
    images : Tensor, shape (B, C, H, W)
    labels : Tensor, int64, shape (B,)
    training : LocalTraining, optional

    Returns
    -------
    gradients : dict of str to Tensor, shape (B, *parameter)
    loss : float
    """
    each = [
        gradient(model, image, label, training)
        for image, label in zip(images.split(1), labels.split(1), strict=True)
    ]
    rows = {n: torch.stack([g[n] for g, _ in each]) for n in each[0][0]}
    return rows, sum(value for _, value in each) / len(each)


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    training: LocalTraining,
) -> float:
    """Take the local steps of one client, in place; return the mean loss.

    Parameters
    ----------
    model : nn.Module
        In the mode of the client.
    batches : iterable of (images, labels)
        One for each step.
    training : LocalTraining

    Returns
    -------
    float
    """
    optimiser = training.update_rule.torch(model.parameters(), training.rate)
    sent = [p.detach().clone() for p in model.parameters()]
    losses = []
    for images, labels in batches:
        optimiser.zero_grad()
        with _mode(model, training):
            loss = training.criterion.value(logits_of(model(training.seen(images))), labels)
        losses.append(loss.item())
        if training.mu:
            away = sum(
                (p - s).square().sum() for p, s in zip(model.parameters(), sent, strict=True)
            )
            loss = loss + training.mu / 2 * away
        loss.backward()
        if training.max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_norm)
        optimiser.step()
    return sum(losses) / len(losses)
