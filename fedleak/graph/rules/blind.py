"""A convolution's input and cotangent from its weight's gradient alone.

The blind kernel finds both up to one factor. It is told by the cotangent that the layer would have
with every unit of the activation above active, and every entry of a pool's window the largest:
entry by entry the true one is that, or zero. In a bottleneck that is known of the next convolution
only: its input follows from this one's, and its cotangent from its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.graph.capture import Node
from fedleak.graph.kernels.blind import blind_criterion
from fedleak.graph.kernels.refusal import Refused
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge, Known
from fedleak.graph.rules.masks import cotangent_rows, potential
from fedleak.graph.rules.mixtures import geometry_of, resolved

#: How often factors are found anew that constants between two convolutions disturb.
_ROUNDS = 8


def apply(knowledge: Knowledge) -> bool:
    """Solve one convolution whose cotangent is not known; those nearest to the head first."""
    for node in reversed(knowledge.graph.nodes.values()):
        if node.kind is Kind.CONVOLUTION and _open(knowledge, node) and _solve(knowledge, node):
            return True
    return False


def _open(knowledge: Knowledge, node: Node) -> bool:
    known = node.name in knowledge.cotangents or knowledge.value(node.inputs[0]) is not None
    return not known and node.name not in knowledge.blind


def _solve(knowledge: Knowledge, node: Node) -> bool:
    gradient = knowledge.gradient_of(node, "weight")
    judge = _judge(knowledge, node)
    if gradient is None or judge is None:
        return False
    geometry = geometry_of(knowledge, node)
    out, channels = gradient.shape[:2]
    if not blind_criterion(geometry, out, channels, knowledge.graph.batch).holds:
        return False
    knowledge.blind.add(node.name)
    try:
        inputs, cotangents, relative = resolved(knowledge, node)
        value, slopes = _placed(knowledge, judge, node, inputs, cotangents)
    except Refused as refusal:
        knowledge.short[node.name] = str(refusal)
        return False
    e = judge.full * slopes
    error = max(relative, ROUNDING) * float(value.square().mean().sqrt())
    size = float(e.square().mean().sqrt())
    knowledge.learn_cotangent(judge.node.name, Known(e, judge.relative * size, "blind convolution"))
    seen = geometry.seen.reshape(geometry.size).to(value.device).expand_as(value)
    mask = None if bool(seen.all()) else seen
    return knowledge.learn_value(node.inputs[0], Known(value, error, "blind convolution", mask))


@dataclass(frozen=True, eq=False)
class _Judge:
    """The layer whose cotangent tells the factors.

    Attributes
    ----------
    node : Node
        The convolution itself, or the next one above.
    full : Tensor
        Its cotangent with every unit active.
    relative : float
        The relative error of that.
    """

    node: Node
    full: Tensor
    relative: float


def _judge(knowledge: Knowledge, node: Node) -> _Judge | None:
    """Find where a convolution's factor shows: above it, or above the next convolution."""
    above = potential(knowledge, node)
    if above is not None:
        return _Judge(node, *above[1:])
    graph, name = knowledge.graph, node.name
    while len(graph.consumers[name]) == 1:
        upper = graph.nodes[graph.consumers[name][0][0]]
        if upper.kind is Kind.CONVOLUTION:
            above = potential(knowledge, upper)
            whole = upper.module.groups == 1 and knowledge.gradient_of(upper, "weight") is not None
            return _Judge(upper, *above[1:]) if above is not None and whole else None
        if upper.kind not in (Kind.SCALE, Kind.POINTWISE):
            return None
        name = upper.name
    return None


def _placed(
    knowledge: Knowledge, judge: _Judge, node: Node, inputs: Tensor, cotangents: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the inputs with their factors, in the judge's order of images, and its slopes.

    What lies between a convolution and the next one may add constants: there the factors are
    found by repetition.
    """
    for _ in range(_ROUNDS if judge.node is not node else 1):
        if judge.node is not node:
            cotangents = _above(knowledge, judge.node, node.inputs[0], inputs)
        values, slopes, left, factors = [], [], list(range(len(inputs))), []
        for potential_ in judge.full:
            # The images come in an arbitrary order: each potential takes the one that fits best.
            off, best = min((_fit(cotangents[b], potential_)[0], b) for b in left)
            left.remove(best)
            _, factor, slope = _fit(cotangents[best], potential_)
            values.append(inputs[best] * factor)
            slopes.append(slope)
            factors.append(factor)
        inputs = torch.stack(values)
        if max(abs(f - 1) for f in factors) < ROUNDING:
            break
    if off > 1e-2:
        raise Refused(f"slopes found blindly are off whole numbers by {off:.1e}")
    return inputs, torch.stack(slopes)


def _above(knowledge: Knowledge, upper: Node, edge: str, value: Tensor) -> Tensor:
    """Return the cotangent of a convolution above, by its gradient rows, if an edge has a value."""
    gradient = knowledge.gradient_of(upper, "weight")
    assert gradient is not None
    (below,) = upper.inputs
    made = knowledge.graph.run({edge: value}, [below])[below]
    taken = geometry_of(knowledge, upper).patches(made).shape
    if taken[0] * taken[3] > taken[1] * taken[2]:
        raise Refused(f"{upper.path}: fewer inputs than positions")
    rows = cotangent_rows(upper, made, gradient, gradient.new_ones(len(gradient)).bool())
    batch, _, *grid = upper.shape
    return rows.reshape(len(rows), batch, *grid).movedim(0, 1)


def _fit(e: Tensor, full: Tensor) -> tuple[float, float, Tensor]:
    """Return how far slopes are off whole numbers, the number that ``e`` is off, and the slopes."""
    ratio = e / torch.where(full != 0, full, torch.inf)
    weight = full.square()
    # Entries are zero or one number: the mean over those that are clearly not zero.
    largest = ratio.flatten()[ratio.abs().argmax()]
    clear = ratio / largest > 0.5
    factor = (weight * ratio)[clear].sum() / weight[clear].sum()
    slopes = ratio / factor
    off = ((slopes - slopes.round()).square() * weight).sum().sqrt() / weight.sum().sqrt()
    return float(off), float(factor), slopes.round()
