"""What demixing the head's gradient of a batch says of the client."""

from __future__ import annotations

import math

from fedleak.attacks.head.batch import Demixed
from fedleak.attacks.suspicions.seen import Seen, by_factor
from fedleak.client.loss import CrossEntropy, Loss

#: Misfit, in units of the rounding expected, from which no search came near a solution, and the
#: relative noise up to which an update holds nothing but rounding.
_FAR, _ROUNDING = 1e2, 1e-5


def one_batch(batch: Demixed, declared: bool) -> Seen:
    """See the factor of a batch's update, how many images it is of, and another loss.

    Parameters
    ----------
    batch : Demixed
    declared : bool
        Whether the scale of the update was declared, so that a factor is news.
    """
    if batch.solved or batch.factor != 1:
        return by_factor(batch.factor) if declared else Seen(batch.factor)
    count = len(batch.labels)
    if batch.rank and batch.rank < count:
        return Seen(
            doubts=(
                f"the head's gradient has rank {batch.rank}: it is that of {batch.rank} images, or "
                f"of {count} some of which are alike; {count} were declared",
            )
        )
    if batch.rank > count:
        return Seen(
            doubts=(
                f"the head's gradient has rank {batch.rank}: it is that of at least {batch.rank} "
                f"images, or of several steps; {count} images in one step were declared",
            )
        )
    if math.isfinite(batch.misfit) and math.sqrt(batch.misfit) > _FAR and batch.noise < _ROUNDING:
        return Seen(
            doubts=(
                f"the head's gradient is exactly that of {count} images, but no softmax "
                "cross-entropy of theirs explains it, at any scale: another loss (class weights, "
                "label smoothing, several labels), or several steps",
            )
        )
    return Seen()


def of_another_number(declared: int, found: int) -> Seen:
    """Return what is said where an update is explained by another number of images."""
    return Seen(notes=(f"the update is that of {found} images; {declared} were declared",))


def of_another_loss(loss: Loss) -> Seen:
    """Return what is said where another loss than was declared explains an update."""
    what = f"the loss {loss}"
    if isinstance(loss, CrossEntropy) and loss.weight:
        what = f"cross-entropy with the class weights {', '.join(f'{w:.4g}' for w in loss.weight)}"
        what += " (1 also where the batch has no such label)"
    return Seen(notes=(f"{what} explains the update, and the declared one does not",))
