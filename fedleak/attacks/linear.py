"""Layer by layer, from the head to the image, by linear systems (R-GAP done right)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.attacks import packaging
from fedleak.attacks.base import ATTACKS, Attack, Reconstruction
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.head.account import account
from fedleak.attacks.head.single import CLEAN, HeadSolution, demix_heads, of_batches, solve_head
from fedleak.attacks.solution import LayerSolution, LinearSolution, pick
from fedleak.observation import Observation
from fedleak.priors import GaussianPrior, Prior
from fedleak.systems import Above
from fedleak.systems.system import row_deviations, solve_layer
from fedleak.tensors import per_update, rms

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

#: Images of which nothing is expected: pixels that are independent, and may be anything.
_FLAT = {"rho": 0.0, "colour": 0.0, "sigma": 100.0}
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
    out = LinearSolution([value], [cotangent], [deviation], head.noise, [], evidence.num_images)
    out.demixed = head.demixed
    grey = evidence.chain.features(torch.full((1, *evidence.chain.input_shape), mid_grey).to(value))
    for i in reversed(range(len(layers))):
        layer = layers[i]
        errors = evidence.errors if evidence.defended else {}
        noise, gradients = out.noise_below(0), evidence.gradient
        above = Above(value, cotangent, deviation, gradients, errors, noise, evidence.num_images)
        found = layer.descend(above, grey[i].expand(len(value), *layer.in_shape))
        x = found.value
        if found.equations is not None:
            step = found.equations
            unknowns = layer.unknowns * evidence.num_images
            out.layers.insert(
                0, LayerSolution(layer.name, unknowns, step.rank, step.exact, step.residual)
            )
            if correct is not None:
                x = correct(i, x, value, cotangent)
        cotangent = layer.pull_back(x, value, cotangent)
        deviation = _below(out, x) if found.deviation is None else found.deviation
        value = x
        out.values.insert(0, value)
        out.cotangents.insert(0, cotangent)
        out.deviations.insert(0, deviation)
    return out


def _below(above: LinearSolution, x: Tensor) -> Tensor:
    """Return the standard deviation of a layer's input, as large a part of it as above."""
    part = above.noise
    if above.batch > 1:  # images of one batch are known very differently well
        part = above.relative(0).maximum(part.repeat_interleave(above.batch))
    return (per_update(part, x) * rms(x)).expand_as(x)


@ATTACKS.register("linear")
@dataclass(frozen=True)
class LinearAttack(Attack):
    """R-GAP's recursion: least squares in every layer, exact where the ranks allow.

    Parameters
    ----------
    device : str
        ``auto`` (a card where there is one, but for one small image), ``cpu`` or ``cuda``.
    """

    device: str = "auto"

    def image_prior(self, shape: tuple[int, int, int], device: torch.device | str) -> Prior:
        """Return a prior that expects nothing of images: least squares."""
        return GaussianPrior(shape, adapt=False, device=device, **_FLAT)

    def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        evidence = Evidence.gather(observations, self.device, heavy=False)
        if evidence.num_images == 1:
            return self._solve(evidence, None)
        out = []
        for n, batch in enumerate(demix_heads(evidence)):
            part = evidence.subset(torch.tensor([n], device=evidence.replay.device))
            part, batch = account(part, batch)
            out += self._solve(part, [of_batches([batch], part)])
        return out

    @staticmethod
    def _solve(evidence: Evidence, heads: list[HeadSolution] | None) -> list[Reconstruction]:
        solution = solve_recursively(evidence, heads=heads)
        return package(evidence, solution.image, solution, ["linear"] * len(evidence))


def package(
    evidence: Evidence, images: Tensor, solution: LinearSolution, by: Sequence[str]
) -> list[Reconstruction]:
    """Return one :class:`Reconstruction` for each update, made ``by`` that method."""
    each = (-1, evidence.num_images)
    # Inputs of activations that their outputs do not tell: saturated or inactive units.
    lost = [
        (layer, deviation.isinf().unflatten(0, each).flatten(1))
        for layer, deviation in zip(evidence.chain.layers, solution.deviations, strict=False)
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
        out.append(details)
    return packaging.package(evidence, images, out)
