"""Look at updates before they are attacked, and take into account what is seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedleak.attacks.suspicions.head import far_fewer, one_image
from fedleak.attacks.suspicions.replies import alike, mistaken
from fedleak.attacks.suspicions.seen import Seen
from fedleak.client.replay import Replay
from fedleak.observation import Observation
from fedleak.precision import WEIGHT
from fedleak.systems import Gradients


def examine(
    observations: Sequence[Observation], gradient: Gradients, replay: Replay
) -> tuple[Gradients, list[Seen], Replay]:
    """Return gradients in the unit that was declared, what was seen of each update, and the client.

    That is ``replay``, but where all updates show one other loss than was declared.

    Parameters
    ----------
    observations : sequence of Observation
        Of attackers who know of no defence: what a defence does to an update is no news to one
        who does.
    gradient : dict of Tensor, shape (N, *parameter)
    replay : Replay
    """
    found = []
    rows: list[Gradients] = []
    for n, observation in enumerate(observations):
        own = {k: g[n] for k, g in gradient.items()}
        own, seen = _one(observation, own, replay)
        found.append(seen)
        rows.append(own)
    losses = {seen.loss for seen in found}
    other = next(iter(losses))
    if len(losses) == 1 and other is not None:
        replay = replay.with_loss(other)
    elif len(losses) > 1:
        found = [s if s.loss is None else Seen(s.factor, doubts=s.doubts + s.notes) for s in found]
    return {k: torch.stack([r[k] for r in rows]) for k in gradient}, found, replay


def _one(observation: Observation, own: Gradients, replay: Replay) -> tuple[Gradients, Seen]:
    terms, trained = observation.terms, observation.terms.trained
    if trained is not None and trained.update_rule.signs:
        return own, Seen()
    scale = None if trained is None else trained.rate * trained.gain(terms.own)
    seen = alike(own)
    if terms.shared == "gradient" or scale is not None:
        other = mistaken(own, replay.parameters, scale)
        if other is not None:
            note = (
                "a gradient was declared, and weights came"
                if scale is None
                else "weights were declared, and their change came"
            )
            own, seen = other, seen.and_(Seen(notes=(note,)))
    head = replay.head
    if seen.doubts or head is None:
        return own, seen
    if terms.num_images > 1 and f"{head}.weight" in own:
        of_sent = float(replay.parameters[f"{head}.weight"].square().mean().sqrt())
        rounding = 0.0 if scale is None else WEIGHT * of_sent / scale
        return own, seen.and_(far_fewer(own[f"{head}.weight"], terms.num_images, rounding))
    if terms.num_images > 1 or terms.steps > 1:
        return own, seen
    weight, bias = own.get(f"{head}.weight"), own.get(f"{head}.bias")
    if weight is None or bias is None:
        return own, seen
    sent, offset = replay.parameters[f"{head}.weight"], replay.parameters[f"{head}.bias"]
    rounding = 0.0 if scale is None else WEIGHT * float(offset.square().mean().sqrt()) / scale
    label = None if observation.labels is None else observation.labels[0]
    factor = one_image(weight, bias, sent, offset, replay.loss, label, rounding)
    if terms.shared == "weights" and trained is None:  # no unit was declared
        factor = Seen(factor.factor, doubts=factor.doubts)
    return {k: v / factor.factor for k, v in own.items()}, seen.and_(factor)
