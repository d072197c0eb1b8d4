"""Hold a kind of layer against torch: what everybody who writes one may run, and our tests do."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from fedleak.errors import InvalidInputError, LayerCheckError, UnsupportedModelError
from fedleak.systems.base import LAYERS, Above, Descent, Layer, Shape, class_name
from fedleak.systems.ranks.blocks import selection
from fedleak.systems.ranks.linalg import TOLERANCE
from fedleak.systems.system import Rows, System

#: Unknowns up to which a system is written out and decomposed, and images of a batch.
_MOST, _BATCH = 1000, 3
#: Relative difference of float64 values that are the same.
_SAME = 1e-9
#: Of an input that is told to be known.
_KNOWN = 1e-4
#: A rank in closed form may exceed that of one system by this part of the unknowns.
_COUNTED = 0.05
#: Where a closed form, which is of generic weights and cotangents, must hold.
_GENERIC = ("all is known", "outputs are hidden")


def check_layer(module: nn.Module, input_shape: Shape, seed: int = 0) -> Layer:
    """Hold the layer that reads ``module`` against torch, and return it.

    Its values, gradients and second derivatives are compared with autograd, its system with its
    adjoint and with what ``gradients`` says, its ranks with singular values of dense matrices,
    and what :meth:`Layer.descend` says to be known, with the truth; with outputs that are
    hidden, errors that are zero, and batches. A refusal
    (:class:`~fedleak.errors.UnsupportedModelError`) is an answer; a wrong answer is none.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode, with weights that are not special: zeros hide faults.
    input_shape : tuple of int
        Shape of one input, without the batch dimension; small, as dense matrices are built.
    seed : int
        Draws inputs and cotangents.

    Returns
    -------
    Layer

    Raises
    ------
    LayerCheckError
        With what is off, and by how much.
    UnsupportedModelError
        If nothing reads this kind of module, or the layer refuses it.
    InvalidInputError
        If the shape is too large to check, or does not fit the module.
    """
    reader = LAYERS.reader_of(module)
    if reader is None:
        raise UnsupportedModelError(
            f"no layer reads {class_name(type(module))}: register one with LAYERS.register"
        )
    module = copy.deepcopy(module).double().eval()
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(_BATCH, *input_shape, generator=generator, dtype=torch.float64)
    if x[0].numel() > _MOST:
        raise InvalidInputError(f"{x[0].numel()} inputs are too many to check; at most {_MOST}")
    try:
        z = module(x.clone())
    except (RuntimeError, ValueError) as error:
        raise InvalidInputError(
            f"{class_name(type(module))} cannot take inputs of shape {input_shape}: {error}"
        ) from error
    layer = reader("layer", module, tuple(input_shape), tuple(z.shape[1:]))
    e = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    _derivatives(layer, module, x, e)
    _jacobian(layer, module, x[:1])
    if isinstance(layer, System):
        _system(layer, x, e, generator)
        _ranks(layer, e, generator)
    _descent(layer, x, e, generator)
    return layer


def _demand_same(layer: Layer, what: str, found: Tensor, truth: Tensor, most: float) -> None:
    if found.shape != truth.shape:
        _fail(layer, f"{what} has shape {tuple(found.shape)}, not {tuple(truth.shape)}")
    size = float(truth.detach().norm()) or 1.0
    off = float((found - truth).detach().norm()) / size
    if not off <= most:
        _fail(layer, f"{what} is off by {off:.1e} of it")


def _fail(layer: Layer, message: str) -> None:
    raise LayerCheckError(f"{layer!r}: {message}")


def _derivatives(layer: Layer, module: nn.Module, x: Tensor, e: Tensor) -> None:
    """Compare forward, backward, its derivatives, and gradients with autograd's."""
    x, e = x.clone().requires_grad_(), e.clone().requires_grad_()
    z = module(x.clone())
    _demand_same(layer, "forward", layer.forward(x), z, _SAME)
    (d,) = torch.autograd.grad(z, x, e, create_graph=True)
    made = layer.backward(x, layer.forward(x), e)
    _demand_same(layer, "backward", made, d, _SAME)
    for name, value in (("x", x), ("e", e)):
        second, own = (_derivative(v, value) for v in (d, made))
        _demand_same(layer, f"the derivative of backward by {name}", own, second, _SAME)
    parameters = {f"layer.{n}": p for n, p in module.named_parameters()}
    gradients = layer.gradients(x, e)
    if set(gradients) != set(parameters):
        _fail(layer, f"gradients are of {sorted(gradients)}, parameters {sorted(parameters)}")
    for n in range(len(x) if parameters else 0):
        single = module(x[n : n + 1].clone())
        found = torch.autograd.grad(single, list(parameters.values()), e[n : n + 1])
        for name, truth in zip(parameters, found, strict=True):
            _demand_same(layer, f"the gradient of {name!r}", gradients[name][n], truth, _SAME)


def _derivative(value: Tensor, by: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).reshape(value.shape)
    if not value.requires_grad:
        return torch.zeros_like(by)
    (found,) = torch.autograd.grad(value, by, weight, retain_graph=True, allow_unused=True)
    return torch.zeros_like(by) if found is None else found


def _jacobian(layer: Layer, module: nn.Module, x: Tensor) -> None:
    """Every row is torch's, or zero: an output that is lost."""
    z = module(x.clone())
    truth = torch.autograd.functional.jacobian(lambda v: module(v.clone()), x)
    truth = truth.reshape(z.numel(), x.numel())
    found = torch.from_numpy(np.asarray(layer.jacobian(x, z.detach()).todense()))
    if found.shape == truth.shape:
        truth = torch.where(found.any(1, keepdim=True), truth, 0.0)
    _demand_same(layer, "the Jacobian", found, truth, 1e-6)


def _system(layer: System, x: Tensor, e: Tensor, generator: torch.Generator) -> None:
    """``U x = v``, and ``<U x, r> = <x, U^T r>``."""
    rows = layer.apply(x, e)
    gradients = layer.gradients(x, e)
    own = x.new_zeros(len(x), 0)
    if layer.weight_name is not None:
        own = gradients[layer.weight_name]
    target = layer.target(layer.forward(x), own)
    _demand_same(layer, "the weight rows A x", rows.weight, target.weight, _SAME)
    _demand_same(layer, "the gradient rows K(e) x", rows.gradient, target.gradient, _SAME)
    r = Rows(
        *(
            torch.randn(v.shape, generator=generator, dtype=v.dtype)
            for v in (rows.weight, rows.gradient)
        )
    )
    left = (rows.weight * r.weight).sum() + (rows.gradient * r.gradient).sum()
    size = float(rows.weight.norm() * r.weight.norm() + rows.gradient.norm() * r.gradient.norm())
    off = abs(float(left - (x * layer.adjoint(r, e)).sum())) / (size or 1.0)
    if not off <= _SAME:
        _fail(layer, f"adjoint is not the adjoint of apply: <U x, r> is off by {off:.1e}")


def _cases(e: Tensor, generator: torch.Generator) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield cotangents and known outputs of one image after the other."""
    everything = torch.ones_like(e[:1], dtype=torch.bool)
    some = torch.rand(e[:1].shape, generator=generator) < 0.6
    yield _GENERIC[0], e[:1], everything
    yield _GENERIC[1], e[:1], some
    yield "cotangents are zero", e[1:2] * (torch.rand(e[:1].shape, generator=generator) < 0.2), some
    yield "nothing comes back", 0 * e[:1], everything
    yield "all cotangents are alike", torch.ones_like(e[:1]), everything


def _ranks(layer: System, e: Tensor, generator: torch.Generator) -> None:
    """Compare ranks with those of dense matrices, where these are clear."""
    for when, own, known in _cases(e, generator):
        truth = _dense_ranks(layer, own, selection(known))
        if truth is None:
            continue
        found, exact = layer.ranks(own, known)
        blocks = layer.block_ranks(own[0], selection(known))
        told = (blocks.weight, blocks.gradient, blocks.joint)
        if blocks.exact and told != truth:
            _fail(layer, f"block_ranks are {told}, not {truth}, where {when}")
        if exact and int(found) != truth[2]:
            _fail(layer, f"ranks says {int(found)}, exactly; it is {truth[2]}, where {when}")
        counted = layer.counted_rank(own[0], known[0]) if when in _GENERIC else None
        _counted(layer, "counted_rank", counted, truth[2], when)
        if int(found) == layer.unknowns:
            _counted(layer, "ranks", int(found), truth[2], when)
    if layer.unknowns * len(e) > _MOST:
        return
    for when, own in (("batch", e), ("batch without errors", 0 * e)):
        known = torch.ones_like(own, dtype=torch.bool)
        truth = _dense_ranks(layer, own, selection(known))
        found, _ = layer.ranks(own, known, len(own))
        if truth is not None:
            _counted(layer, "ranks", int(found), truth[2], f"of a {when} of {len(own)}")


def _counted(layer: System, what: str, found: int | None, truth: int, when: str) -> None:
    if found is not None and found > truth + max(2, _COUNTED * layer.unknowns):
        _fail(layer, f"{what} says {found} of {layer.unknowns}; it is {truth}, where {when}")


def _dense_ranks(layer: System, e: Tensor, rows: csr_matrix) -> tuple[int, ...] | None:
    """Return the ranks of ``A``, ``K(e)`` and both by singular values; None if not clear."""
    system = layer.operators(e, rows)
    unit = torch.eye(system.unknowns, dtype=e.dtype).reshape(-1, *system.shape)
    blocks = [b.flatten(1) for b in system.apply(unit)]
    sizes = [float(torch.linalg.matrix_norm(b, 2)) if b.numel() else 0.0 for b in blocks]
    scaled = [b / s for b, s in zip(blocks, sizes, strict=True) if s > 0]
    found = []
    for part in (blocks[:1], blocks[1:], scaled):
        m = torch.cat(part, 1) if part else torch.zeros(0, 0)
        values = torch.linalg.svdvals(m) if m.numel() else torch.zeros(1)
        values = values / values[0].clamp_min(1e-300)
        if bool(((values > TOLERANCE / 100) & (values < TOLERANCE * 100)).any()):
            return None
        found.append(int((values > TOLERANCE).sum()))
    return tuple(found)


def _descent(layer: Layer, x: Tensor, e: Tensor, generator: torch.Generator) -> None:
    """What is said to be known is the truth."""
    z = layer.forward(x)
    exact = torch.full_like(z, 1e-12)
    hidden = exact.masked_fill(torch.rand(z.shape, generator=generator) < 0.3, torch.inf)
    start = 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    for when, deviation, batch in (
        ("all outputs are known", exact, 1),
        ("outputs are hidden", hidden, 1),
        (f"{_BATCH} images share an update", exact, _BATCH),
    ):
        gradients = {
            k: g.unflatten(0, (-1, batch)).sum(1) for k, g in layer.gradients(x, e).items()
        }
        value = torch.where(deviation.isinf(), 0.5 * z, z)
        noise = x.new_zeros(len(x) // batch)
        above = Above(value, e, deviation, gradients, {}, noise, batch)
        try:
            found = layer.descend(above, start)
        except UnsupportedModelError:
            continue
        known = _said_known(layer, found, len(x), batch, deviation)
        if found.value.shape != x.shape:
            _fail(layer, f"descend returns shape {tuple(found.value.shape)}, not {tuple(x.shape)}")
        if not bool(found.value.isfinite().all()):
            _fail(layer, f"descend returns values that are not finite, where {when}")
        sure, truth = found.value[known], x[known]
        what = f"the input that descend says is known, where {when},"
        _demand_same(layer, what, sure, truth, _KNOWN)
        if bool(known.all()) and batch == 1:
            back, d = layer.pull_back(found.value, z, e), layer.backward(x, z, e)
            _demand_same(layer, "pull_back at the truth", back, d, _KNOWN)


def _said_known(layer: Layer, found: Descent, count: int, batch: int, deviation: Tensor) -> Tensor:
    """Return what a descent says to be known, a mask like the inputs."""
    known = torch.ones(count, *layer.in_shape, dtype=torch.bool)
    if found.deviation is not None:
        known &= found.deviation.isfinite()
    elif found.equations is None:  # as well as what is above
        known &= bool(deviation.isfinite().all())
    if found.equations is not None:
        full = found.equations.rank == layer.unknowns * batch
        known &= full.repeat_interleave(batch).reshape(-1, *[1] * len(layer.in_shape))
    return known
