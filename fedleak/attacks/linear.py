"""Layer by layer, from the head to the image, by linear systems (R-GAP done right)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.attacks.base import ATTACKS, Attack, Reconstruction
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.heads import CLEAN, ROUNDING, HeadSolution, solve_head
from fedleak.attacks.solution import LayerSolution, LinearSolution, pick, rms, spread
from fedleak.metric.rank import layer_ranks
from fedleak.observation import Observation
from fedleak.solvers import cgls
from fedleak.systems import Affine, Pointwise, Rows, System
from fedleak.systems.pooling import AvgPool, MaxPool

__all__ = [
    "CLEAN",
    "LayerSolution",
    "LinearAttack",
    "LinearSolution",
    "package",
    "row_deviations",
    "solve_layer",
    "solve_recursively",
]

#: ``(i, x, z, e) -> x``: replaces the solution of layer ``i`` for the layers below it.
Correction = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def solve_recursively(
    evidence: Evidence,
    mid_grey: float = 0.5,
    correct: Correction | None = None,
    heads: list[HeadSolution] | None = None,
) -> LinearSolution:
    """Solve every layer's linear system, from the head to the image.

    Chen & Campbell 2022, section 3, and R-GAP (Zhu & Blaschko 2021), with the
    convolution's bias, inverses of the activations as far as they have one, and no matrix.

    Parameters
    ----------
    evidence : Evidence
        Where the head alone leaves the label open (two classes, no bias), ``labels`` is set
        to what the layers below agree with.
    mid_grey : float
        Where the image is undetermined, the solution nearest to this grey is taken; in the
        layers above, the one nearest to what a grey image gives there.
    correct : callable, optional
        Is given each layer's solution, and returns what the layers below build on.
    heads : list of HeadSolution, optional
        What the head says, where that is known already.

    Raises
    ------
    UnsupportedModelError
        If the images of a batch cannot be told apart.
    """
    heads = heads or solve_head(evidence)
    found = [_descend(evidence, head, mid_grey, correct) for head in heads]
    if len(found) == 1:
        evidence.labels = heads[0].labels
        return found[0]
    misfit = []
    for head, solution in zip(heads, found, strict=True):
        outside = (solution.image - solution.image.clamp(0, 1)).flatten(1)  # one image each
        fit = evidence.with_labels(head.labels).fit(solution.image)
        # A network without any bias is odd: only the range of pixels tells x from -x.
        misfit.append(fit + 1e-3 * outside.square().mean(1).sqrt())
    best = torch.stack(misfit).nan_to_num(torch.inf).argmin(0)
    evidence.labels = pick([head.labels for head in heads], best)
    return LinearSolution.pick(found, best)


def _descend(
    evidence: Evidence, head: HeadSolution, mid_grey: float, correct: Correction | None
) -> LinearSolution:
    """Go from the head's input down to the image."""
    layers = evidence.chain.layers
    value, deviation = head.value, head.deviation
    cotangent = evidence.chain.head.backward(value, value, head.g)
    out = LinearSolution([value], [cotangent], [deviation], head.noise, [], evidence.images)
    out.demixed = head.demixed
    grey = evidence.chain.features(torch.full((1, *evidence.chain.input_shape), mid_grey).to(value))
    for i in reversed(range(len(layers))):
        layer = layers[i]
        if isinstance(layer, Pointwise):
            x, deviation = layer.undo(value, deviation)
            cotangent = layer.backward(x, value, cotangent)
        else:
            if isinstance(layer, MaxPool):
                x, below = layer.estimate(value, cotangent)
                rank = torch.full((len(x),), layer.rank)
                rank = rank[: len(evidence)] * evidence.images
                step = LayerSolution(
                    layer.name,
                    layer.unknowns * evidence.images,
                    rank,
                    False,
                    torch.zeros_like(head.noise),
                )
            else:
                assert isinstance(layer, System)
                start = grey[i].expand(len(value), *layer.in_shape)
                x, step = _solve_step(evidence, layer, out, start)
                if correct is not None:
                    x = correct(i, x, value, cotangent)
                below = layer.backward(x, value, cotangent)
            out.layers.insert(0, step)
            cotangent, deviation = below, _below(out, x)
        value = x
        out.values.insert(0, value)
        out.cotangents.insert(0, cotangent)
        out.deviations.insert(0, deviation)
    return out


def _solve_step(
    evidence: Evidence, layer: System, above: LinearSolution, start: Tensor
) -> tuple[Tensor, LayerSolution]:
    """Solve one layer's system, given everything above it."""
    z, e, deviation = above.values[0], above.cotangents[0], above.deviations[0]
    batch = evidence.images
    if isinstance(layer, Affine):
        gradient, errors = evidence.gradient[layer.weight_name], None
        if evidence.defended:
            errors = evidence.errors[layer.weight_name]
        # Of what is withheld no row is left: as of an error of zero.
        told = True if errors is None else errors.isfinite().any()
        rank, exact = layer_ranks(layer, e if told else 0 * e, deviation.isfinite(), batch)
    else:
        assert isinstance(layer, AvgPool)
        gradient, errors = z.new_zeros(len(evidence), 0), None
        known = deviation.isfinite().flatten(1).sum(1).cpu()
        exact = bool((known == z[0].numel()).all())
        rank = known.clamp(max=layer.rank).reshape(-1, batch).sum(1)
    deviations = row_deviations(z, deviation, gradient, above.noise_below(0), errors)
    x, residual = solve_layer(layer, z, e, gradient, deviations, start)
    return x, LayerSolution(layer.name, layer.unknowns * batch, rank, exact, residual)


def _below(above: LinearSolution, x: Tensor) -> Tensor:
    """Return the standard deviation of a layer's input, as large a part of it as above."""
    part = above.noise
    if above.batch > 1:  # images of one batch are known very differently well
        part = above.relative(0).maximum(part.repeat_interleave(above.batch))
    return (spread(part, x) * rms(x)).expand_as(x)


def row_deviations(
    z: Tensor,
    deviation: Tensor,
    gradient: Tensor,
    noise: Tensor,
    errors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the standard deviations of a system's weight rows and gradient rows.

    Parameters
    ----------
    z, deviation : Tensor, shape (N * B, *out_shape)
        The layer's output and the standard deviation carried over from above, infinite
        where nothing is known; the rounding of the client's own forward pass is added.
    gradient : Tensor, shape (N, *weight_shape), or (N, 0) of a layer without parameters
        Shared by the B images of an update.
    noise : Tensor, shape (N,)
    errors : Tensor, shape (N, *weight_shape), optional
        Those of the gradient's entries, where a known defence tells them.
    """
    rounding = ROUNDING * torch.hypot(0.5 * rms(z), z)
    of_z = torch.hypot(deviation, rounding)
    if errors is not None:
        return of_z, torch.hypot(errors, 3 * ROUNDING * rms(gradient))
    of_gradient = spread(noise.clamp_min(3 * ROUNDING), gradient) * rms(gradient)
    return of_z, of_gradient


def solve_layer(
    layer: System,
    z: Tensor,
    e: Tensor,
    gradient: Tensor,
    deviations: tuple[Tensor, Tensor],
    start: Tensor,
) -> tuple[Tensor, Tensor]:
    """Solve one layer's system; return the solution nearest ``start`` and its residual.

    The B images of an update have weight rows of their own, and share the gradient rows:
    ``sum_b K(e_b) x_b = G``.

    Parameters
    ----------
    layer : System
    z, e : Tensor, shape (N * B, *out_shape)
    gradient : Tensor, shape (N, *weight_shape)
    deviations : tuple of Tensor
        From :func:`row_deviations`.
    start : Tensor, shape (N * B, *in_shape)

    Returns
    -------
    x : Tensor, shape (N * B, *in_shape)
    residual : Tensor, shape (N,)
    """
    of_z, of_gradient = deviations
    shape = (len(gradient), len(z) // len(gradient))
    # Rows are weighted by the inverse of their deviation, the most exact weight row by 1;
    # a row of infinite deviation drops out.
    own = of_z.flatten(1).amin(1)
    own = torch.where(own.isinf(), 1.0, own)
    least = own.reshape(shape).amin(1)
    each = least.repeat_interleave(shape[1])
    a, k = spread(each, of_z) / of_z, spread(least, of_gradient) / of_gradient
    target = layer.target(z, gradient.masked_fill(of_gradient.isinf(), 0.0))
    # What is known less well of an image than of the others has small rows; its unknowns are
    # counted in larger units, so that the system stays as well conditioned as one image's.
    unit = (own / each).reshape(-1, *[1] * len(layer.in_shape))

    def apply(y: Tensor) -> tuple[Tensor, Tensor]:
        rows = layer.apply(y.flatten(0, 1) * unit, e)
        return (rows.weight * a).unflatten(0, shape), rows.gradient.unflatten(0, shape).sum(1) * k

    def adjoint(rows: tuple[Tensor, ...]) -> Tensor:
        each = (rows[1] * k).repeat_interleave(shape[1], 0)
        back = layer.adjoint(Rows((rows[0].flatten(0, 1)) * a, each), e)
        return (back * unit).unflatten(0, shape)

    rhs = ((target.weight * a).unflatten(0, shape), target.gradient * k)
    y, residual = cgls(apply, adjoint, rhs, (start / unit).unflatten(0, shape))
    return y.flatten(0, 1) * unit, residual


@ATTACKS.register("linear")
@dataclass(frozen=True)
class LinearAttack(Attack):
    """R-GAP's recursion: least squares in every layer, exact where the ranks allow.

    Parameters
    ----------
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    """

    device: str = "auto"

    def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        evidence = Evidence.gather(observations, self.device)
        solution = solve_recursively(evidence)
        return package(evidence, solution.image, solution, ["linear"] * len(evidence))


def package(
    evidence: Evidence, images: Tensor, solution: LinearSolution, by: Sequence[str]
) -> list[Reconstruction]:
    """Return one :class:`Reconstruction` for each update, made ``by`` that method."""
    fit = evidence.fit(images)
    each = (-1, evidence.images)
    # Inputs of activations that their outputs do not tell: saturated or inactive units.
    lost = [
        (layer, deviation.isinf().unflatten(0, each).flatten(1))
        for layer, deviation in zip(evidence.chain.layers, solution.deviations, strict=False)
        if isinstance(layer, Pointwise)
    ]
    out = []
    for n in range(len(evidence)):
        layers = [
            {
                "name": s.name,
                "unknowns": s.unknowns,
                "rank": int(s.rank[n]),
                "exact": s.exact,
                "residual": float(s.residual[n]),
            }
            for s in solution.layers
        ]
        details = {"by": by[n], "noise": float(solution.noise[n]), "layers": layers}
        if solution.demixed:
            made = evidence.chain.features(images[n])[-1]
            details["head"] = solution.demixed[n].report(made)
        details["lost"] = {
            layer.name: float(unknown[n].double().mean())
            for layer, unknown in lost
            if bool(unknown[n].any())
        }
        out.append(
            Reconstruction(images[n].cpu(), evidence.labels[n].cpu(), float(fit[n]), details)
        )
    return out
