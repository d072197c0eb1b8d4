"""Image priors by name: what images look like before anything is known of this one."""

from fedleak.priors.base import PRIORS, Prior, make_prior
from fedleak.priors.gaussian import GaussianPrior, LearnedGaussianPrior
from fedleak.priors.patches import PatchMixture, PatchPrior
from fedleak.priors.total_variation import TotalVariationPrior

__all__ = [
    "PRIORS",
    "GaussianPrior",
    "LearnedGaussianPrior",
    "PatchMixture",
    "PatchPrior",
    "Prior",
    "TotalVariationPrior",
    "make_prior",
]
