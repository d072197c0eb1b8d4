"""Batches that an update is linearised at, and how well each of its entries is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedleak.client.replay import Gradients, Replay
from fedleak.defences import DefenceSpec, defend, parse_defence
from fedleak.errors import InvalidInputError
from fedleak.metric.jacobian import UpdateJacobian
from fedleak.metric.jacobian_rows import Block
from fedleak.precision import DERIVATIVE, UNIT
from fedleak.priors.synthetic import dead_leaves

#: Parameters from which derivatives are taken in float32: half the memory and time.
SINGLE_PARAMETERS = 20_000_000


@dataclass(frozen=True)
class Reference:
    """A batch at which the update is linearised, and what a client would send of it.

    Attributes
    ----------
    jacobian : UpdateJacobian
    sent : dict
        The defended update.
    errors : dict
        Standard deviation of the error of each entry, see :func:`entry_errors`.
    """

    jacobian: UpdateJacobian
    sent: Gradients
    errors: Gradients

    def blocks(self) -> list[Block]:
        """Return the rows of the Jacobian in units of their errors."""
        return self.jacobian.blocks(self.errors)


def entry_errors(
    update: Gradients, spec: DefenceSpec, sent: Gradients, rounding: Gradients | None = None
) -> Gradients:
    """Return the standard deviation of the error of each entry that a client sends.

    The defence's, as an informed attacker knows it, and the rounding of float32.

    Parameters
    ----------
    update : dict
        Before the defence, which sets the size of rounding.
    spec : DefenceSpec
    sent : dict
        The update after it.
    rounding : dict, optional
        Standard deviations of what is lost beside that after the defence, by name: where weights
        are sent, theirs.

    Returns
    -------
    dict
        In the unit of ``update``, broadcastable to each parameter; ``inf`` where an entry
        says nothing.
    """
    known, factors = spec.errors(sent), _factors(update, spec, sent)
    out = {}
    for name, g in update.items():
        size = g.square().mean().sqrt()
        # A gradient that is zero everywhere tells nothing to first order.
        level = UNIT if g.dtype == torch.float64 else DERIVATIVE
        own = torch.where(size > 0, level * size, torch.inf)
        lost = known[name].to(g)
        if rounding:
            lost = torch.hypot(lost, rounding[name].to(g))
        out[name] = torch.hypot(lost / factors[name], own)
    return out


def _factors(gradient: Gradients, spec: DefenceSpec, sent: Gradients) -> Gradients:
    """Return what the defence multiplied each tensor by, as clipping does; noise aside."""
    if not spec.rescales:
        return {k: g.new_ones(()) for k, g in gradient.items()}
    inner = {k: (g * sent[k].to(g)).sum() for k, g in gradient.items()}
    square = {k: g.square().sum() for k, g in gradient.items()}
    if spec.rescales == "update":
        total = torch.stack([*inner.values()]).sum(), torch.stack([*square.values()]).sum()
        inner, square = dict.fromkeys(inner, total[0]), dict.fromkeys(square, total[1])
    return {k: (inner[k] / square[k].clamp_min(1e-300)).clamp_min(1e-300) for k in gradient}


def make_references(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    batch_size: int = 1,
    defence: str | DefenceSpec = "none",
    images: Tensor | None = None,
    count: int = 2,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[Reference]:
    """Return batches to linearise around, defended as clients would.

    Parameters
    ----------
    model : nn.Module
        With the weights to judge, in the mode (``eval``) of the client.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    batch_size : int
    defence : str or DefenceSpec
    images : Tensor, optional, shape (N, C, H, W)
        Reference images in [0, 1]; synthetic ones (dead leaves) if there are none.
    count : int
        Batches, at most.
    seed : int
        Draws images, labels and the defence's noise.
    device : str or torch.device

    Raises
    ------
    InvalidInputError
        If the model has nothing to train, normalises by batch statistics or does not take
        such images, or there are too few of them.
    """
    demand_judged(model)
    spec = parse_defence(defence) if isinstance(defence, str) else defence
    large = sum(p.numel() for p in model.parameters()) >= SINGLE_PARAMETERS
    dtype = torch.float32 if large else torch.float64
    replay = Replay(model, input_shape, dtype, device)
    spec.check(list(replay.parameters))
    if batch_size < 1 or count < 1:
        raise InvalidInputError(f"batch size {batch_size} and references {count} must be above 0")
    if images is None:
        images = dead_leaves(input_shape, batch_size * count, seed=seed)
    if len(images) < batch_size:
        raise InvalidInputError(
            f"{len(images)} reference images are no batch of {batch_size}; give more, or none"
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n, x in enumerate(images.split(batch_size)[:count]):
        if len(x) < batch_size:
            break
        labels = torch.randint(replay.classes, (batch_size,), generator=generator)
        jacobian = UpdateJacobian(replay, x, labels)
        sent = defend(jacobian.gradient, spec, seed + n)
        errors = entry_errors(jacobian.gradient, spec, sent)
        found.append(Reference(jacobian, sent, errors))
    return found


def demand_judged(model: nn.Module) -> None:
    """Refuse a model without trainable parameters, or whose update is not its images' alone."""
    if not any(p.requires_grad for p in model.parameters()):
        raise InvalidInputError(
            f"the model {type(model).__name__} has no trainable parameters: it shares no gradient"
        )
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InvalidInputError(f"the model's {name!r} holds NaN or infinite values")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise InvalidInputError(
                f"layer {name!r} ({type(module).__name__}) normalises by the statistics of the "
                "batch; judge the model with running statistics: model.eval()"
            )
