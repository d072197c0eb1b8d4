"""Batches told apart at the head, with what that shows of the client taken into account."""

from __future__ import annotations

from fedleak.attacks.demix import Demixed
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.heads import demix_heads
from fedleak.attacks.suspicions.batch import of_another_number, one_batch


def account(evidence: Evidence, batch: Demixed) -> tuple[Evidence, Demixed]:
    """Return the evidence of one batch divided by the factor found, and what was told apart.

    Where it cannot be, and the head's gradient is that of another number of images, that number
    is tried. What is seen and not explained is a doubt of the evidence returned.

    Parameters
    ----------
    evidence : Evidence
        Of one update.
    batch : Demixed
        What came of its head's gradient.
    """
    counted = not bool(evidence.granted[0]) and evidence.terms.clients == 1
    if not batch.solved and batch.rank not in (0, evidence.images) and counted:
        other = evidence.with_images(batch.rank)
        if other.is_chain:
            found = next(demix_heads(other))
            if found.solved:
                seen = of_another_number(evidence.images, batch.rank)
                seen = seen.and_(one_batch(found, not evidence.scale))
                return other.divided([seen]), found
    return evidence.divided([one_batch(batch, not evidence.scale)]), batch
