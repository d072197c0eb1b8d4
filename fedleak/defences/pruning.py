"""Magnitude pruning of the update (gradient compression)."""

from __future__ import annotations

import torch

from fedleak.defences.base import DEFENCES, Defence, Update


def magnitude_pruning(update: Update, strength: float, generator: torch.Generator) -> Update:
    """Set the smallest entries of every tensor to zero.

    Parameters
    ----------
    update : dict of str to Tensor
    strength : float
        Fraction of each tensor's entries that is set to zero, in [0, 1). At least one
        entry of each tensor stays.
    generator : torch.Generator
        Not used: pruning is deterministic.

    Notes
    -----
    Per tensor, as in Deep Gradient Compression (Lin et al. 2018) and the defence of Zhu
    et al. 2019.
    """
    pruned = {}
    for name, value in update.items():
        drop = min(int(strength * value.numel()), value.numel() - 1)
        if drop <= 0:
            pruned[name] = value
            continue
        order = value.abs().flatten().argsort(stable=True)
        keep = torch.ones(value.numel(), dtype=torch.bool, device=value.device)
        keep[order[:drop]] = False
        pruned[name] = value * keep.reshape(value.shape)
    return pruned


DEFENCES.register("prune")(
    Defence(magnitude_pruning, "fraction of each tensor's entries set to zero", maximum=1.0)
)
