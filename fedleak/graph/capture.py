"""A torch module as a graph of tensors, captured by torch.fx."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fedleak import memory
from fedleak.errors import UnsupportedModelError
from fedleak.graph.kinds import Kind, kind_of
from fedleak.modules import computed_weights, copied, ends_in_log_softmax, logits_of

Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Node:
    """One operation of a module; its output is the edge of the same name.

    Attributes
    ----------
    name : str
        Of the node and of the edge that it makes.
    kind : Kind
        What the rules may ask of it.
    inputs : tuple of str
        The edges that it takes, in order.
    shape : tuple of int
        Shape of its output, for the batch that the graph was captured with; empty where it
        returns several tensors.
    target : object
        What torch.fx calls: a module, a function, the name of a method or of a parameter.
    args, kwargs
        Its arguments, in which each edge stands for itself by :class:`Edge`.
    path : str
        The module's place in the model, for messages: ``"layer4.1.conv2"``.
    parameters : tuple of str
        Names of the trainable parameters that it uses, in the model.
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""
    parameters: tuple[str, ...] = ()

    @property
    def module(self) -> Any:
        """The module that is called (only of nodes that call one)."""
        return self.target

    def parameter(self, local: str) -> str | None:
        """Return the model's name of the module's parameter ``local``, if it is trainable."""
        name = f"{self.path}.{local}"
        return name if name in self.parameters else None

    def __call__(self, inputs: Iterable[Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        """Run the operation on its input edges, with these parameters of the model."""
        edges = dict(zip(self.inputs, inputs, strict=True))

        def filled(a: Any) -> Any:
            return edges[a.name] if isinstance(a, Edge) else a

        args = fx.node.map_aggregate(self.args, filled)
        kwargs = fx.node.map_aggregate(dict(self.kwargs), filled)
        if isinstance(self.target, nn.Module):
            own = {p.removeprefix(f"{self.path}."): parameters[p] for p in self.parameters}
            made = functional_call(self.target, own, args, kwargs)
        elif self.kind is Kind.PARAMETER:
            made = parameters[self.path]
        elif self.kind is Kind.CONSTANT:
            made = self.target
        elif isinstance(self.target, str):
            made = getattr(args[0], self.target)(*args[1:], **kwargs)
        else:
            made = self.target(*args, **kwargs)
        return made


@dataclass(frozen=True)
class Edge:
    """An edge's place among a node's arguments."""

    name: str


class Graph:
    """A module's forward pass for a fixed number of images.

    Attributes
    ----------
    nodes : dict of str to Node
        By name, in an order in which they can be run; the images' is the first.
    image, logits : str
        The edges of the images and of the module's output.
    parameters : dict of str to Tensor
        The module's trainable parameters.
    batch : int
        Number of images B.
    consumers : dict of str to list of (str, int)
        Of every edge the nodes that take it, and at which place among their inputs.
    """

    def __init__(self, nodes: dict[str, Node], logits: str, parameters: Tensors, batch: int):
        self.nodes, self.logits, self.parameters, self.batch = nodes, logits, parameters, batch
        self.image = next(iter(nodes))
        self.consumers: dict[str, list[tuple[str, int]]] = {name: [] for name in nodes}
        self._users: dict[str, list[str]] = {}
        for node in nodes.values():
            for place, edge in enumerate(node.inputs):
                self.consumers[edge].append((node.name, place))
            for name in node.parameters:
                self._users.setdefault(name, []).append(node.name)
        #: Parameters that several nodes use: their gradient is a sum.
        self.shared = {name for name, users in self._users.items() if len(users) > 1}

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        batch: int = 1,
        dtype: torch.dtype = torch.float64,
    ) -> Graph:
        """Capture a module.

        Parameters
        ----------
        model : nn.Module
            In the mode (``train`` or ``eval``) of the client. It is copied.
        input_shape : tuple of int
            Shape (C, H, W) of one image.
        batch : int
            Number of images.
        dtype : torch.dtype
            Precision of the computation.

        Returns
        -------
        Graph

        Raises
        ------
        UnsupportedModelError
            If the forward pass is no fixed graph; the message names the operation.
        """
        model = copied(model).to(dtype)
        plain = copied(model)
        computed = computed_weights(model)
        if computed:
            raise UnsupportedModelError(
                f"layer {computed[0]!r} computes its weights from others (weight or spectral norm)"
            )
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # type: ignore[assignment]
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                # What a client's forward pass leaves in the buffers is no part of its gradient.
                module.running_mean = module.running_var = module.num_batches_tracked = None
        try:
            traced = fx.symbolic_trace(model)
        except Exception as error:  # fx raises many kinds; each means "no fixed graph"
            raise UnsupportedModelError(
                f"the forward pass of {type(model).__name__} cannot be captured as a graph: {error}"
            ) from error
        reader = _Reader(traced, dict(model.named_parameters()))
        device = next(model.parameters()).device
        images = torch.full((batch, *input_shape), 0.5, dtype=dtype, device=device)
        with torch.no_grad():
            reader.run(images)
        if reader.logits is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not return one tensor of logits"
            )
        parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        made = cls(_needed(reader.nodes, reader.logits), reader.logits, parameters, batch)
        made._compare(plain, images)
        return made

    def _compare(self, model: nn.Module, images: Tensor) -> None:
        """Refuse a model that makes other logits than the graph: it changes values in place."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(images.shape, generator=generator, dtype=torch.float64).to(images)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of dropout
            ours = self.run({self.image: images.clone()}, [self.logits])[self.logits]
            torch.manual_seed(0)
            # As the graph, from what the model sees: a client's normalisation is a hook before.
            theirs = logits_of(model.forward(images.clone()))
        close = partial(torch.allclose, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
        if not close(ours) and not close(ours.log_softmax(-1)):
            raise UnsupportedModelError(
                f"{type(model).__name__} changes values in place that it uses again"
            )

    def run(
        self,
        known: Mapping[str, Tensor],
        wanted: Iterable[str],
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensors:
        """Compute edges from others.

        Parameters
        ----------
        known : mapping of str to Tensor
            Edges that are given; what lies above them is computed from there.
        wanted : iterable of str
        parameters : mapping of str to Tensor, optional
            By default the model's.

        Returns
        -------
        dict of str to Tensor
            The wanted edges.
        """
        wanted = list(wanted)
        values = dict(known)
        needed, stack = set(), [w for w in wanted if w not in values]
        while stack:
            name = stack.pop()
            if name not in needed:
                needed.add(name)
                stack += [i for i in self.nodes[name].inputs if i not in values]
        parameters = self.parameters if parameters is None else parameters
        for name, node in self.nodes.items():
            if name in needed:
                values[name] = node([values[i] for i in node.inputs], parameters)
        return {name: values[name] for name in wanted}

    def users(self, parameter: str) -> list[str]:
        """Return the nodes that use a parameter."""
        return self._users.get(parameter, [])

    def below(self, name: str) -> set[str]:
        """Return all edges that an edge is computed from, itself left out."""
        found: set[str] = set()
        stack = list(self.nodes[name].inputs)
        while stack:
            edge = stack.pop()
            if edge not in found:
                found.add(edge)
                stack += self.nodes[edge].inputs
        return found


class _Reader(fx.Interpreter):
    """Runs a traced module once and notes every operation on tensors as a node.

    What is no tensor (sizes, assertions) is computed here, once, and is a constant afterwards.
    """

    def __init__(self, traced: fx.GraphModule, parameters: Mapping[str, Any]):
        super().__init__(traced, garbage_collect_values=False)
        self.modules = dict(traced.named_modules())
        self.trainable = {n for n, p in parameters.items() if p.requires_grad}
        self.nodes: dict[str, Node] = {}
        self.logits: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            if memory.exhausted(error):
                raise
            raise UnsupportedModelError(f"operation {n.target!s} cannot be run: {error}") from error
        if n.op == "output":
            made = logits_of(n.args[0])
            if isinstance(made, fx.Node) and ends_in_log_softmax(made, self.modules):
                (made, *_) = made.all_input_nodes
            self.logits = made.name if isinstance(made, fx.Node) else None
        elif isinstance(value, Tensor) or _holds_tensors(value):
            self._note(n, value)
        return value

    def _note(self, n: fx.Node, value: Any) -> None:
        inputs = tuple(i.name for i in n.all_input_nodes if i.name in self.nodes)

        def lowered(a: fx.Node) -> Any:
            return Edge(a.name) if a.name in self.nodes else self.env[a]

        args = fx.node.map_arg(n.args, lowered)
        kwargs = fx.node.map_arg(dict(n.kwargs), lowered)
        if kwargs.get("inplace"):
            kwargs = {**kwargs, "inplace": False}
        target: Any = n.target
        path, own = "", tuple[str, ...]()
        if n.op == "call_module":
            path = str(n.target)
            target = self.modules[path]
            if type(target) is nn.GroupNorm:
                target = _GroupNorm.of(target)
            names = (f"{path}.{local}" for local, _ in target.named_parameters())
            own = tuple(name for name in names if name in self.trainable)
        if n.op == "placeholder":
            kind = Kind.IMAGE
        elif n.op == "get_attr":
            path = str(n.target)
            own = (path,) if path in self.trainable else ()
            kind = Kind.PARAMETER if own else Kind.CONSTANT
            target = None if own else value
        else:
            several = any(not self.nodes[i].shape for i in inputs) or not isinstance(value, Tensor)
            kind = Kind.OTHER if several else kind_of(target, args, kwargs)
            if kind is Kind.LINEAR and _hands_on(n, value, self.env):
                kind = Kind.RESHAPE
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        self.nodes[n.name] = Node(n.name, kind, inputs, shape, target, args, kwargs, path, own)


class _GroupNorm(nn.GroupNorm):
    """Of elementary operations: the backward pass of torch's own has no forward derivative."""

    @classmethod
    def of(cls, module: nn.GroupNorm) -> _GroupNorm:
        made = cls(module.num_groups, module.num_channels, module.eps, module.affine)
        made.weight, made.bias = module.weight, module.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        grouped = input.unflatten(1, (self.num_groups, -1)).flatten(2)
        variance, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
        made = ((grouped - mean) / (variance + self.eps).sqrt()).reshape(input.shape)
        if not self.affine:
            return made
        shape = -1, *[1] * (input.dim() - 2)
        return made * self.weight.reshape(shape) + self.bias.reshape(shape)


def _hands_on(n: fx.Node, value: Tensor, env: Mapping[fx.Node, Any]) -> bool:
    """Return whether a linear operation changes nothing: an average over one position."""
    if len(n.all_input_nodes) != 1 or n.target in (operator.getitem, operator.neg):
        return False
    taken = env[n.all_input_nodes[0]]
    return isinstance(taken, Tensor) and torch.equal(taken.flatten(), value.flatten())


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)


def _needed(nodes: dict[str, Node], logits: str) -> dict[str, Node]:
    """Leave out what the logits do not depend on, but the images."""
    needed, stack = {next(iter(nodes))}, [logits]
    while stack:
        name = stack.pop()
        if name not in needed:
            needed.add(name)
            stack += nodes[name].inputs
    return {name: node for name, node in nodes.items() if name in needed}
