"""A gate before the head of a residual network: of a batch only few images pass it.

The last two residual blocks see, in the grids of 4x4 positions and fewer that such networks end
in, the whole image from every position. One channel measures it, one unit of the last block
compares that with a threshold, and where it stays below, the last ReLU is silent everywhere: the
image then sends no gradient below the head. Where it does not, the unit is, and the network is
the honest one but for a few channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from fedleak.attacks.fished import FLAG, head_name
from fedleak.errors import UnsupportedModelError
from fedleak.graph.capture import Graph, Node
from fedleak.graph.kinds import Kind
from fedleak.modules import copied

#: Channels of the last blocks that the gate takes: the measure at nine shifts, where all of the
#: image is seen, and a flag that is 1 for images that pass.
SHIFTS = tuple(product((-1, 0, 1), repeat=2))
INSIDE = 9
#: Positions on a side from which two convolutions of 3x3 see everything, from those inside.
_LARGEST = 4
#: How strongly a closed gate silences, and how far border positions are kept from deciding.
_CLOSED, _BORDER = 1e6, 1e3
#: Images looked at together.
_TOGETHER = 64


@dataclass(frozen=True)
class Ending:
    """The names of what a residual network ends in, in the order images pass it.

    Two blocks, ``relu(b2(c2(relu(b1(c1(x))))) + x)``, the first of them with a projection in
    the place of its last ``x``; then a mean over all positions, and the head.
    """

    inner: str
    inner_norm: str
    outer: str
    outer_norm: str
    projection_norm: str
    last_inner: str
    last_inner_norm: str
    last: str
    last_norm: str
    head: str
    grid: int

    @classmethod
    def of(cls, model: nn.Module, input_shape: tuple[int, int, int]) -> Ending:
        """Find it in a model.

        Raises
        ------
        UnsupportedModelError
            If the model ends in something else; the message says in what.
        """
        head = head_name(model, input_shape)
        graph = Graph.capture(copied(model), input_shape, 1)
        try:
            node = next(n for n in graph.nodes.values() if n.path == head)
            while node.kind is not Kind.POINTWISE:
                if node.kind not in (Kind.DENSE, Kind.RESHAPE, Kind.LINEAR):
                    raise LookupError(f"{node.path or node.name} ({node.kind.value})")
                (edge,) = node.inputs
                node = graph.nodes[edge]
            last, carried = _block(graph, node)
            before, projected = _block(graph, _solid(graph, carried))
            projection, _ = _walk(graph, projected, Kind.SCALE, Kind.CONVOLUTION)
        except (LookupError, ValueError) as error:
            why = f": {error.args[0]}" if error.args and isinstance(error, LookupError) else ""
            raise UnsupportedModelError(
                "feature fishing needs a network in evaluation mode that ends in two residual "
                f"blocks, the first with a projection, and a mean over positions{why}"
            ) from error
        grid = node.shape[-1]
        if len(node.shape) != 4 or node.shape[-2] != grid or grid > _LARGEST:
            raise UnsupportedModelError(
                f"feature fishing needs at most {_LARGEST}x{_LARGEST} positions before the head, "
                f"and the model has {node.shape[-2]}x{grid}"
            )
        for one in (*before, *last):
            shape = getattr(one.module, "weight", torch.zeros(0)).shape
            if one.kind is Kind.CONVOLUTION and one is not before[3]:
                plain = one.module.stride == (1, 1) and one.module.padding == (1, 1)
                if shape[2:] != (3, 3) or not plain or one.module.groups != 1:
                    raise UnsupportedModelError(
                        f"feature fishing needs convolutions of 3x3 in the last blocks, and "
                        f"{one.path!r} is another"
                    )
        outer_norm, outer, inner_norm, inner = (n.path for n in before)
        last_norm, last_layer, last_inner_norm, last_inner = (n.path for n in last)
        return cls(
            inner, inner_norm, outer, outer_norm, projection.path, last_inner, last_inner_norm,
            last_layer, last_norm, head, grid,
        )  # fmt: skip


def _solid(graph: Graph, edge: str) -> Node:
    """Return the node that makes an edge, behind what only hands it on."""
    node = graph.nodes[edge]
    while node.kind is Kind.RESHAPE and node.inputs:
        node = graph.nodes[node.inputs[0]]
    return node


def _walk(graph: Graph, edge: str, *kinds: Kind) -> list[Node]:
    """Return the nodes of these kinds that lead to an edge, the last one first."""
    found = []
    for kind in kinds:
        node = _solid(graph, edge)
        if node.kind is not kind:
            raise LookupError(f"{node.path or node.name} ({node.kind.value})")
        found.append(node)
        edge = node.inputs[0] if node.inputs else ""
    return found


def _block(graph: Graph, relu: Node) -> tuple[list[Node], str]:
    """Return a block's outer norm and layer and inner norm and layer, and its other summand."""
    if not _is_relu(relu):
        raise LookupError(f"{relu.path or relu.name} is no ReLU")
    (edge,) = relu.inputs
    add = graph.nodes[edge]
    if add.kind is not Kind.ADD or len(add.inputs) != 2:
        raise LookupError(f"{add.path or add.name} ({add.kind.value}), no sum of two")
    pattern = (Kind.SCALE, Kind.CONVOLUTION, Kind.POINTWISE, Kind.SCALE, Kind.CONVOLUTION)
    for branch, other in (add.inputs, add.inputs[::-1]):
        try:
            outer_norm, outer, act, inner_norm, inner = _walk(graph, branch, *pattern)
        except LookupError:
            continue
        if _is_relu(act):
            return [outer_norm, outer, inner_norm, inner], other
    raise LookupError(f"{add.path or add.name} adds no block of two convolutions")


def _is_relu(node: Node) -> bool:
    x = torch.tensor([-1.0, 2.0])
    try:
        return node.kind is Kind.POINTWISE and torch.equal(node([x], {}), x.relu())
    except (TypeError, RuntimeError):
        return False


def gated(
    model: nn.Module, ending: Ending, direction: Tensor, threshold: float
) -> dict[str, Tensor]:
    """Return the entries of a model's state that put the gate before its head.

    Parameters
    ----------
    model : nn.Module
        With the honest weights.
    ending : Ending
    direction : Tensor, shape (channels,)
        What is measured: its product with the inner activations, summed over positions. None of
        its entries is negative, the first is zero.
    threshold : float
        Images below it are kept out.
    """
    state = {k: v.detach().double().clone() for k, v in model.state_dict().items()}
    e = ending
    norms = (e.inner_norm, e.outer_norm, e.projection_norm, e.last_inner_norm, e.last_norm)
    eps = {name: float(model.get_submodule(name).eps) for name in norms}  # type: ignore[arg-type]
    taken = list(range(FLAG + 1))
    # One inner channel is 1 everywhere: summed by a convolution, it counts positions.
    state[f"{e.inner}.weight"][0] = 0
    _zero_bias(state, e.inner, [0])
    state[f"{e.inner_norm}.weight"][0], state[f"{e.inner_norm}.bias"][0] = 0, 1
    outer = state[f"{e.outer}.weight"]
    outer[taken] = 0
    _zero_bias(state, e.outer, taken)
    for channel, (row, column) in enumerate(SHIFTS):
        outer[channel, :, 1 + row, 1 + column] = direction
    outer[INSIDE, 0] = 1
    _identity(state, e.outer_norm, taken, eps)
    state[f"{e.outer_norm}.bias"][INSIDE] += 1 - min(3, e.grid) ** 2
    state[f"{e.projection_norm}.weight"][taken] = 0
    state[f"{e.projection_norm}.bias"][taken] = 0
    # The unit that compares, at positions inside; elsewhere it is silent.
    inner = state[f"{e.last_inner}.weight"]
    inner[:, taken] = 0
    inner[0] = 0
    _zero_bias(state, e.last_inner, [0])
    for shift in product((-2, -1, 0, 1, 2), repeat=2):
        at = max(-1, min(1, shift[0])), max(-1, min(1, shift[1]))
        inner[0, SHIFTS.index(at), 1 + shift[0] - at[0], 1 + shift[1] - at[1]] = -1
    inner[0, INSIDE, 1, 1] = _BORDER
    _identity(state, e.last_inner_norm, [0], eps)
    state[f"{e.last_inner_norm}.bias"][0] += threshold - _BORDER
    # It silences the last ReLU wherever it is next to: that is everywhere.
    last = state[f"{e.last}.weight"]
    size = (state[f"{e.last_norm}.running_var"] + eps[e.last_norm]).sqrt()
    weak = (state[f"{e.last_norm}.weight"] / size).abs() < 1e-3
    state[f"{e.last_norm}.weight"][weak] = size[weak]
    scale = state[f"{e.last_norm}.weight"] / size
    last[taken] = 0
    _zero_bias(state, e.last, taken)
    last[:, 0] = (-_CLOSED / scale)[:, None, None]
    _identity(state, e.last_norm, taken, eps)
    last[taken, 0] = -_CLOSED
    state[f"{e.last_norm}.bias"][FLAG] += 1
    return {k: v for k, v in state.items() if v.dim() > 0}


def _identity(
    state: dict[str, Tensor], norm: str, channels: Sequence[int], eps: Mapping[str, float]
) -> None:
    """Let a normalisation leave channels as they are, but for what its bias adds from now on."""
    state[f"{norm}.running_mean"][channels] = 0
    state[f"{norm}.running_var"][channels] = 1 - eps[norm]
    state[f"{norm}.weight"][channels] = 1
    state[f"{norm}.bias"][channels] = 0


def _zero_bias(state: dict[str, Tensor], layer: str, channels: Sequence[int]) -> None:
    if f"{layer}.bias" in state:
        state[f"{layer}.bias"][channels] = 0


def measured(model: nn.Module, ending: Ending, direction: Tensor, images: Tensor) -> Tensor:
    """Return what the gate would measure of images, shape (N,)."""
    kept: list[Tensor] = []
    model = copied(model).eval()
    like = next(model.parameters())
    handle = model.get_submodule(ending.inner_norm).register_forward_hook(
        lambda module, given, made: kept.append(made.relu().sum((2, 3)))
    )
    try:
        with torch.no_grad():
            for part in images.to(like).split(_TOGETHER):
                model(part)
    finally:
        handle.remove()
    return torch.cat(kept).double() @ direction
