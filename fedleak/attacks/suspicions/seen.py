"""What was seen of one update."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    factor: float = 1.0
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    def and_(self, other: Seen) -> Seen:
        """Return both."""
        factor = self.factor * other.factor
        return Seen(factor, self.notes + other.notes, self.doubts + other.doubts)


def by_factor(factor: float) -> Seen:
    """Return what is said of an update that is a multiple of a gradient."""
    if factor == 1:
        return Seen()
    what = (
        "minus a gradient: changes of weights are its negative"
        if factor < 0
        else "a sum instead of a mean, accumulation, clipping, or another learning rate"
    )
    return Seen(factor, (f"the update is {factor:.6g} times what was declared ({what})",))
