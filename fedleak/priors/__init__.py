"""Image priors: what images look like before anything is known of this one."""

from fedleak.priors.gaussian import GaussianPrior

__all__ = ["GaussianPrior"]
