"""Images that do not explain the update, or that it hardly determines.

Nobody has reason to take either for the client's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from fedleak.attacks.suspicions.hidden import hidden
from fedleak.observation import Observation
from fedleak.wording import EXPLAINED, PARTLY

if TYPE_CHECKING:  # which is where this is called from
    from fedleak.attacks.base import Reconstruction

#: Without the number, so that the doubts of many updates can be counted; ``fit`` has it.
_IN_PART = (
    f"the images explain the update in part only (fit of {EXPLAINED:g} or more): shapes may be "
    "right, details are made up"
)
_LITTLE = (
    f"the images explain little of the update (fit of {PARTLY:g} or more): the search failed, or "
    "the client is another than was declared"
)
_CLEANER = (
    "the update is cleaner than the images explain it: layers were solved at a wrong scale, or the "
    "client is another than was declared"
)
#: Of one round; several that agree up to their noise answer these.
UNEXPLAINED = (_IN_PART, _LITTLE)
#: Part of the unknowns of images that the update must be able to determine.
_ENOUGH = 0.5
#: Fit up to which only images near to the true ones explain a mixture of several: where a softmax
#: tells them apart, and where there is one output, whose row of numbers all of them share.
_MIXED, _ONE_OUTPUT = 1e-2, 1e-3


def doubted(
    results: Sequence[Reconstruction],
    observations: Sequence[Observation],
    seen: Sequence[Tensor] | None = None,
) -> list[Reconstruction]:
    """Return reconstructions, with a doubt where the update does not bear the images out.

    At the true images of a client that is as declared, ``fit`` is rounding, and what a known
    defence added is no part of it: from :data:`fedleak.wording.EXPLAINED` on, something is wrong.
    Images that are certified need no other witness: those that are left out explain the rest.

    Parameters
    ----------
    results : sequence of Reconstruction
    observations : sequence of Observation
        Of one model.
    seen : sequence of Tensor, optional
        Their images in the unit that was declared, where they were found to be in another.
    """
    own = [r.images for r in results] if seen is None else seen
    out, asked = list(results), []
    for n, (result, observation) in enumerate(zip(results, observations, strict=True)):
        if not result.images.numel() or result.doubts or _proved(result):
            continue  # another doubt says why
        if doubts := _by_numbers(result, observation):
            out[n] = replace(result, doubts=tuple(doubts))
        else:
            asked.append(n)
    found = [replace(results[n], images=own[n]) for n in asked]
    said = hidden(found, [observations[n] for n in asked])
    for n, reason in zip(asked, said, strict=True):
        reason = reason or _mixed(results[n], observations[n])
        if reason:
            out[n] = replace(results[n], doubts=(reason,))
    return out


def _by_numbers(result: Reconstruction, observation: Observation) -> list[str]:
    """Return what fit, noise and the count of entries say against images."""
    doubts = []
    if not result.fit < EXPLAINED:
        doubts.append(_IN_PART if result.fit < PARTLY else _LITTLE)
    unknowns = result.images.numel()
    entries = sum(int((g != 0).sum()) for g in observation.gradient.values())
    if entries < _ENOUGH * unknowns:
        doubts.append(
            f"only {entries} entries of the update say anything, of {unknowns} unknowns in the "
            "images: others explain it as well, and the prior chose"
        )
    noise = result.details.get("noise")
    clean = isinstance(noise, float) and noise < _MIXED * result.fit
    if clean and result.fit > _MIXED and not observation.errors and not doubts:
        doubts.append(_CLEANER)
    return doubts


def _mixed(result: Reconstruction, observation: Observation) -> str:
    """Return why images of a batch that are not exact may be others; empty where they are."""
    one = list(observation.gradient.values())[-1].numel() == 1
    if len(result.images) == 1 or result.fit <= (_ONE_OUTPUT if one else _MIXED):
        return ""
    model = "a model of one output mixes" if one else "the update mixes"
    return (
        f"{model} the images of a batch, and these explain it not to its last digits: others may "
        "explain as much"
    )


def _proved(result: Reconstruction) -> bool:
    return bool(result.certified) and all(result.certified)
