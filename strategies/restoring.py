"""What a tampered client would have replied: computed by the server on the images it read off."""

from __future__ import annotations

import copy

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import nn

from fedleak.attacks import Reconstruction
from fedleak.capture.update import load_sent
from fedleak.client.compute import gradient, train
from fedleak.client.training import LocalTraining
from fedleak.errors import FedleakError
from fedleak.modules import copied

__all__ = ["restored"]

#: Share of a batch that must have been read off for its mean to stand for all of it.
_ENOUGH = 0.5
#: What of an update may be left unexplained by images that are taken for the client's.
_EXPLAINED = 0.5


def restored(
    reply: Message,
    model: nn.Module,
    honest: ArrayRecord,
    found: Reconstruction,
    training: LocalTraining | None,
    num_images: int,
) -> tuple[Message, int] | None:
    """Return a reply on the honest model in the place of a tampered client's.

    Parameters
    ----------
    reply : Message
        The client's, which is not changed.
    model : nn.Module
        The architecture, in the clients' mode.
    honest : ArrayRecord
        Its honest weights.
    found : Reconstruction
        Of the tampered update; never the true images.
    training : LocalTraining, optional
        What clients do; they share a gradient without it.
    num_images : int
        How many images the client has.

    Returns
    -------
    (Message, int) or None
        With the number of images that it is made of; None where too few were recovered, or
        the client takes several steps, whose batches the server does not know.
    """
    count = len(found.images)
    steps = 1 if training is None or not training.trains else training.steps(num_images)
    if count < _ENOUGH * num_images or found.fit > _EXPLAINED or steps > 1:
        return None
    try:
        own = load_sent(copied(model), honest.to_torch_state_dict())
        made = _update(own, found, training)
    except FedleakError:  # it does not take such images
        return None
    name, record = next(iter(reply.content.array_records.items()))
    if set(made) != set(record):
        return None
    other = copy.copy(reply)
    other.content = RecordDict({**reply.content, name: ArrayRecord(made)})
    return other, count


def _update(
    model: nn.Module, found: Reconstruction, training: LocalTraining | None
) -> dict[str, torch.Tensor]:
    """Return what a client shares that has these images alone."""
    like = next(model.parameters())
    batch = found.images.to(like.dtype).clamp(0, 1), found.labels
    if training is not None and training.trains:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        train(model, [batch], training)
        after = model.state_dict()
        if training.reply == "change":
            return {k: v - before[k] for k, v in after.items()}
        return after
    return gradient(model, *batch, training)[0]
