"""A chain of layers, run on many updates at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedleak.client.loss import PLAIN, Loss
from fedleak.client.training import LocalTraining
from fedleak.errors import UnsupportedModelError
from fedleak.modules import copied, unwrapped
from fedleak.systems.base import Gradients, Layer, Shape
from fedleak.systems.linear import Dense
from fedleak.systems.normalisation import Standardise
from fedleak.systems.reading import read_layers


@dataclass
class Trace:
    """Every value of one forward and backward pass of a chain.

    Attributes
    ----------
    inputs : list of Tensor
        The input of every layer and, last, of the head.
    cotangents : list of Tensor
        ``dL/dz`` of every layer, without the head.
    gradients : dict
        ``dL/dparameter`` by name, shape (N, *parameter).
    """

    inputs: list[Tensor]
    cotangents: list[Tensor]
    gradients: Gradients


class Chain:
    """Layers between the image and the head, and the fully connected head.

    Attributes
    ----------
    layers : list of Layer
        In forward order, without the head.
    head : Dense
        The last layer; its output are the logits.
    loss : Loss
        What clients minimise: the mean cross-entropy, where nothing else is known.
    """

    def __init__(self, layers: list[Layer], head: Dense, loss: Loss | None = None):
        self.layers, self.head = layers, head
        self.loss = loss or PLAIN

    @classmethod
    def read(
        cls, model: nn.Module, input_shape: Shape, client: LocalTraining | None = None
    ) -> Chain:
        """Read a module.

        Parameters
        ----------
        model : nn.Module
            Any module whose computation is a chain: ``nn.Sequential``, nested, or a
            ``forward`` that torch.fx can trace, in the mode (``train`` or ``eval``) of the
            clients. Its tensors are copied as float64.
        input_shape : tuple of int
            Shape (C, H, W) of one image.
        client : LocalTraining, optional
            What clients minimise, and how they normalise images before the model sees them: one
            more layer. Without it the loss is the mean cross-entropy.

        Returns
        -------
        Chain

        Raises
        ------
        UnsupportedModelError
            If the module is not such a chain; the message names the layer.
        InvalidInputError
            If the module cannot take an image of this shape, or holds NaN.
        """
        if client is not None and client.norm:
            model = client.in_mode(copied(unwrapped(model)))
        layers = read_layers(model, input_shape)
        if not layers or not isinstance(layers[-1], Dense):
            last = f" but in {layers[-1].name!r}" if layers else ""
            raise UnsupportedModelError(
                f"the model does not end in a fully connected layer (nn.Linear){last}; "
                "the linear systems start from such a head"
            )
        loss = None
        if client is not None:
            loss = client.criterion
            if client.mean:
                client.check_channels(input_shape[0])
                layers.insert(0, Standardise(input_shape, client))
        return cls(layers[:-1], layers[-1], loss)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def to(self, device: torch.device | str) -> Chain:
        """Move the chain to ``device``, in place, and return it."""
        for layer in [*self.layers, self.head]:
            layer.to(torch.device(device))
        return self

    @property
    def input_shape(self) -> Shape:
        return self.layers[0].in_shape if self.layers else self.head.in_shape

    @property
    def lead(self) -> int:
        """Number of layers that only reshape or normalise the image, before any other."""

        def leads(layer: Layer) -> bool:
            return layer.reshapes or isinstance(layer, Standardise)

        return next((i for i, layer in enumerate(self.layers) if not leads(layer)), 0)

    def features(self, x: Tensor, depth: int | None = None) -> list[Tensor]:
        """Return the image and the outputs of the first ``depth`` layers (default: all)."""
        inputs = [x]
        for layer in self.layers[:depth]:
            inputs.append(layer.forward(inputs[-1]))
        return inputs

    def trace(self, x: Tensor, label: Tensor) -> Trace:
        """Return what each client would send for image ``x`` with label ``label``.

        Parameters
        ----------
        x : Tensor, float64, shape (N, C, H, W)
        label : Tensor, int64, shape (N,)

        Returns
        -------
        Trace
            Of the loss of each image alone; differentiable in ``x``.
        """
        inputs = self.features(x)
        logits = self.head.forward(inputs[-1])
        e = self.loss.alone(logits, label)
        gradients = self.head.gradients(inputs[-1], e)
        d = self.head.backward(inputs[-1], logits, e)
        below = self.backward(inputs, d)
        return Trace(inputs, below.cotangents, gradients | below.gradients)

    def backward(self, inputs: list[Tensor], d: Tensor) -> Trace:
        """Run the backward pass of the first ``len(inputs) - 1`` layers.

        Parameters
        ----------
        inputs : list of Tensor
            From :meth:`features`; the last is the output of the last layer in question.
        d : Tensor
            ``dL/d`` of that output.
        """
        gradients: Gradients = {}
        cotangents = [d]
        for i in reversed(range(len(inputs) - 1)):
            layer = self.layers[i]
            gradients |= layer.gradients(inputs[i], cotangents[0])
            if i:
                cotangents.insert(0, layer.backward(inputs[i], inputs[i + 1], cotangents[0]))
        return Trace(inputs, cotangents, gradients)
