"""Layer by layer, from the head to the image, by linear systems (R-GAP done right)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedleak.attacks.base import ATTACKS, Reconstruction
from fedleak.attacks.evidence import Evidence
from fedleak.errors import UnsupportedModelError
from fedleak.metric.rank import layer_rank
from fedleak.observation import Observation
from fedleak.solvers import cgls
from fedleak.systems import Affine, Layer, Pointwise, Rows

#: Relative rounding error of a float32 forward pass, measured on the paper's networks; that
#: of a weight gradient, a sum over many positions, was about three times as large.
_ROUNDING = 1.1e-7
#: Below this noise, relative to an entry's size, an update is as good as undefended.
CLEAN = 1e-5


@dataclass
class LayerSolution:
    """How the system of one layer was solved, for all updates.

    Attributes
    ----------
    name : str
    unknowns, rank : int
        ``rank`` is what generic weights give; equal to ``unknowns`` if solvable.
    residual : Tensor, shape (N,)
        ``||U x - v|| / ||v||``.
    """

    name: str
    unknowns: int
    rank: int
    residual: Tensor


@dataclass
class LinearSolution:
    """The result of the recursion, with everything known on the way.

    Attributes
    ----------
    values, cotangents : list of Tensor
        Entry ``i`` is the output of layer ``i - 1``, or the image for 0, and ``dL/d`` of it.
    deviations : list of Tensor
        Estimated standard deviation of each value.
    noise : Tensor, shape (N,)
        Noise of the update's entries relative to their root mean square, estimated from
        how far the head's gradient is from rank one.
    layers : list of LayerSolution
        In forward order.
    """

    values: list[Tensor]
    cotangents: list[Tensor]
    deviations: list[Tensor]
    noise: Tensor
    layers: list[LayerSolution] = field(default_factory=list)

    @property
    def image(self) -> Tensor:
        return self.values[0]

    def undetermined(self, layers: Sequence[Layer]) -> int:
        """Return how many of the first layers are left undetermined.

        From the head down, layers are solved exactly until the first rank-deficient one;
        that one and all below it are left. 0 means that the image itself is known.
        """
        deficient = {s.name for s in self.layers if s.rank < s.unknowns}
        return max((i + 1 for i, layer in enumerate(layers) if layer.name in deficient), default=0)

    def subset(self, mask: Tensor) -> LinearSolution:
        """Return the updates where ``mask`` is true."""
        return LinearSolution(
            [v[mask] for v in self.values],
            [c[mask] for c in self.cotangents],
            [d[mask] for d in self.deviations],
            self.noise[mask],
            [replace(s, residual=s.residual[mask]) for s in self.layers],
        )


#: ``(i, x, z, e) -> x``: replaces the solution of layer ``i`` for the layers below it.
Correction = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def solve_recursively(
    evidence: Evidence, mid_grey: float = 0.5, correct: Correction | None = None
) -> LinearSolution:
    """Solve every layer's linear system, from the head to the image.

    Chen & Campbell 2022, section 3, and R-GAP (Zhu & Blaschko 2021), with the
    convolution's bias, exact inverses of the activations, and no matrix.

    Parameters
    ----------
    evidence : Evidence
    mid_grey : float
        Where the image is undetermined, the solution nearest to this grey is taken; in the
        layers above, the one nearest to what a grey image gives there.
    correct : callable, optional
        Is given each layer's solution, and returns what the layers below build on.
    """
    chain, gradient = evidence.chain, evidence.gradient
    if chain.head.bias is None:
        raise UnsupportedModelError(
            f"head {chain.head.name!r} has no bias; its bias gradient is what the linear "
            "systems start from"
        )
    g = gradient[chain.head.bias_name]
    value, deviation, noise = _head_input(g, gradient[chain.head.weight_name])
    g, noise = _self_consistent(evidence, g, value, noise)
    cotangent = chain.head.backward(value, value, g)
    out = LinearSolution([value], [cotangent], [deviation], noise)
    grey = chain.features(torch.full((1, *chain.input_shape), mid_grey).to(value))
    for i in reversed(range(len(chain.layers))):
        layer = chain.layers[i]
        if isinstance(layer, Pointwise):
            x = layer.inverse(value)
            slope = layer.backward(x, value, torch.ones_like(value))
            cotangent = layer.backward(x, value, cotangent)
            deviation = deviation.reshape(x.shape) / slope.reshape(x.shape).abs().clamp_min(1e-12)
        else:
            assert isinstance(layer, Affine)
            weight_gradient = gradient[layer.weight_name]
            deviations = row_deviations(value, deviation, weight_gradient, noise)
            start = grey[i].expand(len(evidence), *layer.in_shape)
            x, residual = solve_layer(layer, value, cotangent, weight_gradient, deviations, start)
            if correct is not None:
                x = correct(i, x, value, cotangent)
            rank = layer_rank(layer, cotangent[0])
            out.layers.insert(0, LayerSolution(layer.name, layer.unknowns, rank, residual))
            cotangent = layer.backward(x, value, cotangent)
            deviation = (_spread(noise, x) * _rms(x)).expand_as(x)
        value = x
        out.values.insert(0, value)
        out.cotangents.insert(0, cotangent)
        out.deviations.insert(0, deviation)
    return out


def _spread(scalar: Tensor, like: Tensor) -> Tensor:
    return scalar.reshape(-1, *[1] * (like.dim() - 1))


def _rms(x: Tensor) -> Tensor:
    return _spread(x.flatten(1).square().mean(1).sqrt().clamp_min(1e-300), x)


def _head_input(g: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve ``G = g x^T`` for the head's input ``x`` by weighted least squares.

    Every row gives ``x`` alone; rows are weighted by the inverse of their variance: even
    noise (a defence) plus rounding in proportion to the row.

    Returns
    -------
    x, deviation : Tensor, shape (N, features)
    noise : Tensor, shape (N,)
    """

    def solve(weight: Tensor) -> tuple[Tensor, Tensor]:
        total = (weight * g.square()).sum(1, keepdim=True).clamp_min(1e-300)
        x = torch.einsum("nc,ncf->nf", weight * g, head) / total
        return x, head - torch.einsum("nc,nf->ncf", g, x)

    size = head.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-300)[:, :, 0]
    x, rest = solve(torch.ones_like(g))
    rows = rest.square().mean(2).sqrt()
    used = head.abs().amax(2) > 0
    even = torch.where(used, rows, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num(0.0)
    rounding = _ROUNDING / 4 * g.abs() * x.square().mean(1, keepdim=True).sqrt()
    variance = even.square() + rounding.square()
    floor = variance.amax(1, keepdim=True) * 1e-12 + 1e-300
    weight = 1.0 / (variance + floor)
    weight = weight / weight.amax(1, keepdim=True)
    x, rest = solve(weight)
    freedom = max(1, (head.shape[1] - 1) * head.shape[2])
    noise = (rest.square().sum((1, 2)) / freedom).sqrt() / size[:, 0]
    spread = (weight.square() * g.square() * variance).sum(1, keepdim=True).sqrt()
    total = (weight * g.square()).sum(1, keepdim=True).clamp_min(1e-300)
    return x, (spread / total).expand_as(x), noise


def _self_consistent(
    evidence: Evidence, g: Tensor, value: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the head's ``dL/dlogits`` made from its input where that is more precise.

    A softmax cross-entropy has ``g = softmax(W x + b) - y``. The input ``x`` averages over
    all rows of the head's gradient, so under noise this ``g`` is better than the observed
    one. It is not taken where it contradicts the observed one: the loss may be another.

    Returns
    -------
    g : Tensor, shape (N, classes)
    noise : Tensor, shape (N,)
        At least the difference of the two: a pruned head can look noiseless.
    """
    logits = evidence.chain.head.forward(value)
    made = logits.softmax(1) - torch.nn.functional.one_hot(evidence.labels[:, 0], g.shape[1])
    size = g.norm(dim=1).clamp_min(1e-300)
    miss = (made - g).norm(dim=1) / size
    # The client's float32 softmax rounds p - y: of a confident model's small g, a large part.
    rounding = 5e-7 * (1 + logits.abs().amax(1)) / size
    miss = torch.where(miss < rounding, torch.zeros_like(miss), miss)
    use = (noise.maximum(miss) > CLEAN) & (miss < (5 * noise).clamp(0.5, 1.0))
    return torch.where(use.unsqueeze(1), made, g), noise.maximum(miss)


def row_deviations(
    z: Tensor, deviation: Tensor, gradient: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the standard deviations of a system's weight rows and gradient rows.

    Parameters
    ----------
    z, deviation : Tensor, shape (N, *out_shape)
        The layer's output and the standard deviation carried over from above, to which
        the rounding of the client's own forward pass is added.
    gradient : Tensor, shape (N, *weight_shape)
    noise : Tensor, shape (N,)
    """
    rounding = _ROUNDING * torch.hypot(0.5 * _rms(z), z)
    of_z = torch.hypot(deviation, rounding)
    of_gradient = _spread(noise.clamp_min(3 * _ROUNDING), gradient) * _rms(gradient)
    return of_z, of_gradient


def solve_layer(
    layer: Affine,
    z: Tensor,
    e: Tensor,
    gradient: Tensor,
    deviations: tuple[Tensor, Tensor],
    start: Tensor,
) -> tuple[Tensor, Tensor]:
    """Solve one layer's system; return the solution nearest ``start`` and its residual."""
    of_z, of_gradient = deviations
    least = of_z.flatten(1).amin(1)
    a, k = _spread(least, of_z) / of_z, _spread(least, of_gradient) / of_gradient
    target = layer.target(z, gradient)

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = layer.apply(x, e)
        return rows.weight * a, rows.gradient * k

    def adjoint(rows: tuple[Tensor, ...]) -> Tensor:
        return layer.adjoint(Rows(rows[0] * a, rows[1] * k), e)

    return cgls(apply, adjoint, (target.weight * a, target.gradient * k), start)


@ATTACKS.register("linear")
@dataclass(frozen=True)
class LinearAttack:
    """R-GAP's recursion: least squares in every layer, exact where the ranks allow.

    Parameters
    ----------
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    """

    device: str = "auto"

    def __call__(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        evidence = Evidence.gather(observations, self.device)
        solution = solve_recursively(evidence)
        return package(evidence, solution.image, solution, ["linear"] * len(evidence))


def package(
    evidence: Evidence, images: Tensor, solution: LinearSolution, by: Sequence[str]
) -> list[Reconstruction]:
    """Return one :class:`Reconstruction` for each update, made ``by`` that method."""
    fit = evidence.fit(images)
    out = []
    for n in range(len(evidence)):
        layers = [
            {
                "name": s.name,
                "unknowns": s.unknowns,
                "rank": s.rank,
                "residual": float(s.residual[n]),
            }
            for s in solution.layers
        ]
        details = {"by": by[n], "noise": float(solution.noise[n]), "layers": layers}
        out.append(
            Reconstruction(
                images[n : n + 1].cpu(), evidence.labels[n].cpu(), float(fit[n]), details
            )
        )
    return out
