"""What is known of every edge of a graph: its value, and the derivative of the loss by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedleak.graph.capture import Graph, Node
from fedleak.graph.kernels.refusal import Refused
from fedleak.graph.kinds import Kind

#: Relative error that a client's float32 leaves in a value or derivative, at least.
ROUNDING = 2e-7


@dataclass(frozen=True)
class Known:
    """A tensor that is known, or part of it.

    Attributes
    ----------
    value : Tensor
    error : float
        Estimated standard deviation of an entry.
    by : str
        The rule that found it.
    mask : Tensor of bool or None
        Where it is known; None for everywhere.
    deviation : Tensor or None
        Estimated standard deviation of each entry (shapes broadcast), where entries differ.
    """

    value: Tensor
    error: float
    by: str
    mask: Tensor | None = None
    deviation: Tensor | None = None

    @property
    def whole(self) -> bool:
        return self.mask is None

    @property
    def size(self) -> float:
        """Root mean square of what is known."""
        kept = self.value if self.mask is None else self.value[self.mask]
        return float(kept.square().mean().sqrt()) if kept.numel() else 0.0

    @property
    def relative(self) -> float:
        """The error, relative to the size."""
        return self.error / max(self.size, 1e-300)


@dataclass
class Knowledge:
    """What is known of a graph, from one update.

    Attributes
    ----------
    graph : Graph
    gradient : dict of str to Tensor
        The observed gradient of the mean loss, by parameter.
    errors : mapping of str to float
        Standard deviations of the entries of a parameter's gradient beside float32's rounding: of
        weights whose difference it is, or of noise.
    values, cotangents : dict of str to Known
        Of every edge its value, and the derivative of the loss by it.
    contributions : dict of (str, int) to Known
        What each consumer of an edge adds to its cotangent, by consumer and place.
    slopes : dict of str to Tensor
        Of every pointwise node its derivative, where that is known everywhere.
    checked : set of str
        Nodes whose gradient was reproduced, to rounding, by value and cotangent.
    short : dict of str to str
        Nodes whose gradient cannot tell their input, and why.
    mended : set of str
        Edges above whose layers slopes were mended already.
    weighed : set of str
        Activations whose slopes were compared with a bias' gradient below.
    blind : set of str
        Convolutions that the blind rule was tried on.
    resolved : dict of str to (Tensor, Tensor, float) or Refused
        What the blind kernel found of a convolution's inputs and cotangents, image by image.
    contradicted : set of str
        Layers whose gradient rows contradict each other: their cotangent is wrong somewhere.
    """

    graph: Graph
    gradient: Mapping[str, Tensor]
    errors: Mapping[str, float] = field(default_factory=dict)
    values: dict[str, Known] = field(default_factory=dict)
    cotangents: dict[str, Known] = field(default_factory=dict)
    contributions: dict[tuple[str, int], Known] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)
    short: dict[str, str] = field(default_factory=dict)
    mended: set[str] = field(default_factory=set)
    weighed: set[str] = field(default_factory=set)
    blind: set[str] = field(default_factory=set)
    resolved: dict[str, tuple[Tensor, Tensor, float] | Refused] = field(default_factory=dict)
    contradicted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for node in self.graph.nodes.values():
            if node.kind in (Kind.PARAMETER, Kind.CONSTANT):
                made = node([], self.graph.parameters)
                self.values[node.name] = Known(made, 0.0, "the model")

    def value(self, edge: str) -> Tensor | None:
        """Return an edge's value where it is known everywhere."""
        known = self.values.get(edge)
        return known.value if known is not None and known.whole else None

    def gradient_of(self, node: Node, local: str) -> Tensor | None:
        """Return the gradient of a parameter that this node alone uses, if it was sent."""
        name = node.parameter(local)
        if name is None or name in self.graph.shared:
            return None
        found = self.gradient.get(name)
        return found if found is not None and bool(found.any()) else None

    def error_of(self, name: str) -> float:
        """Return the standard deviation of an entry of a parameter's gradient."""
        size = float(self.gradient[name].square().mean().sqrt())
        return ((ROUNDING * size) ** 2 + self.errors.get(name, 0.0) ** 2) ** 0.5

    def relative(self, name: str) -> float:
        """Return :meth:`error_of` relative to the size of the parameter's gradient."""
        size = float(self.gradient[name].square().mean().sqrt())
        return self.error_of(name) / max(size, 1e-300)

    def learn_value(self, edge: str, known: Known) -> bool:
        """Note an edge's value, unless as much is known already; return whether it is new."""
        before = self.values.get(edge)
        if before is not None and (before.whole or not known.whole):
            return False
        self.values[edge] = known
        return True

    def learn_cotangent(self, edge: str, known: Known) -> bool:
        """Note the derivative by an edge; return whether it is new."""
        if edge in self.cotangents:
            return False
        self.cotangents[edge] = known
        self.short.pop(edge, None)  # what was said of a layer's gradient was without it
        return True

    def forget_below(self, node: Node) -> None:
        """Forget what was computed from this node's cotangent: its slope has changed.

        Cotangents, and what was judged by them; values that were believed stay.
        """
        below = self.graph.below(node.name)
        for edge in below:
            self.cotangents.pop(edge, None)
            self.short.pop(edge, None)
        for judged in (self.checked, self.contradicted, self.weighed):
            judged -= below
        for name, place in list(self.contributions):
            if name == node.name or name in below:
                del self.contributions[name, place]


#: Takes what is known, adds to it, and returns whether it found anything new.
Rule = Callable[[Knowledge], bool]


def spread(knowledge: Knowledge, rules: Mapping[str, Rule]) -> None:
    """Apply rules until nothing new comes, from the first again after each that found something."""
    while any(rule(knowledge) for rule in rules.values()):
        pass


def probe(made: Callable[[Tensor], Tensor], at: Tensor, error: float) -> float:
    """Return how large an error comes out where ``error`` goes in: one random one is tried."""
    if error == 0:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(at.shape, generator=generator, dtype=torch.float64).to(at)
    with torch.no_grad():
        moved = made(at + error * noise) - made(at)
    return float(moved.square().mean().sqrt())
