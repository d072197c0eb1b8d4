"""What a client can see of tampering in the model that it receives, before it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: Share of rows that are another row, or all zero, from which it is a sign.
ALIKE = 0.1
SILENT = 0.5
#: Cosine from which rows are alike that are not the same to the last bit, and the least length of
#: rows that are compared so: short ones are alike by chance.
PARALLEL, _LONG = 0.999, 16
#: Logits or activations by which a bias alone decides.
LARGE_BIAS = 30.0
#: How far the rows of a fully connected layer lean to one side together, in standard errors.
#: Training moves them, too: by up to 10 on digits, where traps for batches of 64 come to 24 to
#: 40; traps for batches of 8 come to 3 to 16, and most are not seen.
LEANING = 20.0
#: Change of a layer's weight since the last round, relative to its size then. Biases start near
#: 0 and change by more.
JUMP = 0.9
#: Largest gradient of an image, relative to the root sum of squares of all others', of the tensor
#: where that is largest. Honest training passes 5 in 2 of 100 batches of 32 digits, once most are
#: learned, and 100 in none; below a head that fishes it is infinite.
DISPARITY = 100.0
#: PSNR in dB, predicted for one image of the own update, from which it shows the image: nobody can
#: tell what is recovered from the original.
LEAKAGE_DB = 40.0


@dataclass(frozen=True)
class Sign:
    """Something that honest training does not do.

    Attributes
    ----------
    kind : str
        ``equal rows``, ``equal columns``, ``silent rows``, ``large bias``, ``leaning rows``,
        ``jump``, ``disparity`` or ``leakage``.
    place : str
        Name of the tensor; of all together ``update``.
    value, limit : float
        What was measured, and from where on it is a sign.
    """

    kind: str
    place: str
    value: float
    limit: float

    def __str__(self) -> str:
        return f"{self.kind} in {self.place}: {self.value:.3g} (limit {self.limit:.3g})"


def signs_of_tampering(
    state: Mapping[str, Tensor], before: Mapping[str, Tensor] | None = None
) -> list[Sign]:
    """Look at a model for what tampering leaves behind.

    Parameters
    ----------
    state : mapping of str to Tensor
        As received.
    before : mapping of str to Tensor, optional
        As received in the round before.

    Returns
    -------
    list of Sign
        Empty where nothing is suspicious. A server that knows these signs can avoid them:
        none is no proof of honesty.
    """
    found = []
    for name, value in state.items():
        if not value.is_floating_point() or value.dim() == 0:
            continue
        value = value.detach().double()
        if value.dim() == 1:
            found += [Sign("large bias", name, float(value.abs().max()), LARGE_BIAS)] * (
                name.endswith("bias")
            )
        elif len(value) > 1:
            rows = value.flatten(1)
            found += [
                Sign("equal rows", name, _alike(rows), ALIKE),
                Sign("equal columns", name, _alike(rows.T) if len(rows.T) > 1 else 0.0, ALIKE),
                Sign("silent rows", name, float((~rows.any(1)).double().mean()), SILENT),
            ]
            if value.dim() == 2:
                found.append(Sign("leaning rows", name, _leaning(rows), LEANING))
            if before is not None and name in before and before[name].shape == value.shape:
                found.append(Sign("jump", name, _jump(value, before[name].detach().double()), JUMP))
    return [s for s in found if not s.value < s.limit]


def disparity(norms: Tensor) -> float:
    """Return how far one image's gradient stands out (D-SNR).

    Parameters
    ----------
    norms : Tensor, shape (B,) or (tensors, B)
        Norm of each image's gradient, of the whole or of each of the model's tensors.

    Returns
    -------
    float
        The largest norm over the root sum of squares of the others', in the tensor where that is
        largest; 0 for one image alone, infinite where all others send exactly nothing.

    Notes
    -----
    Garov et al. 2024, *Hiding in Plain Sight: Disguising Data Stealing Attacks in Federated
    Learning*, ICLR: the disaggregation signal-to-noise ratio, there the largest of all layers.
    """
    rows = norms.double().reshape(-1, norms.shape[-1])
    if rows.shape[1] < 2:
        return 0.0
    ordered = rows.sort(dim=1, descending=True).values
    largest, rest = ordered[:, 0], ordered[:, 1:].norm(dim=1)
    says = largest > 0
    return float((largest[says] / rest[says]).max()) if bool(says.any()) else 0.0


def _alike(rows: Tensor) -> float:
    """Return the share of rows that another one repeats, up to size and noise.

    Rows of zeros are not counted. Of short ones only the same to the last bit are.
    """
    rows = rows[rows.any(1)]
    if len(rows) < 2:
        return 0.0
    same = 1 - len(torch.unique(rows, dim=0)) / len(rows)
    if rows.shape[1] < _LONG:
        return same
    rows = rows / rows.norm(dim=1, keepdim=True)
    # What is alike is next to each other in any order that the rows' content makes.
    generator = torch.Generator().manual_seed(0)
    order = (rows @ torch.randn(rows.shape[1], generator=generator, dtype=rows.dtype)).argsort()
    ordered = rows[order]
    near = (ordered[1:] * ordered[:-1]).sum(1) > PARALLEL
    return max(same, float(near.double().sum()) / len(rows))


def _leaning(rows: Tensor) -> float:
    """Return how far the rows' means lean to one side together, in standard errors."""
    size = rows.square().mean(1).sqrt()
    lean = rows.mean(1) * math.sqrt(rows.shape[1]) / size.clamp_min(1e-300)
    return float(lean.mean().abs() * math.sqrt(len(rows)))


def _jump(now: Tensor, before: Tensor) -> float:
    return float((now - before).norm() / before.norm().clamp_min(1e-300))
