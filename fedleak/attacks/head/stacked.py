"""What the head tells of stacked observations: their labels, known or inferred."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak.attacks.head import informed
from fedleak.attacks.head.labels import NO_HEAD, infer_labels, labels_with_rest
from fedleak.client.local_replay import typical_on_the_way
from fedleak.client.loss import PLAIN, CanonicalLoss
from fedleak.client.replay import Replay
from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.observation import Observation
from fedleak.systems import Gradients


def head_of(gradient: Gradients, errors: Gradients, replay: Replay) -> informed.Head | None:
    """Return the head's part of updates whose defence is known; None without such a head."""
    weight = f"{replay.head}.weight"
    if replay.head is None or weight not in gradient:
        return None
    bias, head = f"{replay.head}.bias", replay.model.get_submodule(replay.head)
    zero = gradient[weight].new_zeros(gradient[weight].shape[:2])
    offset = getattr(head, "bias", None)
    return informed.Head(
        gradient[weight],
        errors[weight],
        gradient.get(bias, zero),
        errors.get(bias, torch.full_like(zero, torch.inf)),
        replay.parameters[weight],
        zero[0] if offset is None else offset.detach(),
        replay.loss,
    )


def observed_labels(
    observations: Sequence[Observation], gradient: Gradients, errors: Gradients, replay: Replay
) -> Tensor:
    """Return the labels of each update, known or inferred, shape (N, B).

    Raises
    ------
    InvalidInputError
        If known labels are too many, too few or out of range.
    UnsupportedModelError
        If they are neither known nor inferable.
    """
    images = observations[0].num_images
    known = [o.labels for o in observations]
    for labels in known:
        if labels is not None and len(labels) != images:
            raise InvalidInputError(f"{len(labels)} labels are known of {images} images")
        if labels is not None and not all(0 <= y < replay.classes for y in labels):
            raise InvalidInputError(
                f"known labels {labels} do not lie in 0 ... {replay.classes - 1}"
            )
    if all(labels is not None for labels in known):
        inferred = torch.zeros(len(known), images, dtype=torch.int64)
    else:
        bias = gradient.get(replay.label_bias) if replay.label_bias else None
        weight = gradient.get(f"{replay.head}.weight") if replay.head is not None else None
        if bias is not None and not replay.exact_bias and images > 1:
            bias = None  # of each image another share: counts cannot be read from their sum
        typical, first = None, observations[0]
        if isinstance(replay.loss, CanonicalLoss) and images > 1:
            typical = typical_probabilities(replay)
            if first.terms.trained is not None and first.terms.steps > 1:
                own = first.terms.own
                typical = typical_on_the_way(
                    replay, gradient, first.terms.trained, own, grey(replay)
                )
        if images == 1 and bias is not None and weight is not None and replay.loss != PLAIN:
            inferred = _consistent_labels(gradient, errors, replay)
        elif errors and images == 1:
            inferred = _informed_labels(gradient, errors, replay)
        elif typical is not None and bias is not None and (rest := _rest_of(first, replay)):
            each = zip(bias, typical.expand(len(bias), -1), strict=True)
            inferred = torch.stack([labels_with_rest(g, *rest, p) for g, p in each])
        else:
            inferred = infer_labels(bias, weight, images, typical, replay.loss)
        # Which client of a sum had which label is not known: spread them.
        inferred = inferred.reshape(len(known), -1, first.clients).mT.flatten(1)
    rows = [
        torch.tensor(y, device=inferred.device) if y is not None else inferred[n]
        for n, y in enumerate(known)
    ]
    return torch.stack(rows).to(replay.device)


#: By how much more images of a last batch must count than others to be counted apart. The counts
#: of images that count alike are whole numbers, which tells more than a little inequality costs.
_UNEVEN = 1.5


def _rest_of(
    observation: Observation, replay: Replay
) -> tuple[tuple[int, int], tuple[float, float]] | None:
    """Return the numbers of images in full batches and in a last one that counts for more.

    And what one of either counts; None where there is no such batch.
    """
    training, own = observation.terms.trained, observation.terms.own
    if training is None or not own > training.batch_size or not own % training.batch_size:
        return None
    if training.epochs > 1 or observation.clients > 1:  # who was in the last batch is a mean
        return None
    if replay.loss != PLAIN or training.update_rule.signs:  # steps are no means over images
        return None
    last, part = own % training.batch_size, training.pace(own)[-1][0]
    sizes, counts = (own - last, last), ((1 - part) / (own - last), part / last)
    return (sizes, counts) if counts[1] > _UNEVEN * counts[0] else None


def _consistent_labels(gradient: Gradients, errors: Gradients, replay: Replay) -> Tensor:
    """Return the labels of single images under any loss, shape (N, 1).

    Of all labels the one with which the loss, at the logits that the head's gradient tells, makes
    what is most in the direction of the bias gradient: its factor need not be known.
    """
    errors = errors or {k: torch.zeros_like(g) for k, g in gradient.items()}
    head = head_of(gradient, errors, replay)
    if head is None:
        raise UnsupportedModelError(NO_HEAD)
    logits, told = informed.logits_of(head), head.bias_errors.isfinite()
    observed = torch.where(told, head.bias, 0.0)
    found = []
    for y in range(replay.classes):
        label = torch.full((len(logits),), y, device=logits.device)
        made = torch.where(told, replay.loss.alone(logits, label), 0.0)
        sizes = (made.norm(dim=1) * observed.norm(dim=1)).clamp_min(1e-300)
        found.append((made * observed).sum(1) / sizes)
    return torch.stack(found, 1).argmax(1, keepdim=True)


def _informed_labels(gradient: Gradients, errors: Gradients, replay: Replay) -> Tensor:
    """Return the labels of single images, from what a known defence left, shape (N, 1).

    The label's is the only negative entry of the head's bias gradient. Where it is lost,
    the label is the one whose gradients at grey images point most in the direction of what
    is left: all layers below the head are given ``W^T (p - y)``, mostly the label's row.
    """
    head = head_of(gradient, errors, replay)
    if head is None:
        raise UnsupportedModelError(NO_HEAD)
    kept = head.bias  # zero where it is lost; an entry of unknown size has still its sign
    least, inferred = kept.min(1, keepdim=True)
    doubtful = (least >= 0)[:, 0]
    if not bool(doubtful.any()):
        return inferred
    told = {k: e[doubtful].flatten(1).isfinite().to(kept) for k, e in errors.items()}
    images = grey(replay)[:, None]
    found = []
    for y in range(replay.classes):
        with torch.no_grad():
            made = replay(images, torch.full((len(images), 1), y, device=kept.device)).gradients
        cosines = torch.zeros(len(inferred[doubtful]), len(images)).to(kept)
        for name, mask in told.items():
            target = torch.where(mask > 0, gradient[name][doubtful].flatten(1), 0.0)
            m = made[name].flatten(1)
            sizes = target.norm(dim=1, keepdim=True) * (mask @ m.square().mT).sqrt()
            cosines += target @ m.mT / sizes.clamp_min(1e-300)
        found.append(cosines.amax(1))
    inferred[doubtful] = torch.stack(found, 1).argmax(1, keepdim=True)
    return inferred


def typical_probabilities(replay: Replay) -> Tensor:
    """Return the class probabilities to expect: half those of smooth random images, half even.

    Of 18 batches of a trained network, the true label counts were by the 44th candidate with
    such a mixture; with the model's probabilities of grey images alone, by the 104th.
    """
    assert isinstance(replay.loss, CanonicalLoss)  # of others labels are not counted
    channels, *size = replay.input_shape
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(64, channels, 4, 4, generator=generator).to(replay.device, replay.dtype)
    images = F.interpolate(coarse, tuple(size), mode="bilinear")
    with torch.no_grad():
        p = replay.loss.link(replay.model(images)).mean(0)
    return 0.5 * p + 0.5 * replay.loss.link(torch.zeros_like(p))


def grey(replay: Replay) -> Tensor:
    """Return grey images of every brightness, shape (9, C, H, W)."""
    levels = torch.linspace(0, 1, 9, dtype=replay.dtype, device=replay.device)
    return levels.reshape(-1, 1, 1, 1).expand(-1, *replay.input_shape)
