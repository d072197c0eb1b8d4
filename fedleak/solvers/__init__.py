"""Matrix-free and dense solvers, batched over updates."""

from fedleak.solvers.gauss_newton import GaussNewton, jacobian
from fedleak.solvers.gaussian import Gaussian, KroneckerGaussian, Measurements
from fedleak.solvers.lbfgs import lbfgs
from fedleak.solvers.least_squares import cgls

__all__ = [
    "GaussNewton",
    "Gaussian",
    "KroneckerGaussian",
    "Measurements",
    "cgls",
    "jacobian",
    "lbfgs",
]
