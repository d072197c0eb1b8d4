"""A batch whose first layer is the open one: its images have their own rows and share some."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedleak.attacks.evidence import Evidence
from fedleak.attacks.linear import LinearSolution, row_deviations
from fedleak.attacks.prior_matching import Match, posterior
from fedleak.attacks.targets.base import Target
from fedleak.priors import Prior
from fedleak.priors.gaussian import DENSE_PRIOR
from fedleak.systems import Affine, Rows


class OwnRows(Target):
    """What the first layer's output tells of each image alone: ``A x_b = z_b - c``."""

    linear = True

    def __init__(self, layer: Affine, outputs: Tensor, deviations: Tensor):
        self.layer, self.outputs, self.deviations = layer, outputs, deviations
        self._known([outputs.unsqueeze(1)], [deviations.unsqueeze(1)])

    def made(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = images[:, 0].reshape(-1, *self.layer.in_shape)
        return self._joined([self.layer.forward(x).unsqueeze(1)])

    def subset(self, index: Tensor) -> OwnRows:
        return OwnRows(self.layer, self.outputs[index], self.deviations[index])


def covers(evidence: Evidence, prior: Prior, depth: int) -> bool:
    """Return whether :func:`match_batch` is for this."""
    lead = evidence.chain.lead
    small = math.prod(prior.shape) <= DENSE_PRIOR
    layers = evidence.chain.layers
    one_layer = depth == lead + 1 and layers[lead].ranked
    one_layer = one_layer and all(layer.reshapes for layer in layers[:lead])
    return evidence.num_images > 1 and one_layer and prior.gaussian and small


def match_batch(
    evidence: Evidence, solution: LinearSolution, prior: Prior, precision: float
) -> Match:
    """Find the most probable images of batches: all is linear and normal, so in closed form.

    Each image is first conditioned on its own rows, under the prior that its evidence chooses;
    the shared rows ``sum_b K(e_b) x_b = dL/dW`` then move all images of a batch together.

    Returns
    -------
    Match
        Images of shape (N, B, C, H, W).
    """
    depth = evidence.chain.lead + 1
    layer = evidence.chain.layers[depth - 1]
    assert isinstance(layer, Affine)
    outputs, e = solution.values[depth], solution.cotangents[depth]
    gradient = evidence.gradient[layer.weight_name]
    noise, deviations = solution.noise_below(depth), solution.deviations[depth]
    _, of_gradient = row_deviations(outputs, deviations, gradient, noise)
    images, names = [], []
    for n in range(len(evidence)):
        rows = slice(n * evidence.num_images, (n + 1) * evidence.num_images)
        target = OwnRows(layer, outputs[rows], deviations[rows])
        size = gradient[n].square().mean().sqrt()
        deviation = (
            of_gradient[n].expand_as(gradient[n]).flatten().clamp_min(precision * float(size))
        )
        x, chosen = _condition(target, e[rows], gradient[n].flatten(), deviation, prior, precision)
        images.append(x.reshape(-1, *prior.shape))
        names.append(", ".join(sorted(set(chosen))))
    return Match(torch.stack(images), "closed form", names)


def _condition(
    target: OwnRows, e: Tensor, shared: Tensor, deviation: Tensor, prior: Prior, precision: float
) -> tuple[Tensor, list[str]]:
    """Return the posterior mean of one batch, shape (B, n), and the priors of its images."""
    layer, means, gains, names = target.layer, [], [], []
    total, rest = deviation.square().diag(), shared.clone()
    unit = torch.eye(len(shared)).to(e).reshape(-1, *layer.weight_shape)
    nothing = e.new_zeros(len(shared), *layer.out_shape)
    for b in range(len(e)):
        alone = target.subset(torch.tensor([b], device=e.device))
        start = prior.mean.expand(1, 1, *prior.shape).to(e)
        solver, measured, chosen = posterior(alone, prior, start, precision)
        rows = layer.adjoint(Rows(nothing, unit), e[b].expand_as(nothing)).flatten(1)  # K(e_b)
        gain = rows @ measured.covariance()[0]
        total += gain @ rows.mT
        rest -= rows @ solver.x[0]
        means.append(solver.x[0])
        gains.append(gain)
        names.append(str(chosen[0]))
    weights = torch.linalg.solve(total, rest)
    return torch.stack([x + weights @ g for x, g in zip(means, gains, strict=True)]), names
