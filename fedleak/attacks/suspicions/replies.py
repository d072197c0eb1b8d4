"""Updates that are not what a gradient looks like."""

from __future__ import annotations

from fedleak.attacks.suspicions.seen import Seen
from fedleak.systems import Gradients

#: Cosine of an update and the weights that were sent, from which it is taken for weights: of
#: gradients and weights of trained networks it was below 0.2.
_SAME = 0.9
#: Entries count as of one size within this of the median, and how many of them must be.
_ALIKE, _MOST = 0.02, 0.8
#: Entries of a tensor, at least, to be asked.
_FEW = 16


def mistaken(gradient: Gradients, sent: Gradients, scale: float | None) -> Gradients | None:
    """Return the gradient of one update that is one of weights, or taken for one of weights.

    Where a gradient was declared and weights came, it is ``sent - received``, up to a factor.
    Where weights were declared and their change came, it is that, with the other sign.

    Parameters
    ----------
    gradient : dict of Tensor
        As declared.
    sent : dict of Tensor
        The weights.
    scale : float or None
        Learning rate and number of steps that a change of weights was divided by; None where a
        gradient was declared.
    """
    names = [k for k in gradient if k in sent]
    dot = sum((gradient[k] * sent[k]).sum() for k in names)
    sizes = [sum(part[k].square().sum() for k in names) for part in (gradient, sent)]
    cosine = float(dot) / float(sizes[0] * sizes[1] + 1e-300) ** 0.5
    if cosine < _SAME:
        return None
    if scale is None:
        return {k: sent[k] - gradient[k] for k in names}
    return {k: gradient[k] - sent[k] / scale for k in names}


def alike(gradient: Gradients) -> Seen:
    """See whether nearly all entries are of one size: a normalised step, or signs."""
    shares, total = 0.0, 0
    for value in gradient.values():
        sizes = value.abs().flatten()
        sizes = sizes[sizes > 0]
        if len(sizes) < _FEW:
            continue
        middle = sizes.median()
        shares += float(((sizes - middle).abs() < _ALIKE * middle).sum())
        total += len(sizes)
    if not total or shares / total < _MOST:
        return Seen()
    return Seen(
        doubts=(
            f"{shares / total:.0%} of the update's entries are of one size: signs, or the first "
            "step of an optimiser that normalises (Adam), and no gradient",
        )
    )
