"""A layer's system written out as matrices: for a first layer under a prior, tests and pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.systems.system import Affine


def dense_system(layer: Affine, e: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return ``(A, K(e))`` of each group as dense matrices over the group's own input.

    For kinds of layers whose patches are entries of the input; no system is solved by them.

    Parameters
    ----------
    layer : Affine
    e : Tensor, shape (*out_shape)

    Returns
    -------
    list of (Tensor, Tensor)
        Shapes (filters * positions, n) and (filters * fan_in, n), with ``n`` the inputs
        of one group.
    """
    weight = layer.weight
    groups, filters, fan_in = weight.shape
    n = layer.unknowns // groups
    # Which input each entry of each patch reads; 0 stands for padding.
    ordinal = torch.arange(1, n + 1, dtype=weight.dtype, device=weight.device)
    index = layer.patches(ordinal.repeat(groups).reshape(1, *layer.in_shape))[0].round().long()
    e = e.to(weight).reshape(groups, filters, -1)
    systems = []
    for g in range(groups):
        positions = index[g].shape[1]
        a = weight.new_zeros(filters, positions, n + 1)
        a.scatter_add_(
            2,
            index[g].T.expand(filters, -1, -1),
            weight[g].unsqueeze(1).expand(-1, positions, -1),
        )
        k = weight.new_zeros(filters, fan_in, n + 1)
        k.scatter_add_(
            2, index[g].expand(filters, -1, -1), e[g].unsqueeze(1).expand(-1, fan_in, -1)
        )
        systems.append((a.flatten(0, 1)[:, 1:], k.flatten(0, 1)[:, 1:]))
    return systems
