"""What the attacker holds: the model as sent and one client's update as received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedleak.errors import InvalidInputError, InvalidUpdateError


@dataclass(frozen=True, eq=False)
class Observation:
    """One client's update, as an honest-but-curious server sees it.

    This is all that an attack receives: no image, no clean gradient, and no label
    unless the threat model grants it.

    Attributes
    ----------
    model : nn.Module
        The model with the weights that were sent to the client.
    gradient : dict of str to Tensor
        Mean gradient of the loss over the client's batch, by parameter name; or its best
        estimate where the client sent weights.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    images : int
        Number of images behind the update.
    labels : tuple of int or None
        The labels, where the threat model says that the server knows them.
    """

    model: nn.Module = field(repr=False)
    gradient: dict[str, Tensor] = field(repr=False)
    input_shape: tuple[int, int, int]
    images: int = 1
    labels: tuple[int, ...] | None = None

    @classmethod
    def from_gradient(
        cls,
        model: nn.Module,
        gradient: Mapping[str, Any],
        input_shape: tuple[int, int, int],
        batch_size: int = 1,
        labels: Sequence[int] | None = None,
    ) -> Observation:
        """Take a gradient that a client shared.

        Parameters
        ----------
        model : nn.Module
            The model as sent.
        gradient : mapping
            Arrays or tensors by parameter name. Entries that are no parameters (buffers)
            are left out.
        input_shape, labels
            See the attributes.
        batch_size : int
            Number of images in the batch.

        Raises
        ------
        InvalidUpdateError
            If a parameter is missing, misshapen or not finite, or all of them are zero.
        """
        checked: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name not in gradient:
                raise InvalidUpdateError(
                    f"the update has no entry {name!r}; it has {', '.join(gradient) or 'none'}"
                )
            checked[name] = _check(name, torch.as_tensor(gradient[name]), tuple(parameter.shape))
        if not any(bool(g.any()) for g in checked.values()):
            raise InvalidUpdateError("every entry of the update is zero: it says nothing")
        channels, height, width = input_shape
        known = None if labels is None else tuple(int(y) for y in labels)
        return cls(model, checked, (channels, height, width), batch_size, known)

    @classmethod
    def from_weights(
        cls,
        model: nn.Module,
        weights: Mapping[str, Any],
        learning_rate: float,
        input_shape: tuple[int, int, int],
        local_steps: int = 1,
        batch_size: int = 1,
        labels: Sequence[int] | None = None,
    ) -> Observation:
        """Take weights that a client shared after local steps of plain SGD.

        The gradient is ``(sent - received) / (learning_rate * local_steps)``: exact, up to
        rounding, for one step; the mean over the steps otherwise.

        Raises
        ------
        InvalidInputError
            If the learning rate or the number of steps is not positive.
        InvalidUpdateError
            As for :meth:`from_gradient`.
        """
        if learning_rate <= 0 or local_steps < 1:
            raise InvalidInputError(
                f"learning rate {learning_rate} and local steps {local_steps} must be positive"
            )
        change = {}
        for name, parameter in model.named_parameters():
            if name in weights:
                received = _check(name, torch.as_tensor(weights[name]), tuple(parameter.shape))
                sent = parameter.detach().cpu().double()
                change[name] = (sent - received) / (learning_rate * local_steps)
        return cls.from_gradient(model, change, input_shape, batch_size * local_steps, labels)


def _check(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        raise InvalidUpdateError(
            f"entry {name!r} of the update has shape {tuple(value.shape)}, the model has {shape}"
        )
    if value.is_complex():
        raise InvalidUpdateError(f"entry {name!r} of the update is complex")
    value = value.detach().cpu().double()
    if not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise InvalidUpdateError(
            f"entry {name!r} of the update has {bad} values that are NaN or infinite"
        )
    return value
