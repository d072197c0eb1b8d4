"""The derivative by every image's logits, from a convolution near the head.

The blind kernel finds a batch's inputs and cotangents up to a mixture, which ReLU's zeros resolve
up to a number for each image. Where everything from there to the logits is linear but for the
one activation, a unit's cotangent is zero or what the image's logits make of it: that tells the
derivative by the logits, up to the same number, and the head's bias tells the numbers. A cotangent
that is known already tells it in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.graph.capture import Node
from fedleak.graph.kernels.refusal import Refused
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge, Known
from fedleak.graph.rules.derivatives import pulled_back
from fedleak.graph.rules.mixtures import resolved

#: Entries of a cotangent below this share of the largest are those of inactive units.
_ZERO = 1e-3
#: Relative misfit up to which an equation of float32 quantities is believed.
_HOLDS = 1e-3


def apply(knowledge: Knowledge) -> bool:
    """Find the derivative by the logits of a batch, unless it is known."""
    graph = knowledge.graph
    if graph.batch == 1 or graph.logits in knowledge.cotangents:
        return False
    head = graph.nodes[graph.logits]
    bias = knowledge.gradient_of(head, "bias") if head.kind is Kind.DENSE else None
    if bias is None or len(bias) <= graph.batch:
        return False
    for node in reversed(graph.nodes.values()):
        known = knowledge.cotangents.get(node.name)
        if known is not None or (
            node.kind is Kind.CONVOLUTION and node.name not in knowledge.blind
        ):
            maps = _from_logits(knowledge, node, len(bias))
            if maps is None:
                continue
            cotangents = _cotangents(knowledge, node) if known is None else known.value
            if cotangents is None:
                continue
            found = _logits(cotangents, maps, bias, _sums(knowledge, node, cotangents))
            if found is not None:
                error = ROUNDING * float(found.square().mean().sqrt())
                return knowledge.learn_cotangent(graph.logits, Known(found, error, "batch"))
    return False


def _cotangents(knowledge: Knowledge, node: Node) -> Tensor | None:
    """Return a convolution's cotangent by image, each up to a number."""
    try:
        return resolved(knowledge, node)[1]
    except Refused as refusal:
        knowledge.short[node.name] = str(refusal)
        return None


def _sums(knowledge: Knowledge, node: Node, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a bias next to a layer tells of the images' numbers: ``right = left @ numbers``.

    Images of one label have all but the same derivative by the logits, and the head's bias hardly
    tells their numbers apart. Which units are active differs.
    """
    above = [knowledge.graph.nodes[n] for n, _ in knowledge.graph.consumers[node.name]]
    for place in (node, *(above if len(above) == 1 else ())):
        bias = knowledge.gradient_of(place, "bias")
        if bias is None or place.kind not in (Kind.CONVOLUTION, Kind.SCALE):
            continue
        scale = torch.ones_like(bias)
        if place is not node:
            one = torch.ones_like(cotangents)
            scale = pulled_back(knowledge.graph, place, 0, one)[0].flatten(1)[:, 0]
        return bias * scale, cotangents.flatten(2).sum(2).mT
    return cotangents.new_zeros(0), cotangents.new_zeros(0, len(cotangents))


def _logits(
    cotangents: Tensor, maps: Tensor, bias: Tensor, sums: tuple[Tensor, Tensor]
) -> Tensor | None:
    """Return the derivative by the logits, (B, classes), each image's with its number."""
    # The classes' derivatives add up to zero, which the layers below need not tell.
    each = []
    for e in cotangents:
        active = e.abs() > _ZERO * e.abs().max()
        rows, right = maps[:, active].mT, e[active]
        level = rows.norm() / len(rows) ** 0.5
        rows = torch.cat([rows, level * torch.ones_like(rows[:1])])
        right = torch.cat([right, torch.zeros_like(right[:1])])
        g = torch.linalg.lstsq(rows, right[:, None]).solution[:, 0]
        if float((rows @ g - right).norm()) > _HOLDS * float(right.norm()):
            return None
        each.append(g)
    logits = torch.stack(each)
    left, right = logits.mT / bias.norm(), bias / bias.norm()
    if len(sums[0]):
        size = sums[0].norm().clamp_min(1e-300)
        left, right = torch.cat([left, sums[1] / size]), torch.cat([right, sums[0] / size])
    factors = torch.linalg.lstsq(left, right[:, None]).solution
    if float((left @ factors - right[:, None]).norm()) > _HOLDS:
        return None
    return logits * factors


def _from_logits(knowledge: Knowledge, node: Node, classes: int) -> Tensor | None:
    """Return what each class' logit makes of a layer's cotangent, with every unit active.

    Shape (classes, C_out, H_out, W_out), of one image; None where there is another way or
    anything between that depends on values.
    """
    graph, chain = knowledge.graph, []
    name, switches = node.name, 0
    while name != graph.logits:
        if len(graph.consumers[name]) != 1:
            return None
        ((above, place),) = graph.consumers[name]
        upper = graph.nodes[above]
        switches += upper.kind is Kind.POINTWISE
        if not (upper.kind.affine or upper.kind is Kind.POINTWISE) or switches > 1:
            return None
        chain.append((upper, place))
        name = above
    made = []
    for k in range(classes):
        e = torch.zeros(graph.nodes[graph.logits].shape, dtype=torch.float64)
        e = e.to(knowledge.gradient[graph.nodes[graph.logits].parameters[0]])
        e[:, k] = 1
        for upper, place in reversed(chain):
            e = e if upper.kind is Kind.POINTWISE else pulled_back(graph, upper, place, e)
        made.append(e[0])
    return torch.stack(made)
