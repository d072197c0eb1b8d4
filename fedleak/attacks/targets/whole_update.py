"""A whole noisy update of one image as the target: its likelihood, nothing summarised first."""

from __future__ import annotations

import torch
from torch import Tensor

from fedleak.attacks.evidence import Evidence
from fedleak.attacks.linear import LinearSolution
from fedleak.attacks.targets.base import Target
from fedleak.precision import GRADIENT
from fedleak.tensors import rms

#: Of a row that the others contain, this part of its variance may be left by rounding.
_CONTAINED = 1e-6


class HeadRows:
    r"""What a fully connected head's gradient says near ``G = g x^T``, in few numbers.

    ``G`` changes by ``dg x^T + g dx^T``: to first order all that it says is in its products
    with ``x`` and with ``g``, weighted by the errors. That is ``F + C`` numbers in the place of
    ``F C``, made uncorrelated here. They are linear in ``G``, so they stay unbiased where ``g``
    and ``x`` are off, and lose little.

    Parameters
    ----------
    g : Tensor, shape (N, C)
    x : Tensor, shape (N, F)
    errors : Tensor, shape (N, C, F)
        Standard deviations of the entries of ``G``, infinite where they say nothing.
    """

    def __init__(self, g: Tensor, x: Tensor, errors: Tensor):
        self._weight = 1 / errors
        features, classes = (self._weight * v for v in (g.unsqueeze(2), x.unsqueeze(1)))
        sizes = features.norm(dim=1, keepdim=True), classes.norm(dim=2, keepdim=True)
        self._features, self._classes = (
            rows / torch.where(size > 0, size, torch.inf)
            for rows, size in zip((features, classes), sizes, strict=True)
        )
        # Both kinds of rows contain the entries of each other once.
        self._shared = self._features * self._classes
        told = (sizes[1][:, :, 0] > 0).to(x)
        left = torch.diag_embed(told) - self._shared @ self._shared.mT
        variance, basis = torch.linalg.eigh(left)
        own = variance > _CONTAINED
        self._whiten = basis.mT * torch.where(own, variance, torch.inf).rsqrt().unsqueeze(2)
        #: Errors of the rows, shapes (N, F) and (N, C).
        self.errors = 1 / sizes[0][:, 0], torch.where(own, 1.0, torch.inf).to(x)

    def __call__(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of a head's gradient, shape (N, C, F): ``x``, and what is left of ``g``.

        Shapes (N, F) and (N, C).
        """
        white = torch.where(self._weight > 0, gradient, 0.0) * self._weight
        features = (self._features * white).sum(1)
        classes = (self._classes * white).sum(2)
        rest = classes - (self._shared @ features.unsqueeze(2))[:, :, 0]
        known = self.errors[0]
        x = torch.where(known.isinf(), 0.0, features * known)
        return x, (self._whiten @ rest.unsqueeze(2))[:, :, 0]


class UpdateTarget(Target):
    """Every gradient of a chain, of one image, each with the error that a known defence tells."""

    calibrated = True

    def __init__(self, evidence: Evidence, solution: LinearSolution):
        self.evidence, self.solution = evidence, solution
        self.head = evidence.chain.head.weight_name
        self.names = [n for n in evidence.gradient if n != self.head]
        error = {n: self._error(n) for n in evidence.gradient}
        x = solution.values[-1]
        chain = evidence.chain
        g = chain.loss.alone(chain.head.forward(x), evidence.labels[:, 0])
        self.rows = HeadRows(g, x.flatten(1), error[self.head])
        self._known(
            [*self.rows(evidence.gradient[self.head]), *(evidence.gradient[n] for n in self.names)],
            [*self.rows.errors, *(error[n] for n in self.names)],
        )

    def _error(self, name: str) -> Tensor:
        """Return the errors of a gradient's entries, with the rounding of the client's own."""
        size = rms(self.evidence.gradient[name])
        return torch.hypot(self.evidence.errors[name], GRADIENT * size)

    def made(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        traced = self.evidence.chain.trace(images[:, 0], self.evidence.labels[:, 0])
        gradients = [traced.gradients[n] for n in self.names]
        return self._joined([*self.rows(traced.gradients[self.head]), *gradients])

    def subset(self, index: Tensor) -> UpdateTarget:
        return UpdateTarget(self.evidence.subset(index), self.solution.subset(index))
