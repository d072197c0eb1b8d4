"""Batches told apart at the head, with what that shows of the client taken into account."""

from __future__ import annotations

from dataclasses import replace

from fedleak.attacks.evidence import Evidence
from fedleak.attacks.head.batch import Demixed
from fedleak.attacks.head.single import demix_heads
from fedleak.attacks.suspicions.batch import of_another_loss, of_another_number, one_batch
from fedleak.client.loss import PLAIN, BinaryCrossEntropy, CrossEntropy

#: Losses that are tried where the declared one explains nothing.
_USUAL = (*(CrossEntropy(label_smoothing=s) for s in (0.1, 0.05, 0.2)), BinaryCrossEntropy())

_UNTOLD = (
    "entries of the head's gradient are known to say nothing (a defence, or steps of an optimiser "
    "that show signs alone): the images of the batch are not told apart by it"
)


def account(evidence: Evidence, batch: Demixed) -> tuple[Evidence, Demixed]:
    """Return the evidence of one batch divided by the factor found, and what was told apart.

    Where it cannot be, and the head's gradient is that of another number of images, that number
    is tried; where it is that of no mean cross-entropy, losses that are usual are. What is seen
    and not explained is a doubt of the evidence returned.

    Parameters
    ----------
    evidence : Evidence
        Of one update.
    batch : Demixed
        What came of its head's gradient.
    """
    counted = not bool(evidence.granted[0]) and evidence.terms.clients == 1
    counted &= not (evidence.seen[0].doubts or _untold(evidence))
    if not batch.solved and batch.rank not in (0, evidence.num_images) and counted:
        other = evidence.with_images(batch.rank)
        if other.is_chain:
            found = next(demix_heads(other, scaled=True))
            if found.solved:
                seen = of_another_number(evidence.num_images, batch.rank)
                seen = seen.and_(one_batch(found, not evidence.scale))
                return other.divided([seen]), found
    seen = one_batch(batch, not evidence.scale)
    if batch.loss is not None:
        seen = of_another_loss(batch.loss).and_(seen)
        return evidence.with_loss(batch.loss).divided([seen]), batch
    if seen.doubts and evidence.replay.loss == PLAIN and not evidence.defended:
        for loss in _USUAL:
            other = evidence.with_loss(loss)
            found = next(demix_heads(other, scaled=True)) if other.is_chain else batch
            if found.solved:
                seen = of_another_loss(loss).and_(one_batch(found, not evidence.scale))
                return other.divided([seen]), found
    if seen.doubts and _untold(evidence):
        seen = replace(seen, doubts=(_UNTOLD,))  # nor is their number
    return evidence.divided([seen]), batch


def _untold(evidence: Evidence) -> bool:
    """Return whether entries of the head's gradient are known to say nothing.

    Those that a defence left out, and those of which an optimiser's step shows the sign alone.
    """
    name = f"{evidence.replay.head}.weight"
    error, sent = evidence.errors.get(name), evidence.gradient.get(name)
    return (
        error is not None and sent is not None and bool(((error > 0) & (error >= sent.abs())).any())
    )
