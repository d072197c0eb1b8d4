"""Read a torch module as a chain of layers, and run the chain on many updates."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.systems.activations import LeakyReLU, Reshape, Sigmoid, Tanh
from fedleak.systems.base import Affine, Gradients, Layer, Shape
from fedleak.systems.conv import Conv
from fedleak.systems.linear import Dense

Reader = Callable[[str, Any, Shape, Shape], Layer]

#: How each kind of module becomes a layer: (name, module, in_shape, out_shape) -> Layer.
MODULES: dict[type[nn.Module], Reader] = {
    nn.Conv2d: Conv.read,
    nn.Linear: lambda n, m, i, o: Dense.read(n, m, i),
    nn.Tanh: lambda n, m, i, o: Tanh(n, i, o),
    nn.Sigmoid: lambda n, m, i, o: Sigmoid(n, i, o),
    nn.LeakyReLU: lambda n, m, i, o: LeakyReLU(n, i, o, m.negative_slope),
    nn.Identity: lambda n, m, i, o: Reshape(n, i, o),
    nn.Flatten: lambda n, m, i, o: Reshape(n, i, o),
    nn.Unflatten: lambda n, m, i, o: Reshape(n, i, o),
    nn.Dropout: lambda n, m, i, o: Reshape(n, i, o),
    nn.Dropout2d: lambda n, m, i, o: Reshape(n, i, o),
}

_SHAPED = lambda n, node, i, o: Reshape(n, i, o)  # noqa: E731
_LEAKY = lambda n, node, i, o: LeakyReLU(n, i, o, _negative_slope(node))  # noqa: E731
#: The same for functions and tensor methods called in ``forward``.
FUNCTIONS: dict[Any, Reader] = {
    torch.tanh: lambda n, node, i, o: Tanh(n, i, o),
    F.tanh: lambda n, node, i, o: Tanh(n, i, o),
    "tanh": lambda n, node, i, o: Tanh(n, i, o),
    torch.sigmoid: lambda n, node, i, o: Sigmoid(n, i, o),
    F.sigmoid: lambda n, node, i, o: Sigmoid(n, i, o),
    "sigmoid": lambda n, node, i, o: Sigmoid(n, i, o),
    F.leaky_relu: _LEAKY,
    torch.flatten: _SHAPED,
    torch.reshape: _SHAPED,
    "flatten": _SHAPED,
    "view": _SHAPED,
    "reshape": _SHAPED,
}
# Bookkeeping around ``x.view(x.size(0), -1)``: no layer of its own.
_IGNORED = {"size", getattr, operator.getitem}


def _negative_slope(node: fx.Node) -> float:
    slope: Any = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
    return float(slope)


@dataclass
class Trace:
    """Every value of one forward and backward pass of a chain.

    Attributes
    ----------
    inputs : list of Tensor
        The input of every layer and, last, of the head.
    errors : list of Tensor
        ``dL/dz`` of every layer, without the head.
    gradients : dict
        ``dL/dparameter`` by name, shape (N, *parameter).
    """

    inputs: list[Tensor]
    errors: list[Tensor]
    gradients: Gradients


class Chain:
    """Layers between the image and the head, and the fully connected head.

    Attributes
    ----------
    layers : list of Layer
        In forward order, without the head.
    head : Dense
        The last layer; its output are the logits of a softmax cross-entropy.
    """

    def __init__(self, layers: list[Layer], head: Dense):
        self.layers, self.head = layers, head

    @classmethod
    def read(cls, model: nn.Module, input_shape: Shape) -> Chain:
        """Read a module.

        Parameters
        ----------
        model : nn.Module
            Any module whose computation is a chain: ``nn.Sequential``, nested, or a
            ``forward`` that torch.fx can trace. Its tensors are copied as float64.
        input_shape : tuple of int
            Shape (C, H, W) of one image.

        Returns
        -------
        Chain

        Raises
        ------
        UnsupportedModelError
            If the module is not such a chain; the message names the layer.
        InvalidInputError
            If the module cannot take an image of this shape.
        """
        layers = _read_layers(model, input_shape)
        if not layers or not isinstance(layers[-1], Dense):
            last = f" but in {layers[-1].name!r}" if layers else ""
            raise UnsupportedModelError(
                f"the model does not end in a fully connected layer (nn.Linear){last}; "
                "the linear systems start from such a head"
            )
        return cls(layers[:-1], layers[-1])

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def to(self, device: torch.device | str) -> Chain:
        """Move the chain to ``device``, in place, and return it."""
        for layer in [*self.layers, self.head]:
            layer.to(torch.device(device))
        return self

    @property
    def affine(self) -> list[Affine]:
        """Layers with a linear system of their own, in forward order, without the head."""
        return [layer for layer in self.layers if isinstance(layer, Affine)]

    @property
    def input_shape(self) -> Shape:
        return self.layers[0].in_shape if self.layers else self.head.in_shape

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
            Of the cross-entropy of each image alone; differentiable in ``x``.
        """
        inputs = self.features(x)
        logits = self.head.forward(inputs[-1])
        e = logits.softmax(1) - F.one_hot(label, logits.shape[1]).to(logits)
        gradients = self.head.gradients(inputs[-1], e)
        d = self.head.backward(inputs[-1], logits, e)
        below = self.backward(inputs, d)
        return Trace(inputs, below.errors, gradients | below.gradients)

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
        errors = [d]
        for i in reversed(range(len(inputs) - 1)):
            layer = self.layers[i]
            gradients |= layer.gradients(inputs[i], errors[0])
            if i:
                errors.insert(0, layer.backward(inputs[i], inputs[i + 1], errors[0]))
        return Trace(inputs, errors, gradients)


def _read_layers(model: nn.Module, input_shape: Shape) -> list[Layer]:
    model = copy.deepcopy(model).eval()
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:  # fx raises many kinds; each means "not a fixed chain"
        raise UnsupportedModelError(
            f"the forward pass of {type(model).__name__} cannot be traced ({error}); "
            "the linear systems need a fixed chain of layers"
        ) from error
    modules = dict(graph.named_modules())
    reference = next(model.parameters(), torch.empty(0))
    value = torch.zeros(1, *input_shape, dtype=reference.dtype, device=reference.device)
    runner = _ShapeRunner(graph, input_shape)
    with torch.no_grad():
        runner.run(value)
    layers: list[Layer] = []
    seen: set[Any] = set()
    current: fx.Node | None = None
    for node in graph.graph.nodes:
        if node.op == "placeholder" and current is None:
            current = node
        elif node.op == "output":
            _demand_chain(node, current)
        elif node.target not in _IGNORED or node.op == "call_module":
            _demand_chain(node, current)
            if node.op == "call_module" and node.target in seen and _has_parameters(modules, node):
                raise UnsupportedModelError(
                    f"layer {node.target!r} is used twice: its gradient is the sum of both uses"
                )
            seen.add(node.target)
            layers.append(_read_node(node, modules, runner.shapes, current))
            current = node
    return layers


def _has_parameters(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    return next(modules[str(node.target)].parameters(), None) is not None


def _demand_chain(node: fx.Node, current: fx.Node | None) -> None:
    if current not in node.all_input_nodes or not all(
        n is current or n.target in _IGNORED for n in node.all_input_nodes
    ):
        raise UnsupportedModelError(
            f"layer {node.name!r} does not follow the layer before it alone (a branch, a "
            "residual connection or a loose parameter); the linear systems need a chain"
        )


def _read_node(
    node: fx.Node, modules: dict[str, nn.Module], shapes: dict[str, Shape], before: fx.Node | None
) -> Layer:
    assert before is not None
    shape_in, shape_out = shapes[before.name], shapes[node.name]
    if node.op == "call_module":
        module = modules[str(node.target)]
        _demand_plain(str(node.target), module)
        reader = MODULES.get(type(module))
        if reader is not None:
            return reader(str(node.target), module, shape_in, shape_out)
        what = f"{node.target!r} ({type(module).__name__})"
    else:
        reader = FUNCTIONS.get(node.target)
        if reader is not None:
            return reader(node.name, node, shape_in, shape_out)
        what = f"{node.name!r} ({node.op})"
    supported = ", ".join(sorted(kind.__name__ for kind in MODULES))
    raise UnsupportedModelError(
        f"layer {what} has no linear system in fedleak; layers that have one: {supported}"
    )


def _demand_plain(name: str, module: nn.Module) -> None:
    """Refuse what would be attacked as something it is not."""
    if isinstance(module, (nn.Dropout, nn.Dropout2d)) and module.p > 0:
        raise UnsupportedModelError(
            f"layer {name!r}: dropout with p={module.p} is random in training, which the attacker "
            "does not see; set p=0"
        )
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
    if frozen:
        raise UnsupportedModelError(
            f"layer {name!r} has a frozen {frozen[0]!r}: it gets no gradient to attack"
        )


class _ShapeRunner(fx.Interpreter):
    """Runs the model once on zeros, to learn the shape of every value."""

    def __init__(self, graph: fx.GraphModule, input_shape: Shape):
        super().__init__(graph)
        self.shapes: dict[str, Shape] = {}
        self.input_shape = input_shape

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except (RuntimeError, ValueError) as error:
            raise InvalidInputError(
                f"layer {n.target!s} cannot take an image of shape {self.input_shape}: {error}"
            ) from error
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape[1:])
        return value
