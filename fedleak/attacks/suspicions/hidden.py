"""What a defence is known to hide, and how much of the images that leaves open."""

from __future__ import annotations

import math

from torch import Tensor

from fedleak.attacks.certainty import expected_db, indifferent
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.targets.local_training import module_target
from fedleak.observation import Observation
from fedleak.wording import RECOGNISABLE

SIGNS = (
    "only the signs of the update are known: images that look different have the same signs, and "
    "the prior chose among them"
)
HIDDEN = (
    "what the defence is known to hide leaves these images open: fewer than "
    f"{RECOGNISABLE:g} dB are to be expected of the update alone, the rest is the prior's"
)
#: Where that is not computed: share of an update, as squares, that is known to be noise.
_DROWNED = 0.5


def hidden(images: Tensor, labels: Tensor, observation: Observation) -> str:
    """Return why a defended update does not bear images out; empty where it does.

    Parameters
    ----------
    images : Tensor, shape (B, C, H, W)
    labels : Tensor, int64, shape (B,)
    observation : Observation
    """
    if observation.terms.signs(bool(observation.errors)):
        return SIGNS
    if not observation.errors:
        return ""
    evidence = Evidence.gather([observation], "cpu", simulate=True).with_labels(labels[None].cpu())
    if not evidence.defended:
        return ""
    expected = min(expected_db(module_target(evidence), images, indifferent(images)))
    drowned = _drowned(evidence) if math.isnan(expected) else expected < RECOGNISABLE
    return HIDDEN if drowned else ""


def _drowned(evidence: Evidence) -> bool:
    """Return whether half of an update or more is what a defence is known to have added."""
    shares = []
    for name, error in evidence.errors.items():
        told = error.isfinite() & (evidence.gradient[name] != 0)
        whole = float(evidence.gradient[name][told].square().sum())
        if whole > 0:
            shares.append(min(1.0, float(error[told].square().sum()) / whole))
    return bool(shares) and sum(shares) / len(shares) > _DROWNED
