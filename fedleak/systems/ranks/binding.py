"""What is known of a layer's outputs once the input of the next system is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, diags
from torch import Tensor

from fedleak.systems.base import Layer


def binding_rows(layers: Sequence[Layer], inputs: Sequence[Tensor], i: int) -> csr_matrix | None:
    """Return the equations that bind the outputs of layer ``i`` of a chain, for one image.

    The input of the next layer with parameters is known. To first order around the image,
    it depends on the outputs of layer ``i`` through the Jacobian ``B`` of the layers between:
    an inactive ReLU has a row of zeros, a maximum picks one pixel of its window, and a mean
    is one equation for all of its window. So the weight rows that bind are those of ``B A``;
    each involves the outputs of one filter.

    Parameters
    ----------
    layers : sequence of Layer
        Those of a chain.
    inputs : sequence of Tensor, shape (1, *in_shape) each
        The input of every layer and, last, of the head.
    i : int

    Returns
    -------
    csr_matrix, shape (equations, outputs), or None
        None if each output is known.
    """
    rows: csr_matrix | None = None
    for j in range(i + 1, len(layers)):
        layer = layers[j]
        if layer.ranked:
            break
        jacobian = layer.jacobian(inputs[j], inputs[j + 1])
        rows = jacobian if rows is None else (jacobian @ rows).tocsr()
    if rows is None:
        return None
    rows = _distinct(rows)
    return None if rows.nnz == rows.shape[0] == rows.shape[1] else rows


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
