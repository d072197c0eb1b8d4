"""Read a torch module as a list of layers; refuse by name what is no chain of them."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.modules import copied, ends_in_log_softmax, logits_of, unwrapped
from fedleak.systems import (  # noqa: F401 (they register)
    activations,
    conv,
    group_norm,
    linear,
    normalisation,
)
from fedleak.systems.base import LAYERS, Layer, Shape
from fedleak.systems.pooling import Mean


def _no_layer(*args: Any, **kwargs: Any) -> nn.Module:
    return nn.Identity()


def _max_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> nn.Module:
    return nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


#: The module that each function or tensor method in ``forward`` amounts to, made with the
#: arguments after the first.
FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    torch.tanh: nn.Tanh,
    F.tanh: nn.Tanh,
    "tanh": nn.Tanh,
    torch.sigmoid: nn.Sigmoid,
    F.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    F.leaky_relu: nn.LeakyReLU,
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    F.relu6: nn.ReLU6,
    F.hardtanh: nn.Hardtanh,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    torch.mean: Mean,
    "mean": Mean,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    torch.flatten: _no_layer,
    torch.reshape: _no_layer,
    "flatten": _no_layer,
    "view": _no_layer,
    "reshape": _no_layer,
}
# Bookkeeping around ``x.view(x.size(0), -1)``: no layer of its own.
_IGNORED = {"size", getattr, operator.getitem}


def read_layers(model: nn.Module, input_shape: Shape) -> list[Layer]:
    """Return the layers of a module, in forward order; see :meth:`Chain.read`."""
    given = unwrapped(model)
    _demand_known(given)
    model = copied(given).eval()
    named, modules = dict(model.named_parameters()), dict(model.named_modules())
    graph, runner = _traced(given, model, input_shape)
    layers: list[Layer] = []
    seen: set[Any] = set()
    current: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder" and current is None:
            current = node
        elif node.op == "output":
            if logits_of(node.args[0]) is not current:
                _demand_chain(node, current)
        elif current is not None and ends_in_log_softmax(node, modules):
            # Cross-entropy of it, or its negative likelihood, is cross-entropy of the logits.
            _demand_chain(node, current)
            current = node
        elif node.target not in _IGNORED or node.op == "call_module":
            _demand_chain(node, current)
            if node.op == "call_module":
                _demand_own_parameters(str(node.target), modules[str(node.target)], named)
            if node.op == "call_module" and node.target in seen and _has_parameters(modules, node):
                raise UnsupportedModelError(
                    f"layer {node.target!r} is used twice: its gradient is the sum of both uses"
                )
            seen.add(node.target)
            layers.append(_read_node(node, modules, runner, current))
            current = node
    return layers


#: Graphs of models by what they depend on: weights change in every round, the layers do not.
_TRACED: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[fx.Graph, _ShapeRunner]]]
_TRACED = weakref.WeakKeyDictionary()


def _traced(
    given: nn.Module, model: nn.Module, input_shape: Shape
) -> tuple[fx.Graph, _ShapeRunner]:
    """Return the graph of ``model``, a copy of ``given``, and the shapes of its values."""
    known = _TRACED.setdefault(given, {})
    key = (tuple(input_shape), *((id(m), type(m), m.training) for m in given.modules()))
    if key not in known:
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # fx raises many kinds; each means "not a fixed chain"
            raise UnsupportedModelError(
                f"the forward pass of {type(model).__name__} cannot be traced ({error}); "
                "the linear systems need a fixed chain of layers"
            ) from error
        reference = next(model.parameters(), torch.empty(0))
        value = torch.zeros(1, *input_shape, dtype=reference.dtype, device=reference.device)
        runner = _ShapeRunner(model, graph, input_shape)
        with torch.no_grad():
            runner.run(value)
        known.clear()
        known[key] = graph, runner
    return known[key]


def _demand_own_parameters(name: str, module: nn.Module, named: dict[str, nn.Parameter]) -> None:
    """Refuse weights that are computed from others, or another layer's, under their own name."""
    for kind in ("weight", "bias"):
        value = getattr(module, kind, None)
        if isinstance(value, Tensor) and f"{name}.{kind}" not in named:
            raise UnsupportedModelError(
                f"layer {name!r} has no {kind!r} of its own: it is computed (weight or spectral "
                "norm) or shared with another layer. The hybrid attack matches such a model as a "
                "whole"
            )


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
    node: fx.Node, modules: dict[str, nn.Module], runner: _ShapeRunner, before: fx.Node | None
) -> Layer:
    assert before is not None
    module: nn.Module | None
    if node.op == "call_module":
        name, module = str(node.target), modules[str(node.target)]
        what = f"{name!r} ({type(module).__name__})"
        frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
        if frozen:
            raise UnsupportedModelError(
                f"layer {name!r} has a frozen {frozen[0]!r}: it gets no gradient to attack"
            )
    else:
        name, module = node.name, _as_module(node, runner)
        what = f"{name!r} ({node.op})"
    reader = None if module is None else LAYERS.reader_of(module)
    if reader is None or node.name not in runner.shapes:
        own = (k.removeprefix("torch.nn.") for k in LAYERS if "fedleak." not in k)
        supported = ", ".join(sorted(own))
        raise UnsupportedModelError(
            f"layer {what} has no linear system in fedleak; layers that have one: {supported}. "
            "The hybrid attack matches such a model as a whole"
        )
    shape_in, shape_out = runner.shapes[before.name], runner.shapes[node.name]
    if shape_out[:1] != (1,):
        raise UnsupportedModelError(
            f"layer {what} mixes the images of a batch: it makes one image an array of shape "
            f"{shape_out}"
        )
    return reader(name, module, shape_in[1:], shape_out[1:])


def _as_module(node: fx.Node, runner: _ShapeRunner) -> nn.Module | None:
    """Return the module that a function call amounts to; None if there is none."""
    make = FUNCTIONS.get(node.target)
    if make is None:
        return None
    known = fx.node.map_arg((node.args[1:], node.kwargs), lambda n: runner.values.get(n.name))
    args, kwargs = known
    return make(*args, **{k: v for k, v in kwargs.items() if k != "input"})


def _demand_known(model: nn.Module) -> None:
    """Refuse what a client computes from what the server does not know, and NaN."""
    for name, module in model.named_modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        if dropout and module.training and module.p > 0:
            raise UnsupportedModelError(
                f"layer {name!r}: dropout with p={module.p} is random in training, which the "
                "attacker does not see; set p=0"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise UnsupportedModelError(
                f"layer {name!r} uses batch statistics, which are not known before its input is; "
                "if the clients train with running statistics, hand the model over after "
                "model.eval(). The hybrid attack matches such a model as a whole"
            )
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InvalidInputError(f"the model's {name!r} holds NaN or infinite values")


class _Tracer(fx.Tracer):
    """Does not look into modules that are layers, whoever's they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = LAYERS.reader_of(m) is not None
        return known or super().is_leaf_module(m, module_qualified_name)


class _ShapeRunner(fx.Interpreter):
    """Runs the model once on zeros, to learn the shape of every tensor and all other values."""

    def __init__(self, model: nn.Module, graph: fx.Graph, input_shape: Shape):
        super().__init__(model, graph=graph)
        self.shapes: dict[str, Shape] = {}
        self.values: dict[str, Any] = {}
        self.input_shape = input_shape

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except (RuntimeError, ValueError) as error:
            raise InvalidInputError(
                f"layer {n.target!s} cannot take an image of shape {self.input_shape}: {error}"
            ) from error
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        else:
            self.values[n.name] = value
        return value
