"""The cotangent of a layer below a max pool, with an estimate of the images at hand.

No rule of its own: it needs images that were matched to what lies above.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.graph.activations import flat_outside
from fedleak.graph.capture import Node
from fedleak.graph.kernels.choices import Pooled, resolve_choices
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge, Known
from fedleak.graph.rules.masks import potential
from fedleak.graph.rules.mixtures import geometry_of

_NAME = "choices"
#: How many standard deviations an output of the pool must be off zero to be active.
_CLEAR = 30.0
#: Relative error that an estimate of the input is given.
_ESTIMATE = 1e-3
#: Positions beyond which no system is solved.
_MOST = 2500


def apply(knowledge: Knowledge, images: Tensor) -> tuple[bool, dict[str, Known]]:
    """Find the choices of one more max pool, those nearest to the head first.

    Parameters
    ----------
    knowledge : Knowledge
    images : Tensor, shape (B, C, H, W)
        The estimate, as the model sees it.

    Returns
    -------
    found : bool
        Whether a cotangent became known.
    nearer : dict of str to Known
        Better estimates, of edges below pools whose choices were not found.
    """
    graph, nearer = knowledge.graph, dict[str, Known]()
    for node in reversed(graph.nodes.values()):
        if node.kind is not Kind.CONVOLUTION or node.name in knowledge.cotangents:
            continue
        pooled = _pooled(knowledge, node)
        if pooled is None:
            continue
        (edge,) = node.inputs
        with torch.no_grad():
            found = resolve_choices(pooled, graph.run({graph.image: images}, [edge])[edge])
        if not found.explained:
            knowledge.short[node.name] = (
                f"{node.path}: no choices of the max pool explain its gradient, {found.worst:.1e} "
                "of a filter's is left"
            )
            error = _ESTIMATE * float(found.input.square().mean().sqrt())
            nearer[edge] = Known(found.input, error, _NAME)
            continue
        e, above = found.cotangent, potential(knowledge, node)
        error = (above[2] if above else ROUNDING) * float(e.square().mean().sqrt())
        return knowledge.learn_cotangent(node.name, Known(e, error, _NAME)), nearer
    return False, nearer


def _pooled(knowledge: Knowledge, node: Node) -> Pooled | None:
    """Return what is known of a convolution below a max pool, if that is enough."""
    graph, gradient = knowledge.graph, knowledge.gradient_of(node, "weight")
    above = potential(knowledge, node)
    if gradient is None or above is None or node.module.groups > 1:
        return None
    switches, full, _ = above
    pools = [s for s in switches if s.kind is Kind.MAX_POOL]
    known = knowledge.values.get(pools[0].name) if len(pools) == 1 else None
    rows = gradient.shape[0] * gradient[0, 0].numel()
    geometry = geometry_of(knowledge, node)
    positions = graph.batch * geometry.positions
    if known is None or rows < positions or positions > _MOST:
        return None
    (compared,) = pools[0].inputs
    rectified = [s for s in switches if s.kind is Kind.POINTWISE]
    if any(flat_outside(s.target, s.args) != (0.0, torch.inf) for s in rectified):
        return None
    active = known.value > _CLEAR * known.error if rectified else torch.ones_like(known.value) > 0
    active = active if known.mask is None else active & known.mask
    windows = _windows(pools[0], full.shape)
    each = full.transpose(0, 1).flatten(1)[:, windows[:, 0]]
    value, active = (t.transpose(0, 1).flatten(1) for t in (known.value, active))

    def entries(x: Tensor) -> Tensor:
        return graph.run({node.inputs[0]: x}, [compared])[compared]

    return Pooled(gradient.double(), geometry, windows, each * active, value, entries)


def _windows(pool: Node, shape: torch.Size) -> Tensor:
    """Return the positions, numbered over all images, that each output of a pool compares."""
    batch, _, high, wide = shape
    kernel = pool.target.kernel_size
    k, m = (kernel, kernel) if isinstance(kernel, int) else kernel
    numbers = torch.arange(batch * high * wide).reshape(batch, high, wide)
    return numbers.unfold(1, k, k).unfold(2, m, m).flatten(3).flatten(0, 2)
