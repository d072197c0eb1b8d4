"""What an update leaves open of images: by a known defence, or as far as they explain it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

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


def hidden(result: Reconstruction, observation: Observation) -> str:
    """Return why an update does not bear images out, though they fit it; empty where it does.

    It is linearised at the images, with the errors that the attacker knows of a defence, or else
    with what they leave unexplained.

    Parameters
    ----------
    result : Reconstruction
        With images in the unit of the clients' as they were declared.
    observation : Observation
    """
    if observation.terms.signs(bool(observation.errors)):
        return SIGNS
    if not observation.errors and result.fit < _EXACT:
        return ""
    images, labels = result.images.double().cpu(), result.labels[None].cpu()
    evidence = Evidence.gather([observation], "cpu", simulate=True)
    if evidence.num_images != len(images):  # it was found to be that of another number
        evidence = evidence.with_images(len(images))
    factor = result.details.get("factor", 1.0) / evidence.seen[0].factor
    evidence = evidence.with_labels(labels).divided([Seen(factor)])
    if observation.errors:
        if not evidence.defended:
            return ""
        said = HIDDEN
    else:
        said = VAGUE
        evidence = evidence.with_errors(unexplained(evidence, images))
    try:
        expected = at_most_db(module_target(evidence), images, RECOGNISABLE)
    except TimeLimitError:
        return UNTOLD
    drowned = bool(observation.errors) and _drowned(evidence)
    if drowned or any(each < RECOGNISABLE for each in expected):
        return said
    rough = not observation.errors and result.fit > _ROUGH
    return UNTOLD if rough and any(map(math.isnan, expected)) else ""


def _drowned(evidence: Evidence) -> bool:
    """Return whether half of an update or more is what a defence is known to have added."""
    shares = []
    for name, error in evidence.errors.items():
        told = error.isfinite() & (evidence.gradient[name] != 0)
        whole = float(evidence.gradient[name][told].square().sum())
        if whole > 0:
            shares.append(min(1.0, float(error[told].square().sum()) / whole))
    return bool(shares) and sum(shares) / len(shares) > _DROWNED
