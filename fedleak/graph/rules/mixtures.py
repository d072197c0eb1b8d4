"""What the blind kernel finds of a layer, its mixture of images resolved."""

from __future__ import annotations

from torch import Tensor

from fedleak.graph.capture import Node
from fedleak.graph.kernels.blind import blind_convolution
from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kernels.mixture import unmix
from fedleak.graph.kernels.refusal import Refused
from fedleak.graph.knowledge import Knowledge


def geometry_of(knowledge: Knowledge, node: Node) -> Geometry:
    """Return the geometry of a convolution of the graph."""
    shape = knowledge.graph.nodes[node.inputs[0]].shape
    return Geometry.of(node.module, (shape[2], shape[3]))


def resolved(knowledge: Knowledge, node: Node) -> tuple[Tensor, Tensor, float]:
    """Return a convolution's inputs and cotangents, each image's up to a number and its inverse.

    Images are in an arbitrary order.

    Returns
    -------
    inputs : Tensor, shape (B, C_in, H, W)
    cotangents : Tensor, shape (B, C_out, H_out, W_out)
    error : float
        Relative, of the inputs.

    Raises
    ------
    Refused
        The gradient does not tell them.
    """
    if node.name not in knowledge.resolved:
        knowledge.resolved[node.name] = _resolve(knowledge, node)
    found = knowledge.resolved[node.name]
    if isinstance(found, Refused):
        raise found
    return found


def _resolve(knowledge: Knowledge, node: Node) -> tuple[Tensor, Tensor, float] | Refused:
    gradient, images = knowledge.gradient_of(node, "weight"), knowledge.graph.batch
    if gradient is None:
        return Refused(f"{node.path}: no gradient of its weight")
    try:
        found = blind_convolution(gradient, geometry_of(knowledge, node), images)
        if images == 1:
            return found.inputs, found.cotangents, found.error
        apart = unmix(found.inputs)
    except Refused as refusal:
        return refusal
    error = (found.error**2 + apart.error**2) ** 0.5
    return apart.images, apart.cotangents(found.cotangents), error
