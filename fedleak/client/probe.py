"""The front door for models: what every classifier is asked before it is attacked or judged.

One pass forwards and backwards, whose every failure is one sentence: so that a stranger's module
is refused alike by the library, the commands and the server, and not by a traceback within.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak.client.loss import PLAIN, CrossEntropy, Loss
from fedleak.errors import FedleakError, InvalidInputError, UnsupportedModelError
from fedleak.modules import in_precision, pure_copy, sentence, unwrapped

#: Parameters up to which a model is probed in float64, as it is attacked.
_DOUBLE = 2e7
#: Relative error up to which two results of one formula are taken for equal.
_SAME = 1e-4


@dataclass(frozen=True)
class Probe:
    """What one pass of a module through the front door tells.

    Attributes
    ----------
    outputs : int
        Number of logits.
    used : tuple of str
        Parameters that are trained, and that the logits depend on: the client's gradient.
    head : str or None
        The fully connected layer whose output are the logits, but for a log-softmax after it.
    bias : str or None
        The bias whose gradient has the label: its only negative entry is the label's.
    exact : bool
        Whether that gradient is ``p - y``, the softmax minus the label. It is not of the last
        convolution with an activation after it.
    """

    outputs: int
    used: tuple[str, ...]
    head: str | None
    bias: str | None
    exact: bool


#: What is known of modules that are still there, by shape, modes and what of them is frozen.
_PROBED: weakref.WeakKeyDictionary[nn.Module, dict[Any, Probe]] = weakref.WeakKeyDictionary()


def probe(model: nn.Module, input_shape: tuple[int, ...], loss: Loss = PLAIN) -> Probe:
    """Run a classifier once, forwards and backwards, and say what can be attacked of it.

    Parameters
    ----------
    model : nn.Module
        In the mode (``train`` or ``eval``) of the client. It is not changed.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    loss : Loss
        What clients minimise; by default the mean cross-entropy.

    Raises
    ------
    InvalidInputError
        If it cannot take an image of this shape, does not return logits, or trains nothing.
    UnsupportedModelError
        If it draws random numbers, or cannot be copied or derived.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
    model = unwrapped(model)
    key = (
        tuple(input_shape),
        tuple(module.training for module in model.modules()),
        tuple(p.requires_grad for p in model.parameters()),
        type(loss),
    )
    known = _PROBED.setdefault(model, {})
    if key not in known:
        known[key] = _probe(model, tuple(input_shape), loss)
    return known[key]


def _probe(model: nn.Module, shape: tuple[int, ...], loss: Loss) -> Probe:
    _demand_attackable(model)
    device = next(model.parameters()).device
    large = sum(p.numel() for p in model.parameters()) > _DOUBLE
    dtype = torch.float32 if large else torch.float64
    pure = in_precision(pure_copy(model), dtype)
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    images = images.to(device)
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, i, out, name=name: outputs.update({name: out}))
        for name, module in pure.named_modules()
        if isinstance(module, nn.Linear)
    ]
    trained = {n: p for n, p in pure.named_parameters() if p.requires_grad}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            torch.manual_seed(1)
            again = pure(images)
            torch.manual_seed(2)
            logits = pure(images)
        except FedleakError:
            raise
        except Exception as error:  # a stranger's forward pass may raise anything
            raise _refusal(model, images, error) from error
        finally:
            for hook in hooks:
                hook.remove()
        _demand_logits(logits, loss)
        _demand_batches(pure, images, logits.shape[1])
        if not torch.equal(again.nan_to_num(), logits.nan_to_num()):
            raise UnsupportedModelError(
                "the model draws random numbers, or changes itself, in its forward pass: twice the "
                "same images gave different logits; hand it over in the clients' mode without "
                "dropout and noise"
            )
        used = _used(logits, trained)
        head = _head(logits, outputs, softmax=isinstance(loss, CrossEntropy))
        bias, exact = _label_bias(logits, {n: trained[n] for n in used}, head)
    return Probe(int(logits.shape[1]), used, head, bias, exact)


def _refusal(model: nn.Module, images: Tensor, error: Exception) -> FedleakError:
    """Say why a forward pass failed: for the images, or for our precision."""
    try:
        with torch.no_grad():
            pure_copy(model)(images.to(next(model.parameters()).dtype))
    except Exception:
        shape = tuple(images.shape[1:])
        return InvalidInputError(
            f"the model cannot take images of shape {shape}: {sentence(error)}"
        )
    return UnsupportedModelError(
        f"the model is attacked in {images.dtype}, and its forward pass computes in another type "
        f"({sentence(error)}); make its tensors of the input's type, as by x.new_zeros"
    )


def _demand_attackable(model: nn.Module) -> None:
    """Refuse what has nothing to attack, or nothing to compute with."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InvalidInputError(
                f"the model's {name!r} has no shape yet (a lazy layer); run the model on one image "
                "before it is handed over"
            )
        if parameter.is_meta:
            raise InvalidInputError(f"the model's {name!r} has no values (device 'meta')")
        if not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"the model's {name!r} is of type {parameter.dtype}; real floating-point weights "
                "are attacked"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise InvalidInputError(
            f"the model {type(model).__name__} has no trainable parameters: it shares no gradient"
        )


def _demand_logits(logits: Any, loss: Loss) -> None:
    if isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[0] == 2:
        loss.classes(logits.shape[1])  # refuses a softmax of one output
        if not logits.is_floating_point():
            raise InvalidInputError(f"the model returns logits of type {logits.dtype}")
        return
    what = type(logits).__name__
    if isinstance(logits, Tensor):
        what = f"{tuple(logits.shape)} for two images"
    elif isinstance(logits, Mapping):
        what = f"a {what} with {', '.join(map(repr, logits)) or 'nothing'} in it"
    elif isinstance(logits, (tuple, list)):
        what = f"a {what} of {len(logits)}"
    raise InvalidInputError(
        f"the model must return logits of shape (batch, classes), not {what}; hand over a module "
        "that returns the logits alone"
    )


def _demand_batches(pure: nn.Module, images: Tensor, classes: int) -> None:
    """Refuse outputs that lose the batch's dimension where there is one image."""
    try:
        with torch.no_grad():
            one = pure(images[:1])
    except Exception:  # batch normalisation needs two; who trains on one image is told then
        return
    if tuple(one.shape) != (1, classes):
        raise InvalidInputError(
            f"the model must return logits of shape (batch, classes), not {tuple(one.shape)} for "
            "one image; it squeezes the batch away"
        )


def _used(logits: Tensor, trained: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of what the logits depend on."""
    if not logits.requires_grad:
        raise InvalidInputError(
            "the model's logits depend on none of its trainable parameters: it shares no gradient"
        )
    try:
        found = torch.autograd.grad(
            F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64, device=logits.device)),
            list(trained.values()),
            retain_graph=True,
            allow_unused=True,
        )
    except Exception as error:  # an operator without a backward pass, or one in place
        raise UnsupportedModelError(f"the model has no gradient: {sentence(error)}") from error
    used = tuple(n for n, g in zip(trained, found, strict=True) if g is not None)
    if not used:
        raise InvalidInputError(
            "the model's logits depend on none of its trainable parameters: it shares no gradient"
        )
    return used


def _head(logits: Tensor, outputs: Mapping[str, Tensor], softmax: bool) -> str | None:
    """Return the fully connected layer that makes the logits, or those of a log-softmax.

    To a loss with a softmax these are the same.
    """
    for name, out in reversed(list(outputs.items())):
        if out is logits:
            return name
        if softmax and out.shape == logits.shape:
            normal = out.log_softmax(1)
            if torch.allclose(normal, logits, rtol=_SAME, atol=_SAME):
                return name
    return None


def _label_bias(
    logits: Tensor, used: Mapping[str, Tensor], head: str | None
) -> tuple[str | None, bool]:
    """Return the bias whose gradient has the label, and whether it is ``p - y`` itself."""
    classes = logits.shape[1]
    candidates = [n for n, p in used.items() if p.shape == (classes,) and n.endswith("bias")]
    if f"{head}.bias" in candidates:
        return f"{head}.bias", True
    if classes < 2:
        return None, False
    p = logits[0].detach().softmax(0)
    found: dict[str, list[str]] = {n: [] for n in candidates}
    for y in p.topk(2).indices.tolist():  # these have an active unit, if any has
        target = torch.tensor([y], device=logits.device)
        loss = F.cross_entropy(logits[:1], target)
        made = (
            torch.autograd.grad(
                loss, [used[n] for n in candidates], retain_graph=True, allow_unused=True
            )
            if candidates
            else ()
        )
        wanted = p - F.one_hot(target[0], classes).to(p)
        for name, g in zip(candidates, made, strict=True):
            tiny = _SAME * wanted.abs().max()
            others = torch.ones(classes, dtype=torch.bool, device=g.device)
            others[y] = False
            if bool(((g - wanted).abs() <= tiny).all()):
                found[name].append("exact")
            elif bool((g[others] >= -tiny * g.abs().max()).all()) and float(g[y]) < 0:
                found[name].append("sign")
    for kind in (["exact", "exact"], ["sign", "sign"]):
        for name in reversed(candidates):
            if found[name] == kind:
                return name, kind[0] == "exact"
    return None, False
