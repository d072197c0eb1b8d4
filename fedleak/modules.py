"""Strangers' modules: what is inside wrappers, and copies that torch.func can transform."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fedleak.errors import UnsupportedModelError

#: What wrappers put before the names of what they wrap: torch.compile, (Distributed)DataParallel,
#: Opacus, fully sharded training and checkpointing.
PREFIXES = frozenset(
    {"_orig_mod", "module", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)

#: Wrappers that keep what they wrap as ``module``.
_WITH_MODULE = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.optim.swa_utils.AveragedModel,
)

_V = TypeVar("_V")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, torch.compile and Opacus; itself if there is none."""
    kind = type(model)
    inside: Any = None
    if isinstance(model, _WITH_MODULE):
        inside = model.module
    elif kind.__name__ == "OptimizedModule":
        inside = model._orig_mod
    elif kind.__module__.startswith("opacus.") and isinstance(
        getattr(model, "_module", None), nn.Module
    ):
        inside = model._module
    return model if inside is None else unwrapped(inside)


def bare(name: str) -> str:
    """Return a parameter's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in PREFIXES)


def renamed(received: Mapping[str, _V], expected: Iterable[str]) -> dict[str, _V]:
    """Return ``received`` under expected names, where they are a wrapper's or those of one part.

    Names of a part are what ``model.head.state_dict()`` holds, where just one part has them all.
    Names of which any is expected stay, and so do all others.
    """
    known = list(expected)
    if not set(received).isdisjoint(known):
        return dict(received)
    first = f".{next(iter(received), '')}"
    parts = {name.removesuffix(first) for name in known if name.endswith(first)}
    fitting = [part for part in parts if {f"{part}.{n}" for n in received} <= set(known)]
    if len(fitting) == 1:
        return {f"{fitting[0]}.{name}": value for name, value in received.items()}
    plain = {bare(name): name for name in known}
    names = {name: plain.get(bare(name), name) for name in received}
    if len(plain) < len(known) or len(set(names.values())) < len(names):
        return dict(received)
    return {names[name]: value for name, value in received.items()}


def logits_of(output: Any) -> Any:
    """Return the logits of what a classifier returns: itself, or what it calls ``logits``.

    Models of Hugging Face return a mapping; a tuple of one is taken for its element. What
    else is returned stays as it is, for the caller to refuse.
    """
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, (tuple, list)) and len(output) == 1:
        return output[0]
    return output


def ends_in_log_softmax(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Say whether a traced node is a log-softmax over the classes, and nothing follows it.

    To a loss with a softmax, or the negative likelihood, the logits before it are the same.
    """
    if any(user.op != "output" for user in node.users):
        return False
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, nn.LogSoftmax) and module.dim in (1, -1)
    if node.target not in (F.log_softmax, torch.log_softmax, "log_softmax"):
        return False
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return dim in (1, -1)


def computed_weights(model: nn.Module) -> list[str]:
    """Return the modules whose weights are computed from others, by hooks or parametrisations."""
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "parametrizations")
        or any(isinstance(h, WeightNorm | SpectralNorm) for h in module._forward_pre_hooks.values())
    ]


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a module, also of one whose weights a hook computes.

    Raises
    ------
    UnsupportedModelError
        If it cannot be copied.
    """
    # What weight_norm and spectral_norm keep is no leaf, which deepcopy refuses.
    made = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        out = copy.deepcopy(model, made)
    except Exception as error:  # a stranger's module may hold anything
        raise UnsupportedModelError(
            f"the model {type(model).__name__} cannot be copied: {sentence(error)}"
        ) from error
    for module in out.modules():
        _forget_opacus(module)
    return out


def pure_copy(model: nn.Module) -> nn.Module:
    """Return a copy without side effects, which torch.func can derive twice.

    Its ``forward`` returns logits, and attention is computed by torch's mathematical kernel,
    the only one that has second derivatives.

    Raises
    ------
    UnsupportedModelError
        If it draws random numbers (dropout in training mode), or is compiled by torch.jit.
    """
    model = unwrapped(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"layer {name!r} of the model" if name else "the model"
            raise UnsupportedModelError(
                f"{what} is compiled by torch.jit, which has no derivatives of its gradient; hand "
                "over the module that was scripted or traced"
            )
    out = _deterministic(copied(model))
    out.forward = partial(_classify, out.forward)
    return out


@contextmanager
def mathematical() -> Iterator[None]:
    """Compute attention by what has derivatives of any order."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _classify(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    with mathematical():
        return logits_of(forward(*given, **named))


def _deterministic(model: nn.Module) -> nn.Module:
    """Make normalisation pure and refuse what is random."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise UnsupportedModelError(
                f"layer {name!r}: dropout with p={module.p} is random in training, which the "
                "attacker does not see; set p=0"
            )
        if isinstance(module, nn.modules.batchnorm._NormBase) and (
            module.training or module.running_mean is None
        ):
            # By statistics of the images themselves: running ones only count along, in place.
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.forward = partial(_normalised, module)
        if hasattr(module, "inplace"):
            module.inplace = False
        _step_spectral_norm(module)
        # The same functions of what torch can derive twice, and forwards.
        if isinstance(module, nn.Hardswish):
            module.forward = _hardswish  # type: ignore[assignment]
        elif isinstance(module, nn.Hardsigmoid):
            module.forward = _hardsigmoid  # type: ignore[assignment]
    return model


def _step_spectral_norm(module: nn.Module) -> None:
    """Take the power iteration that a client's forward pass takes in training, and no more."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, SpectralNorm) and module.training:
            with torch.no_grad():
                hook(module, None)
            module.training = False
    for parts in getattr(module, "parametrizations", {}).values():
        for part in parts:
            if type(part).__name__ == "_SpectralNorm" and part.training:
                with torch.no_grad():
                    part(parts.original)
                part.training = False


def _forget_opacus(module: nn.Module) -> None:
    """Remove the hooks by which Opacus keeps every example's gradient."""
    for hooks in (module._forward_hooks, module._backward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "__module__", None) or type(hook).__module__
            inner = getattr(hook, "func", None) or getattr(hook, "__func__", hook)
            if str(owner).startswith("opacus") or str(getattr(inner, "__module__", "")).startswith(
                "opacus"
            ):
                del hooks[key]


def _hardsigmoid(x: Tensor) -> Tensor:
    return (x / 6 + 0.5).clamp(0, 1)


def _hardswish(x: Tensor) -> Tensor:
    return x * _hardsigmoid(x)


def _normalised(module: nn.modules.batchnorm._NormBase, x: Tensor) -> Tensor:
    """Normalise by the statistics of ``x``, shape (B, C, ...).

    Under vmap, torch's own double backward is wrong in the weight's gradient (2.15 and before).
    """
    each = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    dims = list(range(2, x.dim())) if each else [0, *range(2, x.dim())]
    rest = x - x.mean(dims, keepdim=True)
    out = rest / (rest.square().mean(dims, keepdim=True) + module.eps).sqrt()
    if not module.affine:
        return out
    shape = (1, -1, *[1] * (x.dim() - 2))
    return out * module.weight.reshape(shape) + module.bias.reshape(shape)


def in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a copy, in place, also the plain tensors that its modules keep as attributes."""
    model.to(dtype=dtype)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[name] = value.to(dtype)
    return model


def sentence(error: BaseException) -> str:
    """Return an error of torch as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
