"""What a client would have sent for these images: gradients of any torch module."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from fedleak.client.loss import Loss
from fedleak.client.probe import probe
from fedleak.client.training import LocalTraining
from fedleak.modules import copied, in_precision, pure_copy, unwrapped
from fedleak.tensors import per_update

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
    label_bias : str or None
        Name of the bias whose gradient has the label, ``exact_bias`` whether it is ``p - y``;
        see :class:`fedleak.client.probe.Probe`.
    clip : float
        Bound on the norm of every image's own gradient; 0: none.

    Raises
    ------
    InvalidInputError, UnsupportedModelError
        As :func:`fedleak.client.probe.probe`.
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
        if self.client.norm:
            model = self.client.in_mode(copied(unwrapped(model)))
        found = probe(model, input_shape, self.loss)
        self.model = in_precision(pure_copy(model), dtype).to(device)
        self.client.check_channels(input_shape[0])
        if self.client.mean:  # whatever calls the model gives it images in [0, 1]
            self.model.register_forward_pre_hook(self._normalise)
        self.parameters = {
            n: p.detach() for n, p in self.model.named_parameters() if n in found.used
        }
        self.input_shape, self.dtype, self.device = tuple(input_shape), dtype, torch.device(device)
        self.head, self.classes = found.head, self.loss.classes(found.outputs)
        self.label_bias, self.exact_bias = found.bias, found.exact
        self.clip = 0.0

    def with_loss(self, loss: Loss) -> Replay:
        """Return the same client with another loss, in the place of a cross-entropy."""
        other = copy.copy(self)
        other.client, other.loss = replace(self.client, loss=loss), loss
        other.classes = loss.classes(self.classes)
        return other

    def clipped(self, norm: float) -> Replay:
        """Return the same client, which clips the gradient of every single image (DP-SGD)."""
        other = copy.copy(self)
        other.clip = norm
        return other

    def _normalise(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.client.seen(given[0]), *given[1:])

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
        if not self.clip:
            return self._batches(images, labels)
        shape = images.shape[:2]
        each = self._batches(images.flatten(0, 1)[:, None], labels.flatten(0, 1)[:, None])
        norms = torch.stack([g.flatten(1).square().sum(1) for g in each.gradients.values()])
        factor = (self.clip / norms.sum(0).clamp_min(1e-300).sqrt()).clamp(max=1.0)
        mean = {
            k: (per_update(factor, g) * g).unflatten(0, shape).mean(1)
            for k, g in each.gradients.items()
        }
        inputs = None if each.head_input is None else each.head_input[:, 0].unflatten(0, shape)
        return Replayed(mean, inputs)

    def _batches(self, images: Tensor, labels: Tensor) -> Replayed:
        """Return the gradients of whole batches."""

        def pulled(x: Tensor, y: Tensor) -> tuple[Gradients, Gradients]:
            # The loss is not derived itself: its second derivative costs torch more than the rest.
            made = vjp(lambda p: forward(p, x), self.parameters, has_aux=True)
            logits, pull, beside = made  # type: ignore[misc]
            return pull(self.loss.cotangent(logits, y))[0], beside

        def forward(parameters: Gradients, x: Tensor) -> tuple[Tensor, Gradients]:
            logits, head_input = self._forward(parameters, x)
            return logits, {} if head_input is None else {"head": head_input}

        if len(images) == 1:  # without vmap: more operators, less overhead
            made, beside = pulled(images[0], labels[0])
            return Replayed(_unsqueezed(made), _unsqueezed(beside).get("head"))
        made, beside = vmap(pulled)(images, labels)
        return Replayed(made, beside.get("head"))


def _unsqueezed(gradients: Gradients) -> Gradients:
    return {n: g.unsqueeze(0) for n, g in gradients.items()}
