"""The inversion influence function: how far an update's perturbation moves its inversion.

Zhang et al., "Understanding Deep Gradient Leakage via Inversion Influence Functions",
NeurIPS 2023 (arXiv 2309.13016), equation 7: an attacker who matches a perturbed gradient
ends at a distance from the image of at least ``||J d|| / lambda_max(J J^T)``, to first
order, with ``J`` the derivative of the gradient by image (theirs is the transpose of ours)
and ``d`` the perturbation. No prior enters: it compares defences of one model, and says
nothing of directions that the gradient does not tell.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp

from fedleak.client.replay import Gradients
from fedleak.metric.derivatives import affordable_steps, derivable
from fedleak.metric.posterior import decibels
from fedleak.metric.reference import Reference

#: Power iterations end where the eigenvalue grows by less than this part of it, or after so many
#: steps, or floating-point operations.
_TOLERANCE, _ITERATIONS, _WORK = 1e-4, 60, 2e11


@dataclass(frozen=True)
class Influence:
    """The lower bound of the inversion influence function.

    Attributes
    ----------
    rms : float
        Least distance of a reconstruction from the images, root mean square per pixel.
    psnr_db : float
        The same as a PSNR (peak 1) in dB: attacks that match the gradient alone stay below.
    eigenvalue : float
        Largest eigenvalue of ``J J^T``, by power iteration: from below.
    """

    rms: float
    psnr_db: float
    eigenvalue: float

    def to_dict(self) -> dict[str, float]:
        """Return plain types, for JSON."""
        return asdict(self)


def influence(reference: Reference, seed: int = 0) -> Influence:
    """Return the bound for what the defence, and rounding to float32, did to an update.

    Parameters
    ----------
    reference : Reference
        A batch, and what a client would send of it.
    seed : int
        Draws the first direction of the power iteration.

    Raises
    ------
    UnsupportedModelError
        If an operator of the model has no second derivative.
    """
    jacobian = reference.jacobian
    replay, images, labels = jacobian.replay, jacobian.images, jacobian.labels

    def gradient(x: Tensor) -> Gradients:
        def loss(parameters: Gradients) -> Tensor:
            return replay.loss.value(functional_call(replay.model, parameters, (x,)), labels)

        return grad(loss)(replay.parameters)

    def back(cotangents: Gradients) -> Tensor:
        def product(x: Tensor) -> Tensor:
            made = gradient(x)
            return torch.stack([(made[k] * c).sum() for k, c in cotangents.items()]).sum()

        return grad(product)(images)

    moved = {k: reference.sent[k].float().to(g) - g for k, g in jacobian.gradient.items()}
    with derivable():
        pulled = float(back(moved).norm())
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(images.shape, generator=generator, dtype=torch.float64).to(images)
        largest, v = 0.0, v / v.norm()
        for _ in range(affordable_steps(replay.model, images, _WORK, _ITERATIONS)):
            v = back(jvp(gradient, (images,), (v,))[1])
            before, largest = largest, float(v.norm())
            if largest <= (1 + _TOLERANCE) * before:
                break
            v = v / largest
    # Gradients that do not depend on the images leave everything open.
    rms = pulled / largest / math.sqrt(images.numel()) if largest > 0 else math.inf
    return Influence(rms, decibels(rms**2) if rms < math.inf else -math.inf, largest)
