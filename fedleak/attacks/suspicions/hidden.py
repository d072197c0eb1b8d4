"""What an update leaves open of images: by a known defence, or as far as they explain it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fedleak.attacks.certainty import at_most_db, unexplained
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.suspicions.seen import Seen
from fedleak.attacks.targets.local_training import module_target
from fedleak.errors import TimeLimitError
from fedleak.observation import Observation
from fedleak.wording import RECOGNISABLE

if TYPE_CHECKING:  # which is where this is called from
    from fedleak.attacks.base import Reconstruction

SIGNS = (
    "only the signs of the update are known: images that look different have the same signs, and "
    "the prior chose among them"
)
HIDDEN = (
    "what the defence is known to hide leaves these images open: fewer than "
    f"{RECOGNISABLE:g} dB are to be expected of the update alone, the rest is the prior's"
)
VAGUE = (
    "the images do not explain the update to its last digits, and as far as they do others explain "
    f"it as well: fewer than {RECOGNISABLE:g} dB are to be expected of it"
)
UNTOLD = (
    "the images do not explain the update to its last digits, and how much that leaves open "
    "of them is not computed for so large an update"
)
#: Fit up to which images explain a clean update as well as any.
_EXACT = 1e-3
#: Fit above which what is not known of a clean update is a doubt.
_ROUGH = 1e-2
#: Share of an update, as squares, that is known to be noise: what is linear is far from there.
_DROWNED = 0.5


def hidden(results: Sequence[Reconstruction], observations: Sequence[Observation]) -> list[str]:
    """Return why updates do not bear images out, though they fit; empty where they do.

    They are linearised at the images, with the errors that the attacker knows of a defence, or else
    with what they leave unexplained.

    Parameters
    ----------
    results : sequence of Reconstruction
        With images in the unit of the clients' as they were declared.
    observations : sequence of Observation
        Of one model.
    """
    out = [""] * len(results)
    groups: dict[tuple[object, ...], list[int]] = {}
    for n, (result, o) in enumerate(zip(results, observations, strict=True)):
        if o.terms.signs(bool(o.errors)):
            out[n] = SIGNS
        elif o.errors:
            alike = (len(result.images), o.num_images, o.clients, o.training, o.defence)
            groups.setdefault(alike, []).append(n)
        elif result.fit >= _EXACT:  # what each shows of its client is its own: not together
            groups[n,] = [n]
    for members in groups.values():
        told = _left_open([results[n] for n in members], [observations[n] for n in members])
        for n, reason in zip(members, told, strict=True):
            out[n] = reason
    return out


def _left_open(results: Sequence[Reconstruction], observations: Sequence[Observation]) -> list[str]:
    """Return the reasons of updates that all have known errors, or of one that has none."""
    images = torch.stack([r.images.double().cpu() for r in results])
    labels = torch.stack([r.labels.cpu() for r in results])
    known = bool(observations[0].errors)
    evidence = Evidence.gather(observations, "cpu", simulate=True)
    if evidence.num_images != images.shape[1]:  # it was found to be that of another number
        evidence = evidence.with_images(images.shape[1])
    factors = [
        Seen(r.details.get("factor", 1.0) / seen.factor)
        for r, seen in zip(results, evidence.seen, strict=True)
    ]
    evidence = evidence.with_labels(labels).divided(factors)
    if not known:
        evidence = evidence.with_errors(unexplained(evidence, images[0]))
    elif not evidence.defended:
        return [""] * len(results)
    said = HIDDEN if known else VAGUE
    try:
        expected = at_most_db(module_target(evidence), images, RECOGNISABLE)
    except TimeLimitError:
        return [UNTOLD] * len(results)
    drowned = _drowned(evidence) if known else [False]
    reasons = []
    for result, each, lost in zip(results, expected, drowned, strict=True):
        if lost or any(e < RECOGNISABLE for e in each):
            reasons.append(said)
        elif not known and result.fit > _ROUGH and any(map(math.isnan, each)):
            reasons.append(UNTOLD)
        else:
            reasons.append("")
    return reasons


def _drowned(evidence: Evidence) -> list[bool]:
    """Return whether half of an update or more is what a defence is known to have added."""
    shares = []
    for name, error in evidence.errors.items():
        g = evidence.gradient[name]
        told = error.isfinite() & (g != 0)
        whole = torch.where(told, g, 0.0).flatten(1).square().sum(1)
        noise = torch.where(told, error, 0.0).flatten(1).square().sum(1)
        shares.append(torch.where(whole > 0, (noise / whole).clamp(max=1.0), torch.nan))
    mean = torch.stack(shares).nanmean(0)
    return (mean > _DROWNED).tolist()  # where nothing is told: no number, and not above
