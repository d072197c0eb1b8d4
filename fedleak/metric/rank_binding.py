"""What is known of a layer's outputs once the input of the next system is."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags, identity, kron
from torch import Tensor

from fedleak.systems import Affine, Chain, Layer, Pointwise
from fedleak.systems.pooling import AvgPool, MaxPool


def binding_rows(chain: Chain, inputs: list[Tensor], i: int) -> csr_matrix | None:
    """Return the equations that bind the outputs of layer ``i`` of a chain, for one image.

    The input of the next layer with parameters is known. To first order around the image,
    it depends on the outputs of layer ``i`` through the Jacobian ``B`` of the layers between:
    an inactive ReLU has a row of zeros, a maximum picks one pixel of its window, and a mean
    is one equation for all of its window. So the weight rows that bind are those of ``B A``;
    each involves the outputs of one filter.

    Parameters
    ----------
    chain : Chain
    inputs : list of Tensor, shape (1, *in_shape) each
        The input of every layer and, last, of the head.
    i : int

    Returns
    -------
    csr_matrix, shape (equations, outputs), or None
        None if each output is known.
    """
    rows: csr_matrix | None = None
    for j in range(i + 1, len(chain.layers)):
        layer = chain.layers[j]
        if isinstance(layer, Affine):
            break
        jacobian = _jacobian(layer, inputs[j], inputs[j + 1])
        rows = jacobian if rows is None else (jacobian @ rows).tocsr()
    if rows is None:
        return None
    rows = _distinct(rows)
    return None if rows.nnz == rows.shape[0] == rows.shape[1] else rows


def _jacobian(layer: Layer, x: Tensor, z: Tensor) -> csr_matrix:
    """Return ``dz / dx`` of a layer without parameters."""
    if isinstance(layer, Pointwise):
        lost = layer.lost(z)
        slope = layer.backward(x, z, torch.ones_like(z)).flatten()
        if lost is not None:
            slope = slope.masked_fill(lost.flatten(), 0)
        return diags(slope.cpu().numpy()).tocsr()
    if isinstance(layer, AvgPool):
        return _average(layer)
    assert isinstance(layer, MaxPool)
    return _maximum(layer, x)


def _average(layer: AvgPool) -> csr_matrix:
    pixels = layer.in_shape[1] * layer.in_shape[2]
    index = layer.windows.pixels(torch.device("cpu")).numpy()
    offset, position = (index < pixels).nonzero()
    share = 1 / layer.divisor.cpu().numpy()[position]
    shape = (index.shape[1], pixels)
    one = csr_matrix((share, (position, index[offset, position])), shape)
    return kron(identity(layer.in_shape[0]), one).tocsr()


def _maximum(layer: MaxPool, x: Tensor) -> csr_matrix:
    """Pick the largest pixel of each window; of equal ones the first, as torch does."""
    channels, pixels = layer.in_shape[0], layer.in_shape[1] * layer.in_shape[2]
    index = layer.windows.pixels(x.device)
    padded = torch.cat([x.reshape(channels, -1), x.new_full((channels, 1), -torch.inf)], 1)
    first = padded[:, index].argmax(1)
    picked = index.gather(0, first) + pixels * torch.arange(channels, device=x.device)[:, None]
    column = picked.flatten().cpu().numpy()
    shape = (len(column), channels * pixels)
    return csr_matrix((np.ones(len(column)), (np.arange(len(column)), column)), shape)


def _distinct(rows: csr_matrix) -> csr_matrix:
    """Return rows of unit length, without those of zeros; a pixel that is known, once."""
    rows.eliminate_zeros()
    rows = rows[np.diff(rows.indptr) > 0]
    length = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
    rows = (diags(1 / length) @ rows).tocsr()
    single = np.flatnonzero(np.diff(rows.indptr) == 1)
    _, first = np.unique(rows.indices[rows.indptr[single]], return_index=True)
    keep = np.diff(rows.indptr) > 1
    keep[single[first]] = True
    return rows[np.flatnonzero(keep)]
