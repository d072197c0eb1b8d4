"""What was seen of one update."""

from __future__ import annotations

from dataclasses import dataclass

from fedleak.client.loss import Loss


@dataclass(frozen=True)
class Seen:
    """What one update shows beside its images.

    Attributes
    ----------
    factor : float
        By what it was found to be multiplied; the attack works on the update divided by it.
    notes : tuple of str
        What is not as declared, and was taken into account.
    doubts : tuple of str
        What is not as declared, and is not modelled.
    loss : Loss or None
        Another than was declared, which explains the update.
    """

    factor: float = 1.0
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    loss: Loss | None = None

    def and_(self, other: Seen) -> Seen:
        """Return both."""
        factor = self.factor * other.factor
        loss = other.loss or self.loss
        return Seen(factor, self.notes + other.notes, self.doubts + other.doubts, loss)


#: A factor this near to 1 is none; and one this near nobody meant.
_NONE, _MEANT = 1e-5, 0.01


def by_factor(factor: float) -> Seen:
    """Return what is said of an update that is a multiple of a gradient."""
    if abs(factor - 1) < _NONE:
        return Seen()
    what = (
        "minus a gradient: changes of weights are its negative"
        if factor < 0
        else "so little that a coarser rounding of the update does it"
        if abs(factor - 1) < _MEANT
        else "a sum instead of a mean, accumulation, clipping, or another learning rate"
    )
    return Seen(factor, (f"the update is {factor:.6g} times what was declared ({what})",))
