"""Derivatives of an update, which is a derivative itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedleak.errors import UnsupportedModelError

#: Forward passes that a product with the Jacobian of a gradient, and one with its transpose,
#: cost together.
_PASSES = 12
#: Steps of an iteration that gets no further than its work allows.
_FEWEST = 10


@contextmanager
def derivable() -> Iterator[None]:
    """Take derivatives of gradients here; an operator that has none is named.

    Raises
    ------
    UnsupportedModelError
        If an operator of the model has no second, or no forward, derivative.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have neither
            yield
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "not implemented" not in str(error):
            raise
        raise UnsupportedModelError(
            f"the metric takes derivatives of the update, which this model has not: {error}"
        ) from error


def affordable_steps(model: nn.Module, images: Tensor, work: float, most: int) -> int:
    """Return how many products with ``J`` and ``J^T`` come to ``work``, and ``most`` at most.

    Counted in operations, never in seconds: a slow or busy machine comes to the same numbers.

    Parameters
    ----------
    model : nn.Module
    images : Tensor, shape (B, C, H, W)
        One batch.
    work : float
        Floating-point operations.
    most : int
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(images)
    each = _PASSES * max(counter.get_total_flops(), 1)
    return max(_FEWEST, min(most, int(work / each)))
