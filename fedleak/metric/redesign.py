"""Another network: one convolution with a wider stride or fewer filters, and its prediction."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fedleak.errors import FedleakError
from fedleak.metric.adviser import Advice
from fedleak.metric.prediction import predict
from fedleak.priors import Prior

#: Unknowns above which the first convolution is changed alone, by little.
_MANY = 2048

Change = tuple[str, int]


def redesign(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    prior: Prior,
    target_db: float,
    references: Callable[[nn.Module], list[Any]],
    batch_size: int = 1,
    seed: int = 0,
) -> tuple[Advice, ...]:
    """Return the smallest change of one convolution that brings the prediction under a target.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    input_shape : tuple of int
    prior : Prior
        Of the images.
    target_db : float
    references : callable
        ``references(model)``: the batches to linearise another model around.
    batch_size : int
    seed : int
        Draws the weights anew of all that the change touches.

    Returns
    -------
    tuple of Advice
        One for the stride and one for the filters: the first in the order of strength that
        reaches the target, else the best. None where the network does not fit together
        after the change (residual connections, most of them).
    """
    small = batch_size * math.prod(input_shape) <= _MANY
    convolutions = [n for n, m in model.named_modules() if type(m) is nn.Conv2d]
    found = []
    for kind in ("stride", "filters"):
        best: Advice | None = None
        tried = convolutions if small else convolutions[:1]
        for name, value in _candidates(model, tried, kind, small):
            try:
                changed = change(model, name, kind, value, input_shape, seed)
                reached = predict(references(changed), prior).psnr_db
            except (FedleakError, RuntimeError, ValueError, TypeError):
                continue  # it does not fit together
            advice = _advice(model, changed, name, kind, value, reached, reached < target_db)
            if best is None or advice.predicted_psnr_db < best.predicted_psnr_db:
                best = advice
            if advice.reached:
                break
        if best is not None:
            found.append(best)
    return tuple(found)


def _candidates(
    model: nn.Module, names: list[str], kind: str, small: bool
) -> Iterator[tuple[str, int]]:
    """Yield changes, small ones first."""
    for step in (1, 2, 3) if small else (1,):
        for name in names:
            conv = model.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            if kind == "stride":
                yield name, max(conv.stride) + step
            elif conv.out_channels >> step and conv.groups == 1:
                yield name, conv.out_channels >> step


def change(
    model: nn.Module,
    name: str,
    kind: str,
    value: int,
    input_shape: tuple[int, int, int],
    seed: int = 0,
) -> nn.Module:
    """Return a copy of a model with one convolution changed, and what comes after it fitted.

    Parameters
    ----------
    model : nn.Module
    name : str
        Of a convolution.
    kind : {"stride", "filters"}
    value : int
    input_shape : tuple of int
    seed : int
        Draws the weights of this and of all later layers.

    Raises
    ------
    RuntimeError, ValueError
        If the layers do not fit together.
    """
    out = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before = True
        for where, module in list(out.named_modules()):
            if where == name:
                assert isinstance(module, nn.Conv2d)
                new: nn.Module = _convolution(module, kind, value)
                before = False
            elif before or (lazy := _lazy(module)) is None:
                continue
            else:
                new = lazy
            parent, _, child = where.rpartition(".")
            setattr(out.get_submodule(parent), child, new.train(module.training))
        like = next(model.parameters())
        with torch.no_grad():
            out(torch.zeros(2, *input_shape, dtype=like.dtype, device=like.device))
    if any(nn.parameter.is_lazy(p) for p in out.parameters()):
        raise RuntimeError("a layer of the model has no part in its output")
    return out


def _convolution(old: nn.Conv2d, kind: str, value: int) -> nn.Conv2d:
    filters = value if kind == "filters" else old.out_channels
    stride = (value, value) if kind == "stride" else old.stride
    return nn.Conv2d(
        old.in_channels, filters, old.kernel_size, stride, old.padding, old.dilation,  # type: ignore[arg-type]
        old.groups, old.bias is not None, old.padding_mode,
        device=old.weight.device, dtype=old.weight.dtype,
    )  # fmt: skip


def _lazy(old: nn.Module) -> nn.Module | None:
    """Return the same layer with as many inputs as it will be given."""
    if type(old) is nn.Conv2d:
        return nn.LazyConv2d(
            old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation,  # type: ignore[arg-type]
            old.groups, old.bias is not None, old.padding_mode,
            device=old.weight.device, dtype=old.weight.dtype,
        )  # fmt: skip
    if type(old) is nn.BatchNorm2d:
        return nn.LazyBatchNorm2d(old.eps, old.momentum, old.affine, old.track_running_stats)
    if type(old) is nn.Linear:
        return nn.LazyLinear(
            old.out_features, old.bias is not None, old.weight.device, old.weight.dtype
        )
    return None


def _advice(
    old: nn.Module, new: nn.Module, name: str, kind: str, value: int, psnr_db: float, reached: bool
) -> Advice:
    conv = old.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    was = max(conv.stride) if kind == "stride" else conv.out_channels
    counts = [sum(p.numel() for p in m.parameters()) for m in (old, new)]
    return Advice(
        kind, f"{kind} {value} instead of {was} in {name}", value, None, psnr_db, reached,
        f"another network, of {counts[1]} parameters instead of {counts[0]}, to be trained anew; "
        "predicted for newly drawn weights from this layer on",
    )  # fmt: skip
