"""The adviser: the smallest change that brings the predicted PSNR under a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fedleak.metric.attribution import (
    LEVEL,
    blocks_at,
    combined,
    groups_of,
    prunable,
    pruned_errors,
    relative_errors,
)
from fedleak.metric.jacobian_rows import Block
from fedleak.metric.posterior import Information, posterior
from fedleak.metric.reference import Reference

#: Fractions of each tensor that are tried.
SHARES = (0.5, 0.7, 0.9, 0.95, 0.99, 0.999)
#: Noise that is tried where its effect has no closed form, relative to each tensor's size.
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
#: Noise beyond which nobody trains.
_MOST_NOISE = 1e3
#: Unknowns up to which layers are withheld greedily, each step tried with every layer.
_GREEDY = 1024


@dataclass(frozen=True)
class Advice:
    """One change, and what it buys.

    Attributes
    ----------
    kind : str
        ``"withhold"``, ``"prune"``, ``"noise"``, ``"stride"`` or ``"filters"``.
    what : str
        The change in words.
    strength : float or str
        Share, relative noise, stride or filters; the names of what is withheld.
    defence : str or None
        The same for ``--defence``, on top of the present one; None for another network.
    predicted_psnr_db : float
        After it, in dB; at the first reference.
    reached : bool
        Whether that is under the target. If not, this is the strongest that was tried.
    cost : str
    """

    kind: str
    what: str
    strength: float | str
    defence: str | None
    predicted_psnr_db: float
    reached: bool
    cost: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON."""
        return asdict(self)


def advise(
    reference: Reference,
    factor: Tensor,
    blocks: Sequence[Block],
    told: Information,
    target_db: float,
) -> tuple[Advice, ...]:
    """Return the smallest defence of each kind that brings the prediction under a target.

    Parameters
    ----------
    reference : Reference
        A batch and its update, under the present defence.
    factor : Tensor, float64, shape (n / B, n / B)
        Lower triangular factor of the prior's covariance.
    blocks : sequence of Block
        In units of ``reference.errors``.
    told : Information
        :func:`fedleak.metric.attribution.information` of the same.
    target_db : float
        Above what the prior alone gives, or nothing reaches it.
    """
    found = [
        _withhold(reference, told, target_db),
        _prune(reference, factor, blocks, target_db),
        _noise(reference, factor, blocks, told, target_db),
    ]
    return tuple(a for a in found if a is not None)


def _withhold(reference: Reference, told: Information, target_db: float) -> Advice | None:
    """Withhold what tells most until the rest tells little; then send again what it can."""
    groups = {g.name: g for g in groups_of(reference)}
    sent = list(told.layers)
    if len(sent) < 2:
        return None

    def left(without: Sequence[str]) -> float:
        return told.psnr_db(dict.fromkeys(without, 0.0))

    greedy = len(told.total) <= _GREEDY
    order = [] if greedy else sorted(sent, key=told.alone, reverse=True)
    chosen: list[str] = []
    reached = told.psnr_db()
    while reached >= target_db and len(chosen) < len(sent) - 1:
        rest = [s for s in sent if s not in chosen]
        new = min(rest, key=lambda s: left([*chosen, s])) if greedy else order[len(chosen)]
        chosen.append(new)
        reached = left(chosen)
    for name in chosen[:-1]:
        fewer = [c for c in chosen if c != name]
        if reached < target_db and (without := left(fewer)) < target_db:
            chosen, reached = fewer, without
    chosen = [s for s in sent if s in chosen]
    modules = [m for s in chosen for m in groups[s].modules]
    kept = [s for s in sent if s not in chosen]
    gradient = reference.jacobian.gradient
    count = sum(gradient[p].numel() for c in chosen for p in groups[c].parameters)
    share = count / sum(g.numel() for g in gradient.values())
    names = ",".join(modules)
    return Advice(
        "withhold", f"do not send {', '.join(chosen) or 'nothing'}", names,
        f"withhold:{names}" if chosen else None, reached, reached < target_db,
        f"{share:.1%} of the update's entries are not sent, so these layers are not trained "
        f"together (start from trained ones, or keep them local); still sent: {', '.join(kept)}",
    )  # fmt: skip


def _prune(
    reference: Reference, factor: Tensor, blocks: Sequence[Block], target_db: float
) -> Advice | None:
    if not prunable(reference):
        return None

    def left(share: float) -> float:
        made = blocks_at(reference, pruned_errors(reference, share), blocks)
        return posterior(made, factor, tuple(reference.jacobian.images.shape)).psnr_db

    share, reached = _smallest(SHARES, left, target_db)
    return Advice(
        "prune", f"send the largest {1 - share:.3g} of each tensor alone", share,
        f"prune:{share:g}", reached, reached < target_db,
        f"{share:.1%} of the update's entries are not sent; clients can add what was left out "
        "to their next update, which this prediction does not count",
    )  # fmt: skip


def _noise(
    reference: Reference,
    factor: Tensor,
    blocks: Sequence[Block],
    told: Information,
    target_db: float,
) -> Advice:
    gradient = reference.jacobian.gradient
    present = _uniform(reference)

    def anew(strength: float) -> float:
        errors = combined(reference.errors, relative_errors(gradient, strength))
        made = blocks_at(reference, errors, blocks)
        return posterior(made, factor, tuple(reference.jacobian.images.shape)).psnr_db

    if present is None:
        strength, reached = _smallest(STRENGTHS, anew, target_db)
    else:
        floored = math.hypot(present, LEVEL)

        def spectral(strength: float) -> float:
            # ``told`` takes strengths in units of the present error, as if that were its level.
            return told.noised(LEVEL * math.hypot(1.0, strength / floored))

        strength, reached = _bisected(spectral, target_db)
    return Advice(
        "noise", f"noise of {strength:g} times the size of each tensor", strength,
        f"noise:{strength:g}", reached, reached < target_db,
        f"each entry of one update is known to {strength:g} of its size; averaged over N clients "
        f"to {strength:g} / sqrt(N). No privacy guarantee: that takes dp",
    )  # fmt: skip


def _uniform(reference: Reference) -> float | None:
    """Return the relative error of all gradients that tell something, if it is one number."""
    found = []
    for name, g in reference.jacobian.gradient.items():
        error = reference.errors[name]
        if bool(error.isinf().all()):
            continue
        found += [(error.min() / g.square().mean().sqrt()), error.max() / g.square().mean().sqrt()]
    ratios = [float(f) for f in found]
    if not ratios or not all(math.isfinite(r) for r in ratios):
        return None
    # Errors below the floor are all the same to it.
    floored = [math.hypot(r, LEVEL) for r in ratios]
    return ratios[0] if math.isclose(min(floored), max(floored), rel_tol=1e-3) else None


def _bisected(left: Callable[[float], float], target_db: float) -> tuple[float, float]:
    """Return the least strength, in two digits, that brings the dB under the target."""
    low, high = math.log(LEVEL), math.log(_MOST_NOISE)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if left(math.exp(middle)) < target_db else (middle, high)
    exponent = math.floor(high / math.log(10)) - 1
    strength = float(f"{math.ceil(math.exp(high) / 10.0**exponent - 1e-9) * 10.0**exponent:.2g}")
    return strength, left(strength)


def _smallest(
    values: Sequence[float], left: Callable[[float], float], target_db: float
) -> tuple[float, float]:
    """Return the first value under the target, or the last, and its dB; they fall with it."""
    low, high = 0, len(values) - 1
    seen: dict[int, float] = {}
    while low < high:
        middle = (low + high) // 2
        seen[middle] = left(values[middle])
        low, high = (low, middle) if seen[middle] < target_db else (middle + 1, high)
    return values[low], seen[low] if low in seen else left(values[low])
