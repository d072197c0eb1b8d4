"""The gradient of every image of a batch, for defences that work on single images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak.defences.base import Update


def example_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Update, float]:
    """Return the gradient of the cross-entropy of each image alone, and the mean loss.

    Parameters
    ----------
    model : nn.Module
        Normalisation by the statistics of a batch sees one image at a time.
    images : Tensor, shape (B, C, H, W)
    labels : Tensor, int64, shape (B,)

    Returns
    -------
    gradients : dict of str to Tensor, shape (B, *parameter)
    loss : float
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows, losses = [], []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        loss = F.cross_entropy(model(image), label)
        found = torch.autograd.grad(
            loss, list(trained.values()), materialize_grads=True, allow_unused=True
        )
        rows.append(found)
        losses.append(loss.item())
    gradients = {
        n: torch.stack(each) for n, each in zip(trained, zip(*rows, strict=True), strict=True)
    }
    return gradients, sum(losses) / len(losses)
