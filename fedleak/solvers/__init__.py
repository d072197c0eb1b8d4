"""Matrix-free solvers, batched over updates."""

from fedleak.solvers.lbfgs import lbfgs
from fedleak.solvers.least_squares import cgls

__all__ = ["cgls", "lbfgs"]
