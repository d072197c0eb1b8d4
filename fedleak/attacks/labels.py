"""Which labels were in the batch: inferred from the head's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.errors import UnsupportedModelError


def infer_labels(
    bias: Tensor | None, weight: Tensor | None, images: int, typical: Tensor
) -> Tensor:
    """Infer the labels of each batch, in ascending order.

    With softmax cross-entropy the bias gradient of class ``c`` is ``mean_b p_bc - n_c / B``.
    For one image the true class is the only negative entry (iDLG, Zhao et al. 2020), and
    under noise the smallest. For more, the counts ``n_c`` follow from the mean probability,
    which the server estimates with images of its own.

    Parameters
    ----------
    bias : Tensor or None, shape (N, classes)
        Gradient of the head's bias.
    weight : Tensor or None, shape (N, classes, features)
        Gradient of the head's weight: without a bias it gives the label of one image, since
        ``p - y`` sums to zero and so is largest, in size, at the label.
    images : int
        Batch size B.
    typical : Tensor, shape (classes,) or (N, classes)
        The model's mean class probabilities on images of the server's own.

    Returns
    -------
    Tensor, int64, shape (N, B)

    Raises
    ------
    UnsupportedModelError
        If the head's gradient does not tell.
    """
    if bias is not None:
        if images == 1:
            return bias.argmin(1, keepdim=True)
        return torch.stack([_counted(images * g, images) for g in typical - bias])
    if weight is not None and images == 1:
        return weight.norm(dim=2).argmax(1, keepdim=True)
    raise UnsupportedModelError(
        "the labels cannot be inferred: the model's last layer is no fully connected layer with "
        "a bias; grant them to the attacker (label known)"
    )


def _counted(expected: Tensor, images: int) -> Tensor:
    """Return ``images`` labels whose counts are nearest to the expected ones."""
    counts = torch.zeros_like(expected, dtype=torch.int64)
    for _ in range(images):
        counts[int((expected - counts).argmax())] += 1
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
