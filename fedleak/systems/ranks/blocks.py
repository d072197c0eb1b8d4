"""What is asked of a rank, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from torch import Tensor


@dataclass(frozen=True)
class Effort:
    """What the rank of one group of a layer may cost, in multiplications.

    Attributes
    ----------
    sparse : float
        Of the Gram matrix of ``A``; a sparse product takes about 10 ns for each.
    dense : float
        Of one factorisation.
    joint : float
        Of the factorisation of both blocks together. The blocks' own ranks bound the joint
        one, and often decide it.
    both : bool
        Whether to rank either block where the other one decides.
    """

    sparse: float = np.inf
    dense: float = np.inf
    joint: float = np.inf
    both: bool = True


#: Proofs in a fraction of a second, and the closed form where there are none.
FAST = Effort(2e8, 2e9, 2e8, both=False)
#: Seconds for a layer.
AFFORDABLE = Effort(3e8, 6e10, 6e10)
#: Whatever it takes.
EXACT = Effort()


@dataclass(frozen=True)
class Ranks:
    """Ranks of the weight rows ``A`` alone, of the gradient rows ``K(e)`` alone, and of both.

    Attributes
    ----------
    weight, gradient, joint : int
    exact : bool
        Whether ``joint`` is the numerical rank. If not, it is the least upper bound found.
    """

    weight: int
    gradient: int
    joint: int
    exact: bool = True

    def __add__(self, other: Ranks) -> Ranks:
        return Ranks(
            self.weight + other.weight,
            self.gradient + other.gradient,
            self.joint + other.joint,
            self.exact and other.exact,
        )


def selection(known: Tensor) -> csr_matrix:
    """Return the rows of the identity that pick the ``known`` outputs."""
    mask = known.detach().flatten().cpu().numpy()
    picked = np.flatnonzero(mask)
    ones = np.ones(len(picked))
    return csr_matrix((ones, (np.arange(len(picked)), picked)), (len(picked), len(mask)))
