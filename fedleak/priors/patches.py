"""A mixture of Gaussians over small patches: edges, textures and level areas differ.

Made normal again around each estimate of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak.priors.base import PRIORS, Prior, demand_public
from fedleak.priors.gaussian import GaussianPrior, LearnedGaussianPrior
from fedleak.priors.synthetic import dead_leaves
from fedleak.solvers.gaussian import Gaussian, cholesky

#: Patches that a mixture is fitted to, and rounds of expectation-maximisation.
_SAMPLES, _ROUNDS = 40_000, 10
#: Observations that the pooled covariance is worth in each component, and the variance
#: under which no component falls (a step of 8-bit pixels has 1e-6).
_POOLED, _FLOOR = 10.0, 1e-5


class PatchMixture:
    """A mixture of Gaussians over patches (Zoran & Weiss 2011), fitted here.

    Parameters
    ----------
    images : Tensor, shape (M, C, H, W)
    size : int
        Side of a patch in pixels.
    components : int
    seed : int

    Attributes
    ----------
    weights, means, covariances : Tensor
        Shapes (K,), (K, d) and (K, d, d) with ``d = C size^2``.
    """

    def __init__(self, images: Tensor, size: int = 6, components: int = 64, seed: int = 0):
        self.weights: Tensor
        self.means: Tensor
        self.covariances: Tensor
        self.size = min(size, *images.shape[2:])
        generator = torch.Generator().manual_seed(seed)
        x = _sample(images.float().cpu(), self.size, generator)
        components = max(1, min(components, len(x) // 200))
        anchors = x[torch.randperm(len(x), generator=generator)[:components]]
        chosen = torch.cdist(x, anchors).argmin(1)
        for _ in range(_ROUNDS):
            self._maximise(x, chosen, components)
            chosen = self._scores(x).argmax(1)
        # In float64: inverses would tell how a float32 product was spread over threads.
        self._maximise(x.double(), chosen, components)
        self.precisions = torch.linalg.inv(self.covariances)
        self.log_dets = torch.linalg.slogdet(self.covariances)[1]

    def _maximise(self, x: Tensor, chosen: Tensor, components: int) -> None:
        """Fit every component to the patches that chose it."""
        counts = torch.bincount(chosen, minlength=components).to(x)
        self.weights = (counts + 1) / (counts + 1).sum()
        sums = x.new_zeros(components, x.shape[1]).index_add_(0, chosen, x)
        self.means = (sums + x.mean(0)) / (counts + 1).unsqueeze(1)
        pooled = torch.cov(x.T) * 0.02
        covariances = []
        for k in range(components):
            rest = x[chosen == k] - self.means[k]
            covariances.append((rest.T @ rest + _POOLED * pooled) / (counts[k] + _POOLED))
        self.covariances = torch.stack(covariances) + _FLOOR * torch.eye(x.shape[1]).to(x)

    def _scores(self, x: Tensor) -> Tensor:
        """Return the log probability of each component, shape (len(x), K)."""
        factors = cholesky(self.covariances)
        log_dets = 2 * factors.diagonal(dim1=1, dim2=2).log().sum(1)
        whitening = torch.linalg.solve_triangular(
            factors, torch.eye(x.shape[1]).expand_as(factors), upper=False
        )
        squares = torch.stack(
            [((x - m) @ w.T).square().sum(1) for m, w in zip(self.means, whitening, strict=True)], 1
        )
        return self.weights.log() - 0.5 * (log_dets + squares)

    def to(self, device: torch.device | str) -> PatchMixture:
        """Move the mixture to ``device``, in place, and return it."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def responsibilities(self, patches: Tensor, covariances: Tensor) -> Tensor:
        """Return the probability of each component for patches that are known in part.

        Parameters
        ----------
        patches : Tensor, shape (L, d)
        covariances : Tensor, shape (L, d, d)
            Of each patch's error: the expected log likelihood has ``tr(P V)`` in it
            (variational EM), so that what is uncertain decides nothing.
        """
        rest = patches.unsqueeze(0) - self.means.unsqueeze(1)
        squares = ((rest @ self.precisions) * rest).sum(2).T
        squares = squares + covariances.flatten(1) @ self.precisions.flatten(1).T
        return (self.weights.log() - 0.5 * (self.log_dets + squares)).softmax(1)


def _sample(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return random patches, shape (L, C size^2)."""
    each = max(1, math.ceil(_SAMPLES / len(images)))
    found = []
    for part in images.split(100):
        patches = F.unfold(part, size).mT
        for of_image in patches:
            picks = torch.randint(len(of_image), (min(each, len(of_image)),), generator=generator)
            found.append(of_image[picks])
    return torch.cat(found)[:_SAMPLES]


class PatchPrior(Prior):
    """A normal distribution first, then one fitted to what every patch turned out to be.

    Parameters
    ----------
    base : Prior
        What is expected before anything is known.
    mixture : PatchMixture
    """

    def __init__(self, base: Prior, mixture: PatchMixture):
        self.base, self.mixture = base, mixture
        self.shape, self.mean, self.latent_shape = base.shape, base.mean, base.latent_shape
        ordinal = torch.arange(math.prod(self.shape), dtype=torch.float64, device=self.mean.device)
        #: Which pixel each entry of each patch is, shape (L, d).
        self.index = F.unfold(ordinal.reshape(1, *self.shape), mixture.size)[0].T.long()

    def root(self, u: Tensor) -> Tensor:
        return self.base.root(u)

    def root_adjoint(self, x: Tensor) -> Tensor:
        return self.base.root_adjoint(x)

    def dense(self) -> Gaussian:
        return self.base.dense()

    def __repr__(self) -> str:
        return f"patches on {self.base!r}"

    def family(self, stage: int = 0) -> Sequence[Prior]:
        found = self.base.family(stage)
        return [self] if len(found) == 1 else [PatchPrior(b, self.mixture) for b in found]

    def local(self, image: Tensor, covariance: Tensor) -> Gaussian:
        """Return the product of the experts that the patches of ``image`` call for.

        Parameters
        ----------
        image : Tensor, shape (n,)
        covariance : Tensor, shape (n, n)

        Returns
        -------
        Gaussian
            Its precision is the mean over overlapping patches of their components'
            precisions (Zoran & Weiss 2011, with expected rather than sharp choices).
        """
        index, n = self.index, len(image)
        errors = covariance[index[:, :, None], index[:, None, :]]
        share = self.mixture.responsibilities(image[index], errors)
        pull = torch.einsum("kij,kj->ki", self.mixture.precisions, self.mixture.means)
        precisions = (share @ self.mixture.precisions.flatten(1)).flatten()
        flat = (index[:, :, None] * n + index[:, None, :]).flatten()
        precision = image.new_zeros(n * n).index_add_(0, flat, precisions).reshape(n, n)
        target = image.new_zeros(n).index_add_(0, index.flatten(), (share @ pull).flatten())
        # Each pixel is in size^2 patches, which say the same thing: they count as one.
        scale = self.mixture.size**2
        spread = torch.cholesky_inverse(cholesky(precision / scale))
        return Gaussian(spread @ (target / scale), spread)


@PRIORS.register("patches")
def _patches(
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    public: Tensor | None = None,
) -> Prior:
    """Patches follow a Gaussian mixture, learned from synthetic images (dead leaves)."""
    mixture = PatchMixture(dead_leaves(shape))
    return PatchPrior(GaussianPrior(shape, device=device), mixture.to(device))


@PRIORS.register("patches:learned")
def _learned(
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    public: Tensor | None = None,
) -> Prior:
    """Patches follow a Gaussian mixture, learned from public images."""
    images = demand_public("patches:learned", shape, public)
    base = LearnedGaussianPrior(shape, images, device)
    return PatchPrior(base, PatchMixture(images).to(device))
