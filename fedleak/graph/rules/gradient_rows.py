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
from fedleak.graph.kernels.geometry import Geometry
from fedleak.graph.kernels.rows import cotangent_matrix, least_squares
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import ROUNDING, Knowledge, Known
from fedleak.graph.rules.masks import mend

#: Relative error up to which a solution counts as known.
_KNOWN = 1e-3
#: Residual, in units of the rounding that is expected, above which nothing is believed.
_FACTOR = 20.0
#: Part of the worst residual from which channels are left out together with the worst.
_TOGETHER = 0.3
#: Rows for each unknown up to which wrong channels are looked for by what no input explains: that
#: is to be no more than this, in expected errors, in at least so many dimensions.
_FEW, _AGREE, _BEYOND = 1.5, 5.0, 16
#: Rows that the usual residual counts for, where an input channel has its own.
_USUAL = 10
#: Singular values below this part of the largest leave a direction open; those that are small but
#: tell something make the error large.
_NEGLIGIBLE = 1e-9
#: Positions beyond which no matrix is built.
_MOST = 5000
#: Rows for each unknown from which a residual says something.
_REDUNDANT = 1.1


@dataclass(frozen=True, eq=False)
class System:
    """The gradient rows of one layer, each in units of the error that is expected.

    Attributes
    ----------
    node : Node
    matrix : Tensor, shape (C_out * offsets, positions)
        Channel by channel.
    right : Tensor, shape (C_out * offsets, C_in)
    live : Tensor of bool, shape (C_out,)
        Channels that say anything.
    """

    node: Node
    matrix: Tensor
    right: Tensor
    live: Tensor

    @classmethod
    def of(cls, knowledge: Knowledge, node: Node, value: float = 1.0) -> System:
        """Return the rows of a layer whose cotangent is known.

        An entry of ``G`` is a sum over positions: it is wrong by the rounding of the whole, by
        the error of each derivative that is not zero, and by what the observation is off, which
        counts relative to the size of the input, ``value``.
        """
        gradient, known = knowledge.gradient_of(node, "weight"), knowledge.cotangents[node.name]
        assert gradient is not None
        if node.kind is Kind.DENSE:
            matrix, right = known.value.flatten(0, -2).mT, gradient
        elif _patches(node):  # every offset sees pixels of its own: its rows are the same few
            matrix, right = known.value.movedim(0, 1).flatten(1), gradient.flatten(1)
        else:
            shape = knowledge.graph.nodes[node.inputs[0]].shape
            geometry = Geometry.of(node.module, (shape[2], shape[3]))
            matrix = cotangent_matrix(known.value, geometry).flatten(0, 1)
            right = gradient.movedim(1, 3).flatten(0, 2)
        channels = len(gradient)
        each = matrix.reshape(channels, -1)
        size, active = each.norm(dim=1), (each != 0).sum(1)
        offsets = len(matrix) // channels
        observed = knowledge.errors.get(f"{node.path}.weight", 0.0) / max(value, 1e-300)
        noise = ((ROUNDING * size).square() + known.error**2 * active).div(offsets)
        noise = (noise + observed**2).sqrt()
        live = size > 1e-9 * size.max()
        weight = torch.where(live, 1 / noise, 0.0).repeat_interleave(offsets)[:, None]
        return cls(node, matrix * weight, right * weight, live)

    def residuals(self, value: Tensor) -> Tensor:
        """Return how far off the rows of every channel are, in expected errors, (C_out,)."""
        rest = (self.right - self.matrix @ value).reshape(len(self.live), -1)
        size = value.square().mean().sqrt().clamp_min(1e-300)
        return rest.square().mean(1).sqrt() / size


def apply(knowledge: Knowledge) -> bool:
    """Solve for an unknown edge whose layers have known cotangents, or check known ones."""
    for edge in reversed(knowledge.graph.nodes):
        layers = [n for n in _layers(knowledge, edge) if n.name not in knowledge.short]
        if layers and knowledge.value(edge) is None:
            return _solve(knowledge, edge, layers)
    return _check_known(knowledge)


def _layers(knowledge: Knowledge, edge: str) -> list[Node]:
    """Return the layers with a gradient of their own that take an edge, cotangent known."""
    found = []
    for name, _ in knowledge.graph.consumers[edge]:
        node = knowledge.graph.nodes[name]
        if node.kind not in (Kind.CONVOLUTION, Kind.DENSE) or name not in knowledge.cotangents:
            continue
        whole = getattr(node.module, "groups", 1) == 1
        if whole and knowledge.gradient_of(node, "weight") is not None:
            found.append(node)
    return found


def _solve(knowledge: Knowledge, edge: str, layers: list[Node]) -> bool:
    """Find an edge's value; where rows contradict each other look for wrong masks."""
    shape = knowledge.graph.nodes[edge].shape
    if any(_patches(n) for n in layers):
        k, m = layers[0].module.kernel_size
        if shape[2] % k or shape[3] % m:
            return _give_up(knowledge, layers, f"{layers[0].path}: patches leave a border open")
        layers = layers[:1]  # its positions are not those of the others
    unknowns = len(_positions(torch.empty(shape, device="meta"), layers[0]))
    names = ", ".join(n.path for n in layers)
    if unknowns > _MOST:
        return _give_up(knowledge, layers, f"{names}: {unknowns} positions, at most {_MOST}")
    systems = [System.of(knowledge, node) for node in layers]
    used = [s.live for s in systems]
    rows = _rows(systems, used)
    if rows < unknowns:
        return _give_up(knowledge, layers, f"{names}: {rows} rows for {unknowns} positions")
    value, error, deviation = _solved(systems, used)
    if knowledge.errors:
        scale = float(value.square().mean().sqrt())
        systems = [System.of(knowledge, node, scale) for node in layers]
        value, error, deviation = _solved(systems, used)
    if _worst(systems, used, value) > _FACTOR and rows <= _FEW * unknowns:
        used = _agreeing(systems, value)
        value, error, deviation = _solved(systems, used)
    while (worst := _worst(systems, used, value)) > _FACTOR:
        # Wrong channels show; the worst are left out until the others agree.
        bound = max(_FACTOR, _TOGETHER * worst)
        used = [u & (s.residuals(value) <= bound) for s, u in zip(systems, used, strict=True)]
        if _rows(systems, used) < unknowns + _BEYOND:
            return _contradiction(knowledge, layers)
        value, error, deviation = _solved(systems, used)
    size = float(value.square().mean().sqrt())
    error = max(error, ROUNDING * size)
    if error > _KNOWN * size:
        return _give_up(knowledge, layers, f"{names}: gradient rows leave positions open")
    found = _arranged(value, layers[0], shape)
    wrong = [s.live & (s.residuals(value) > _FACTOR) for s in systems]
    if any(bool(w.any()) for w in wrong):
        new = edge not in knowledge.mended
        knowledge.mended.add(edge)
        # All of them: no short cut past a layer whose mask is wrong.
        mended = [mend(knowledge, s.node, found, w) for s, w in zip(systems, wrong, strict=True)]
        if new and any(mended):
            return True
        return _contradiction(knowledge, layers)
    if rows >= _REDUNDANT * unknowns:
        knowledge.checked |= {n.name for n in layers}
    else:
        _give_up(knowledge, layers, f"{names}: as many rows as positions")
    each = None
    if layers[0].kind is Kind.CONVOLUTION and not _patches(layers[0]):
        each = _arranged(deviation[:, None] * _uneven(systems, used, value), layers[0], shape)
        each = each.clamp_min(ROUNDING * size)
    return knowledge.learn_value(edge, Known(found, error, "gradient rows", deviation=each))


def _give_up(knowledge: Knowledge, layers: list[Node], why: str) -> bool:
    knowledge.short.update({n.name: why for n in layers})
    return True


def _contradiction(knowledge: Knowledge, layers: list[Node]) -> bool:
    knowledge.contradicted |= {n.name for n in layers}
    names = ", ".join(n.path for n in layers)
    return _give_up(knowledge, layers, f"{names}: gradient rows contradict each other")


def _rows(systems: list[System], used: list[Tensor]) -> int:
    offsets = [len(s.matrix) // len(s.live) for s in systems]
    return sum(n * int(u.sum()) for n, u in zip(offsets, used, strict=True))


def _worst(systems: list[System], used: list[Tensor], value: Tensor) -> float:
    residuals = [s.residuals(value)[u] for s, u in zip(systems, used, strict=True)]
    return max((float(r.max()) for r in residuals if r.numel()), default=0.0)


def _check_known(knowledge: Knowledge) -> bool:
    """Compare the gradients of layers whose input and cotangent came from elsewhere."""
    new = False
    for edge, known in knowledge.values.items():
        for node in _layers(knowledge, edge) if known.whole else ():
            if node.name in knowledge.checked or node.name in knowledge.short:
                continue
            system, value = System.of(knowledge, node, known.size), _positions(known.value, node)
            off = float(system.residuals(value)[system.live].square().mean().sqrt())
            # Here the value is wrong by more than rounding, too.
            if off <= _FACTOR * (1 + known.relative / ROUNDING):
                knowledge.checked.add(node.name)
            else:
                _give_up(knowledge, [node], f"{node.path}: its gradient is missed, {off:.0f}")
            new = True
    return new


def _agreeing(systems: list[System], value: Tensor) -> list[Tensor]:
    """Return the channels that are left when those are that explain the contradiction best.

    Where there are few rows beyond the unknowns, the solution bends to the wrong ones and their
    residuals do not stand out. What no input explains, ``N^T G`` with ``N`` orthogonal to all
    columns, is made by the wrong channels alone: it lies in the span of their rows of ``N``.
    """
    matrix = torch.cat([s.matrix for s in systems])
    q = torch.linalg.qr(matrix, mode="complete")[0][:, matrix.shape[1] :]
    rest = q.mT @ torch.cat([s.right for s in systems])
    bound = _AGREE * float(value.square().mean().sqrt())
    parts = q.split([len(s.matrix) for s in systems])
    spans = [
        p.unflatten(0, (len(s.live), -1)).mT for p, s in zip(parts, systems, strict=True)
    ]  # (channels, dimensions, rows of a channel)
    used, left = [s.live.clone() for s in systems], q.shape[1]
    while left > _BEYOND and float(rest.square().sum() / left / rest.shape[1]) ** 0.5 > bound:
        bases = [torch.linalg.qr(span)[0] for span in spans]
        told = [(b.mT @ rest).square().sum((1, 2)) * u for b, u in zip(bases, used, strict=True)]
        place = max(range(len(told)), key=lambda i: float(told[i].max()))
        channel = int(told[place].argmax())
        used[place][channel] = False
        base = bases[place][channel]
        left -= base.shape[1]
        rest = rest - base @ (base.mT @ rest)
        spans = [span - base @ (base.mT @ span) for span in spans]
    return used


def _solved(systems: list[System], used: list[Tensor]) -> tuple[Tensor, float, Tensor]:
    """Solve stacked systems on the channels that are used.

    Returns
    -------
    value : Tensor, shape (positions, C_in)
    error : float
        Standard deviation of an entry, from the residual and the singular values.
    deviation : Tensor, shape (positions,)
        The same of each.
    """
    kept = [
        u.repeat_interleave(len(s.matrix) // len(u)) for s, u in zip(systems, used, strict=True)
    ]
    matrix = torch.cat([s.matrix[k] for s, k in zip(systems, kept, strict=True)])
    right = torch.cat([s.right[k] for s, k in zip(systems, kept, strict=True)])
    value, deviation, _, null = least_squares(matrix[None], right[None], _NEGLIGIBLE)
    error = float("inf") if null.shape[2] else float(deviation.square().mean().sqrt())
    return value[0], error, deviation[0]


def _uneven(systems: list[System], used: list[Tensor], value: Tensor) -> Tensor:
    """Return how far off each input channel's rows are, relative to all together, (C_in,)."""
    square = torch.zeros_like(value[0])
    for system, kept in zip(systems, used, strict=True):
        rest = (system.right - system.matrix @ value).unflatten(0, (len(kept), -1))
        square = square + rest[kept].square().sum((0, 1))
    usual = square.mean().clamp_min(1e-300)
    spare = _rows(systems, used) - len(value)
    return ((spare * square / usual + _USUAL) / (spare + _USUAL)).sqrt()


def _patches(node: Node) -> bool:
    """Return whether a convolution cuts its input into patches, as an embedding of patches does."""
    if node.kind is not Kind.CONVOLUTION:
        return False
    kernel, module = node.module.kernel_size, node.module
    whole = module.padding in ("valid", (0, 0)) and module.dilation == (1, 1)
    return whole and module.stride == kernel and kernel != (1, 1)


def _positions(value: Tensor, node: Node) -> Tensor:
    """Return an edge's value by position, shape (positions, C_in), or (patches, C_in * pixels)."""
    if _patches(node):
        batch, channels, height, width = value.shape
        k, m = node.module.kernel_size
        rows, columns = height // k, width // m  # what is left over at the border is not seen
        cut = value[..., : rows * k, : columns * m].reshape(batch, channels, rows, k, columns, m)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
    return value.flatten(0, -2) if node.kind is Kind.DENSE else value.movedim(1, 3).flatten(0, 2)


def _arranged(value: Tensor, node: Node, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`_positions`."""
    if node.kind is Kind.DENSE:
        return value.reshape(shape)
    batch, channels, height, width = shape
    if _patches(node):
        k, m = node.module.kernel_size
        cut = value.reshape(batch, height // k, width // m, channels, k, m)
        return cut.permute(0, 3, 1, 4, 2, 5).reshape(shape)
    return value.reshape(batch, height, width, channels).movedim(3, 1)
