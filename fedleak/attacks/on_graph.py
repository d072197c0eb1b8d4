"""One update, solved on the graph of its model."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from fedleak import deadline
from fedleak.attacks.base import Reconstruction
from fedleak.attacks.determined import undetermined
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.head.batch import Demixed
from fedleak.attacks.packaging import package, snapped
from fedleak.errors import TimeLimitError, UnsupportedModelError
from fedleak.graph.capture import Graph
from fedleak.graph.certificate import certify
from fedleak.graph.knowledge import ROUNDING, Knowledge, Known, spread
from fedleak.graph.match import match_images, unseen
from fedleak.graph.rules import RULES
from fedleak.graph.targets import frontier
from fedleak.modules import mathematical
from fedleak.priors import Prior
from fedleak.systems.activations import Clamp
from fedleak.systems.pooling import MaxPool

#: Share of the time that is left which the graph may take, before other ways are tried.
_SHARE, _SHARE_DEFENDED = 0.7, 0.4


def why_not(evidence: Evidence) -> str:
    """Return why the graph's rules do not cover an update; empty where they do."""
    if evidence.simulated is not None:
        return "the rules on the model's graph cover one step"
    if evidence.rescales == "tensor":
        return "the rules on the model's graph do not cover tensors with a factor each"
    return ""


def flat(evidence: Evidence) -> bool:
    """Return whether layers of a chain lose values: ReLU and its kin, max pooling.

    The chain's own solver goes from layer to layer, and stops there; the graph's does not.
    """
    return any(isinstance(layer, (Clamp, MaxPool)) for layer in evidence.chain.layers)


def solve(evidence: Evidence, prior: Prior, batch: Demixed | None = None) -> Reconstruction | str:
    """Solve one update on the graph of its model.

    Parameters
    ----------
    evidence : Evidence
    prior : Prior
    batch : Demixed, optional
        The images told apart at the head, where they are several.

    Returns
    -------
    Reconstruction or str
        Or why there is none.
    """
    if reason := why_not(evidence):
        return reason
    try:
        graph = Graph.capture(
            evidence.replay.model, evidence.terms.input_shape, evidence.num_images
        )
    except UnsupportedModelError as error:
        return str(error)
    gradient = {name: g[0] for name, g in evidence.gradient.items()}
    rounding = {n: math.hypot(evidence.rounding(n), _noise(evidence, n)) for n in gradient}
    knowledge = Knowledge(graph, gradient, {n: e for n, e in rounding.items() if e})
    if batch is not None:
        _tell(knowledge, batch)
    try:
        with deadline.part(_SHARE_DEFENDED if evidence.defended else _SHARE), mathematical():
            spread(knowledge, RULES)
            if not frontier(knowledge)[0]:
                return "nothing is known above the image"
            seen = evidence.replay.client.seen
            images = unseen(match_images(knowledge, prior, seen=seen), seen)
    except TimeLimitError as error:
        return str(error)
    labels = _labels(evidence, knowledge) if batch is None else batch.labels[None]
    evidence = evidence.with_labels(labels)
    images = snapped(evidence, images[None])[0]
    made = evidence.replay(images[None], evidence.labels).gradients
    whole = {n: g[0].detach() for n, g in made.items()}
    proof = certify(knowledge, whole, rounding, seen(images))
    if evidence.defended:  # what the defence hides, other images may explain as well
        why = "the update is defended: nothing is certified"
        proof = replace(proof, certified=False, open=[*proof.open, why])
    left = undetermined(evidence, images, evidence.labels) if proof.certified else 0
    if left:
        proof = replace(
            proof,
            certified=False,
            undetermined=True,
            open=[
                *proof.open,
                f"the image: {left} directions of its {images.numel()} unknowns are not told by "
                "the update, and the prior filled them in",
            ],
        )
    details = {
        "by": "graph",
        "solver": "gauss-newton",
        "prior": str(prior),
        "layers": [],
        **proof.details(),
    }
    if batch is not None:
        made_there = graph.run({graph.image: seen(images)}, graph.nodes[graph.logits].inputs)
        details["head"] = batch.report(*made_there.values())
    return package(evidence, images[None], [details])[0]


def _tell(knowledge: Knowledge, batch: Demixed) -> None:
    """Note the head's inputs and the derivatives by its outputs, image by image."""
    head = knowledge.graph.nodes[knowledge.graph.logits]
    known = Known(batch.inputs, float(batch.deviation.max()), "demixed head")
    knowledge.learn_value(head.inputs[0], known)
    relative = max(ROUNDING, known.relative)
    error = relative * float(batch.cotangents.square().mean().sqrt())
    knowledge.learn_cotangent(head.name, Known(batch.cotangents, error, "demixed head"))


def _noise(evidence: Evidence, name: str) -> float:
    """Return the standard deviation of the noise on a tensor's entries; 0 where it is not one.

    What pruning or quantisation leave is no noise: there the rules take what was received.
    """
    if name not in evidence.errors:
        return 0.0
    error = evidence.errors[name]
    least, most = float(error.min()), float(error.max())
    return most if math.isfinite(most) and least >= 0.5 * most else 0.0


def _labels(evidence: Evidence, knowledge: Knowledge) -> Tensor:
    """Return the labels, (1, B): those of a batch by the derivative by each image's logits."""
    logits = knowledge.cotangents.get(knowledge.graph.logits)
    if evidence.num_images == 1 or logits is None:
        return evidence.labels
    return logits.value.argmin(1)[None]
