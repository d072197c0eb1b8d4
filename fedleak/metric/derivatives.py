"""Derivatives of an update, which is a derivative itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

from fedleak.errors import UnsupportedModelError


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
