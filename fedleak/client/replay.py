"""What a client would have sent for these images: gradients of any torch module."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedleak.client.loss import Loss
from fedleak.client.training import LocalTraining
from fedleak.errors import InvalidInputError, UnsupportedModelError

Gradients = dict[str, Tensor]


@dataclass
class Replayed:
    """The gradients of some batches, and what the fully connected head was given.

    Attributes
    ----------
    gradients : dict
        Mean gradient of each batch by parameter name, shape (N, *parameter).
    head_input : Tensor or None, shape (N, B, features)
        Input of the module's last fully connected layer, where it has one.
    """

    gradients: Gradients
    head_input: Tensor | None


class Replay:
    """Replays a client's step for candidate images, differentiably.

    Parameters
    ----------
    model : nn.Module
        The model as sent, in the mode (``train`` or ``eval``) of the client. It is copied.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    dtype : torch.dtype
        Precision of the computation.
    device : torch.device
    client : LocalTraining, optional
        What clients do: their loss and how they normalise images are replayed. Without it the
        loss is the mean cross-entropy, and the model sees images as they are.

    Attributes
    ----------
    head : str or None
        Name of the fully connected layer whose output are the logits.
    classes : int
        Number of labels.

    Raises
    ------
    InvalidInputError
        If the module cannot take an image of this shape, or does not return logits.
    UnsupportedModelError
        If the module draws random numbers (dropout in training mode).
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        client: LocalTraining | None = None,
    ):
        self.client = client or LocalTraining(reply="gradient")
        self.loss = self.client.criterion
        self.model = _deterministic(self.client.in_mode(copy.deepcopy(model))).to(
            device=device, dtype=dtype
        )
        self.client.check_channels(input_shape[0])
        if self.client.mean:  # whatever calls the model gives it images in [0, 1]
            self.model.register_forward_pre_hook(self._normalise)
        self.parameters = {
            n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad
        }
        self.input_shape, self.dtype, self.device = tuple(input_shape), dtype, torch.device(device)
        self.head, self.classes = self._find_head()

    def with_loss(self, loss: Loss) -> Replay:
        """Return the same client with another loss, in the place of a cross-entropy."""
        other = copy.copy(self)
        other.client, other.loss = replace(self.client, loss=loss), loss
        other.classes = loss.classes(self.classes)
        return other

    def _normalise(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.client.seen(given[0]), *given[1:])

    def _find_head(self) -> tuple[str | None, int]:
        """Run once and see which fully connected layer makes the output."""
        made: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda m, i, out, name=name: made.update({name: out}))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            with torch.no_grad():
                zeros = torch.zeros(2, *self.input_shape, dtype=self.dtype, device=self.device)
                logits = self.model(zeros)
        except (RuntimeError, ValueError, TypeError) as error:
            raise InvalidInputError(
                f"the model cannot take images of shape {self.input_shape}: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != 2:
            what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InvalidInputError(
                f"the model must return logits of shape (batch, classes), not {what}"
            )
        heads = [name for name, out in made.items() if out is logits]
        return (heads[0] if heads else None), self.loss.classes(int(logits.shape[1]))

    def _forward(self, parameters: Gradients, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits and the head's input of one batch."""
        if self.head is None:
            return functional_call(self.model, parameters, (images,)), None
        seen: list[Tensor] = []
        module = self.model.get_submodule(self.head)
        hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        try:
            logits = functional_call(self.model, parameters, (images,))
        finally:
            hook.remove()
        return logits, seen[0]

    def __call__(self, images: Tensor, labels: Tensor) -> Replayed:
        """Return what clients would send; differentiable in ``images`` and soft labels.

        Parameters
        ----------
        images : Tensor, shape (N, B, C, H, W)
            One batch for each of N clients.
        labels : Tensor
            Classes, int64, shape (N, B), or class probabilities, shape (N, B, classes).

        Returns
        -------
        Replayed
            Of the loss of each batch.
        """

        def loss(
            parameters: Gradients, batch: Tensor, target: Tensor
        ) -> tuple[Tensor, Tensor | None]:
            logits, head_input = self._forward(parameters, batch)
            return self.loss.value(logits, target), head_input

        if self.head is None:
            plain = grad(lambda p, x, y: loss(p, x, y)[0])
            if len(images) == 1:  # without vmap: more operators, less overhead
                return Replayed(_unsqueezed(plain(self.parameters, images[0], labels[0])), None)
            return Replayed(
                vmap(plain, in_dims=(None, 0, 0))(self.parameters, images, labels), None
            )
        both = grad(loss, has_aux=True)
        if len(images) == 1:
            made, head_input = both(self.parameters, images[0], labels[0])
            return Replayed(_unsqueezed(made), head_input.unsqueeze(0))
        return Replayed(*vmap(both, in_dims=(None, 0, 0))(self.parameters, images, labels))


def _unsqueezed(gradients: Gradients) -> Gradients:
    return {n: g.unsqueeze(0) for n, g in gradients.items()}


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
        # The same functions of what torch can derive twice, and forwards.
        if isinstance(module, nn.Hardswish):
            module.forward = _hardswish  # type: ignore[assignment]
        elif isinstance(module, nn.Hardsigmoid):
            module.forward = _hardsigmoid  # type: ignore[assignment]
    return model


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
