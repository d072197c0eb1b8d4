"""The hybrid method as published: linear systems and gradient matching in turn."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak import events
from fedleak.attacks.base import ATTACKS, Attack, Reconstruction
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.linear import package, solve_recursively
from fedleak.attacks.published.objectives import total_variation
from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.observation import Observation
from fedleak.systems import Affine, Chain, Layer


@dataclass(frozen=True)
class Schedule:
    """How one layer's solution is corrected: Adam steps, and the weights of the terms."""

    steps: int
    cosine: float
    variation: float
    system: float


#: For the image, the second layer's input, and every deeper one. The steps are the paper's,
#: the weights are those that its authors' code runs with.
SCHEDULES = (
    Schedule(10_000, 1.0, 1.0, 0.05),
    Schedule(8_000, 1.0, 1.0, 0.1),
    Schedule(1_000, 10.0, 0.1, 1.0),
)
_LEARNING_RATE = 1e-3


@ATTACKS.register("hybrid-paper")
@dataclass(frozen=True)
class PaperHybridAttack(Attack):
    """Chen & Campbell's hybrid method (BMVC 2022), with their hyperparameters.

    From the head down, each layer's linear system ``U_i x_i = v_i`` is solved, and its
    solution corrected by Adam on ``alpha * sum (1 - cos) + beta * TV + gamma *
    ||U_i x_i - v_i||^2``: the cosines of every parameter's gradient in the sub-network from
    this layer up, the anisotropic total variation of ``x_i``, and the system. The next layer
    builds on the corrected ``x_i``. As published, the last iterate counts, pixels are not
    clamped while it runs, and solvable layers are "corrected" too, which costs them most of
    their precision: it is the attack to compare with, ``hybrid`` is the one to use.

    It differs from the published code where that errs: a convolution's bias is subtracted,
    the target is the observed gradient, the head is inverted by least squares over all its
    rows, and the systems are solved in float64 without a matrix, nearest to mid grey.

    Parameters
    ----------
    steps_fraction : float
        Fraction of the published steps to run, in (0, 1].
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    """

    steps_fraction: float = 1.0
    device: str = "auto"

    def __post_init__(self) -> None:
        fraction = self.steps_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
            raise InvalidInputError(f"steps_fraction must be a number, not {fraction!r}")
        if not 0 < fraction <= 1:
            raise InvalidInputError(f"steps_fraction must lie in (0, 1], not {fraction!r}")

    def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        evidence = Evidence.gather(observations, self.device)
        if evidence.num_images > 1:
            raise UnsupportedModelError(
                f"the update mixes {evidence.num_images} images; the published hybrid is for one"
            )
        correction = _Correction(evidence, self.steps_fraction, torch.zeros(len(evidence)))
        solution = solve_recursively(evidence, correct=correction)
        results = package(evidence, solution.image, solution, ["hybrid-paper"] * len(evidence))
        for n, result in enumerate(results):
            result.details["loss"] = float(correction.loss[n])
            result.details["steps"] = sum(correction.steps)
        return results


@dataclass
class _Correction:
    """Corrects the solution of one layer after the other, of all updates at once.

    Attributes
    ----------
    loss : Tensor, shape (N,)
        Objective of the layer that was corrected last, at its end; 0 before the first.
    steps : list of int
        Adam steps of each layer so far.
    """

    evidence: Evidence
    fraction: float
    loss: Tensor
    steps: list[int] = field(default_factory=list)

    def __call__(self, i: int, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        chain = self.evidence.chain
        if not isinstance(chain.layers[i], Affine):  # a pool: the paper has none
            return x
        below = sum(isinstance(layer, Affine) for layer in chain.layers[:i])
        schedule = SCHEDULES[min(below, len(SCHEDULES) - 1)]
        objective = _Objective(self.evidence, i, schedule, z, e)
        steps = max(1, round(schedule.steps * self.fraction))
        # float32, as published: half the time, and 1e-7 is nothing to steps of 1e-3.
        value = x.float().requires_grad_()
        optimiser = torch.optim.Adam([value], lr=_LEARNING_RATE)
        for _ in events.steps(steps, f"matching the input of layer {i}"):
            (value.grad,) = torch.autograd.grad(objective(value).sum(), value)
            optimiser.step()
        with torch.no_grad():
            self.loss = objective(value)
        self.steps.append(steps)
        return value.detach().double()


class _Objective:
    """The published objective of the input of layer ``i``, in float32."""

    def __init__(self, evidence: Evidence, i: int, schedule: Schedule, z: Tensor, e: Tensor):
        self.schedule = schedule
        self.network = Chain(
            [_single(layer) for layer in evidence.chain.layers[i:]], _single(evidence.chain.head)
        )
        layer = self.network.layers[0]
        assert isinstance(layer, Affine)
        self.layer, self.e = layer, e.float()
        self.labels = evidence.labels[:, 0]
        self.gradient = {k: g.flatten(1).float() for k, g in evidence.gradient.items()}
        self.target = layer.target(z.float(), self.gradient[layer.weight_name])

    def __call__(self, x: Tensor) -> Tensor:
        """Return the objective of each update, shape (N,)."""
        made = self.network.trace(x, self.labels).gradients
        cosines = [
            F.cosine_similarity(g.flatten(1), self.gradient[k], dim=1, eps=1e-10)
            for k, g in made.items()
        ]
        rows = self.layer.apply(x, self.e)
        misses = (rows.weight - self.target.weight, rows.gradient.flatten(1) - self.target.gradient)
        system = torch.stack([m.flatten(1).square().sum(1) for m in misses]).sum(0)
        s = self.schedule
        matching = s.cosine * (1 - torch.stack(cosines)).sum(0)
        return matching + s.variation * total_variation(x) + s.system * system


def _single(layer: Any) -> Any:
    """Return a copy of ``layer`` whose tensors are float32."""
    out: Layer = copy.copy(layer)
    for key, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(out, key, value.float())
    return out
