r"""The input of a layer from its weight's gradient and its cotangent: ``K(e) x = G``.

For every input channel the same matrix acts on the channel's pixels (those of all images): one row
for every output channel and kernel offset, one factorisation, a right side for every channel.
Layers that take the same edge (a block's first convolution and its shortcut) add their rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.graph.capture import Node
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge, Known
from fedleak.graph.rules.masks import TOGETHER, mend

#: Relative error up to which a solution counts as known.
_KNOWN = 1e-3
#: Residual, in units of the rounding that is expected, above which nothing is believed.
_FACTOR = 20.0
#: Positions beyond which no matrix is built.
_MOST = 5000


@dataclass
class Solution:
    """Least squares for the positions of one edge.

    Attributes
    ----------
    value : Tensor, shape (positions, C_in)
    residuals : list of Tensor, shape (C_out,)
        Of every layer: the root mean square residual of each output channel's rows, relative to
        their size.
    error : float
        Standard deviation of an entry of ``value``.
    redundant : bool
        Whether there are rows enough for the residuals to say something.
    """

    value: Tensor
    residuals: list[Tensor]
    error: float
    redundant: bool

    @property
    def worst(self) -> float:
        return max((float(r.max()) for r in self.residuals), default=0.0)


#: A layer's matrix and its right sides.
System = tuple[Tensor, Tensor]


def apply(knowledge: Knowledge) -> bool:
    """Solve for every unknown edge whose layers have known cotangents."""
    for edge in reversed(knowledge.graph.nodes):
        if knowledge.value(edge) is None:
            layers = [n for n in _layers(knowledge, edge) if n.name not in knowledge.short]
            if layers and _solve_edge(knowledge, edge, layers):
                return True
    return _check_known(knowledge)


def _layers(knowledge: Knowledge, edge: str) -> list[Node]:
    """Return the layers with a gradient of their own that take an edge, cotangent known."""
    found = []
    for name, _ in knowledge.graph.consumers[edge]:
        node = knowledge.graph.nodes[name]
        kinds = (Kind.CONVOLUTION, Kind.DENSE)
        if node.kind not in kinds or name not in knowledge.cotangents:
            continue
        if knowledge.gradient_of(node, "weight") is not None and groups_of(node) == 1:
            found.append(node)
    return found


def groups_of(node: Node) -> int:
    return int(getattr(node.module, "groups", 1))


def _solve_edge(knowledge: Knowledge, edge: str, layers: list[Node]) -> bool:
    shape = knowledge.graph.nodes[edge].shape
    systems = [system(knowledge, node, shape) for node in layers]
    rows, unknowns = sum(len(m) for m, _ in systems), systems[0][0].shape[1]
    names = ", ".join(n.path for n in layers)
    if rows < unknowns or unknowns > _MOST:
        why = f"{rows} gradient rows of {names} for {unknowns} positions"
        knowledge.short.update({n.name: why for n in layers})
        return True
    relative = max(knowledge.cotangents[n.name].relative for n in layers)
    expected = _FACTOR * (ROUNDING + relative)
    return _accept(knowledge, edge, layers, systems, expected)


def _accept(
    knowledge: Knowledge, edge: str, layers: list[Node], systems: list[System], expected: float
) -> bool:
    """Believe a solution that explains its rows to rounding; else look for wrong masks."""
    kept = [torch.ones(n.shape[1], dtype=torch.bool) for n in layers]
    found = solve(systems, kept)
    while found.redundant and found.worst > expected:
        # Wrong channels show; the worst are left out until the others agree.
        bound = max(expected, TOGETHER * found.worst)
        kept = [k & (r <= bound) for k, r in zip(kept, found.residuals, strict=True)]
        found = solve(systems, kept)
    shape = knowledge.graph.nodes[edge].shape
    size = float(found.value.square().mean().sqrt())
    error = max(found.error, ROUNDING * size)
    value = arranged(found.value, layers[0], shape)
    left_out = [bool((~k).any()) for k in kept]
    if any(left_out):
        if found.redundant and error < _KNOWN * size and edge not in knowledge.mended:
            changed = [
                mend(knowledge, node, value, ~k)
                for node, k in zip(layers, kept, strict=True)
                if bool((~k).any())
            ]
            knowledge.mended.add(edge)
            if any(changed):
                return True
        why = f"gradient rows of {layers[0].path} contradict each other"
    elif error > _KNOWN * size:
        why = f"the gradient rows of {layers[0].path} leave positions open"
    else:
        if found.redundant:
            knowledge.checked |= {n.name for n in layers}
        else:
            knowledge.short.update({n.name: "as many rows as positions" for n in layers})
        return knowledge.learn_value(edge, Known(value, error, "gradient rows"))
    knowledge.short.update({n.name: why for n in layers})
    return True


def _check_known(knowledge: Knowledge) -> bool:
    """Compare the gradients of layers whose input and cotangent came from elsewhere."""
    new = False
    for edge in knowledge.graph.nodes:
        known = knowledge.values.get(edge)
        if known is None or not known.whole:
            continue
        for node in _layers(knowledge, edge):
            if node.name in knowledge.checked or node.name in knowledge.short:
                continue
            matrix, right = system(knowledge, node, known.value.shape)
            rest = right - matrix @ positions(known.value, node)
            off = float(rest.norm() / right.norm())
            if off <= _FACTOR * (ROUNDING + knowledge.cotangents[node.name].relative + known.relative):
                knowledge.checked.add(node.name)
            else:
                knowledge.short[node.name] = f"its gradient is missed by {off:.1e}"
            new = True
    return new


def solve(systems: list[System], kept: list[Tensor]) -> Solution:
    """Solve stacked systems by least squares, every row in units of its output channel.

    Parameters
    ----------
    systems : list of (matrix, right side)
        Shapes (C_out * offsets, positions) and (C_out * offsets, C_in), channel by channel.
    kept : list of Tensor of bool, shape (C_out,)
        The channels that are used; residuals are those of all.
    """
    matrices, rights, used = [], [], []
    for (matrix, right), keep in zip(systems, kept, strict=True):
        size = matrix.reshape(len(keep), -1).norm(dim=1)
        live = size > 1e-9 * size.max()
        each = len(matrix) // len(keep)
        weight = torch.where(live, 1 / size, 0.0).repeat_interleave(each)[:, None]
        matrices.append(matrix * weight)
        rights.append(right * weight)
        used.append((live & keep.to(live.device)).repeat_interleave(each))
    matrix, right, use = torch.cat(matrices), torch.cat(rights), torch.cat(used)
    rows, unknowns = int(use.sum()), matrix.shape[1]
    if rows < unknowns:
        return Solution(right.new_zeros(unknowns, right.shape[1]), [], torch.inf, False)
    q, r = torch.linalg.qr(matrix[use])
    u, s, vh = torch.linalg.svd(r)
    inverse = torch.where(s > 1e-9 * s[0], 1 / s.clamp_min(1e-300), 0.0)
    value = vh.mT @ (inverse[:, None] * (u.mT @ (q.mT @ right[use])))
    rest = (right - matrix @ value).square().sum(1)
    size = right.square().sum(1)
    residuals, begin = [], 0
    for keep in kept:
        end = begin + len(keep) * ((len(systems[len(residuals)][0])) // len(keep))
        off, whole = (t[begin:end].reshape(len(keep), -1).sum(1) for t in (rest, size))
        residuals.append((off / whole.clamp_min(1e-2 * whole.mean())).sqrt())
        begin = end
    freedom = max(1, rows - unknowns) * right.shape[1]
    sigma = (rest[use].sum() / freedom).sqrt().maximum(ROUNDING * size[use].mean().sqrt() / right.shape[1] ** 0.5)
    amplified = inverse.square().mean().sqrt() if bool((inverse > 0).all()) else torch.inf
    return Solution(value, residuals, float(sigma * amplified), rows >= 1.1 * unknowns + 1)


def system(knowledge: Knowledge, node: Node, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the matrix and the right sides of a layer's gradient rows."""
    gradient = knowledge.gradient_of(node, "weight")
    assert gradient is not None
    e = knowledge.cotangents[node.name].value
    if node.kind is Kind.DENSE:
        return e.flatten(0, -2).mT, gradient
    module = node.module
    return gradient_matrix(e, shape, module), gradient.movedim(1, 3).flatten(0, 2)


def gradient_matrix(e: Tensor, shape: tuple[int, ...], module: torch.nn.Conv2d) -> Tensor:
    """Return ``K(e)`` of one input channel, shape (C_out * kernel, B * H * W).

    Parameters
    ----------
    e : Tensor, shape (B, C_out, H_out, W_out)
        The derivative by the convolution's output.
    shape : tuple of int
        Shape (B, C_in, H, W) of its input.
    module : nn.Conv2d
    """
    batch, _, height, width = shape
    (kh, kw), (sy, sx) = module.kernel_size, module.stride
    (py, px), (dy, dx) = module.padding, module.dilation
    ho, wo = e.shape[2:]
    out = e.new_zeros(e.shape[1], kh, kw, batch, height + 2 * py, width + 2 * px)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dy, i * dy + sy * (ho - 1) + 1, sy)
            columns = slice(j * dx, j * dx + sx * (wo - 1) + 1, sx)
            out[:, i, j, :, rows, columns] = e.movedim(1, 0)
    inside = out[..., py : py + height, px : px + width]
    return inside.reshape(e.shape[1] * kh * kw, -1)


def positions(value: Tensor, node: Node) -> Tensor:
    """Return an edge's value by position, shape (positions, C_in)."""
    if node.kind is Kind.DENSE:
        return value.flatten(0, -2)
    return value.movedim(1, 3).flatten(0, 2)


def arranged(value: Tensor, node: Node, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`positions`."""
    if node.kind is Kind.DENSE:
        return value.reshape(shape)
    batch, channels, height, width = shape
    return value.reshape(batch, height, width, channels).movedim(3, 1)
