"""Whether an update tells all of the images that explain it, or others explain it as well."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak import precision
from fedleak.attacks.evidence import Evidence
from fedleak.modules import mathematical

#: Unknowns up to which the question is asked; as many backward passes answer it.
MOST = 256
#: Combinations of rows for each unknown, and how many are made in one backward pass.
_SKETCH, _TOGETHER = 1.25, 64
#: How far images may go along a direction, as a norm, before the update says so.
_FAR = 0.1


def undetermined(evidence: Evidence, images: Tensor, labels: Tensor, seed: int = 0) -> int | None:
    """Return how many directions of images their update does not tell, beyond its rounding.

    The Jacobian of the whole update at the images, in units of its rounding, is sketched: random
    combinations of its rows, some more than there are unknowns, have its rank.

    Parameters
    ----------
    evidence : Evidence
        Of one update.
    images : Tensor, shape (B, C, H, W)
    labels : Tensor, shape (1, B)
    seed : int
        Of the combinations.

    Returns
    -------
    int or None
        None where there are more than :data:`MOST` unknowns.
    """
    unknowns = images.numel()
    if unknowns > MOST:
        return None
    generator = torch.Generator().manual_seed(seed)
    x = images.detach().double().requires_grad_()
    with mathematical(), torch.enable_grad():
        made = evidence.replay(x[None], labels).gradients
        parts = []
        for name, g in made.items():
            rms = float(g.detach().square().mean().sqrt())
            error = evidence.rounding(name) + precision.GRADIENT * rms
            if error > 0:
                parts.append(g.flatten() / error)
        whole = torch.cat(parts)
        rows = []
        for part in torch.arange(int(_SKETCH * unknowns)).split(_TOGETHER):
            mixed = torch.randn(len(part), len(whole), generator=generator, dtype=whole.dtype)
            (made_rows,) = torch.autograd.grad(
                whole, x, mixed.to(whole.device), retain_graph=True, is_grads_batched=True
            )
            rows.append(made_rows.flatten(1))
    sketch = torch.cat(rows) / int(_SKETCH * unknowns) ** 0.5
    return int((torch.linalg.svdvals(sketch) * _FAR < 1).sum())
