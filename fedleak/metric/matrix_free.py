"""The predicted PSNR of images too large for a Jacobian in memory, from products with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedleak.priors import Prior

if TYPE_CHECKING:
    from fedleak.metric.prediction import Prediction, Reference


def estimate(references: Sequence[Reference], prior: Prior) -> Prediction:
    """Return the prediction with an estimate of its error."""
    raise NotImplementedError
