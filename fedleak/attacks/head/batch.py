"""Batches: the head's gradient is a mixture of its inputs, and softmax tells how to demix it.

For ``B`` images the head's gradient is ``G = E^T X``, with its inputs ``X`` and
``E = (softmax(X W^T + b) - Y) / B``. The row space of ``G`` gives ``X = M R`` but for a
``B x B`` matrix ``M``, and ``M`` must reproduce ``G`` and the bias gradient ``g`` through the
softmax: ``E(M)^T M = G R^T`` and ``sum_b E(M) = g`` are ``(C - 1) (B + 1)`` equations for ``B^2``
unknowns. Damped Gauss-Newton from many starts at once finds it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedleak import deadline
from fedleak.attacks.head import factor, weights
from fedleak.attacks.head.equations import Constraint, Mixture, rows_rms
from fedleak.attacks.head.labels import label_candidates
from fedleak.client.loss import PLAIN, CanonicalLoss
from fedleak.precision import NOISY

#: Mean square residual, in units of the rounding expected, of a solution: 0.1 to 2 measured.
_SOLVED = 5.0
#: Singular value ratio below which float32 holds fewer images than there are.
_DISTINCT = 1e-7
#: Rounds of random starts, how many at once, and how far their logits are from the mean.
_EFFORTS, _STARTS, _SPREADS = 12, 8, (0.3, 0.1, 0.1, 0.3, 1.0, 1.0, 3.0, 3.0)
#: Sets of labels tried, and Gauss-Newton steps from each start.
_CANDIDATES, _STEPS = 100, 200
#: Sets of labels after which a factor is looked for, and how near to 1 it is none.
_LIKELY, _AS_IT_IS = 4, 1e-2
#: Misfit up to which a factor is one, though the images cannot be told apart.
_CLOSE = 1e3
#: Relative size of singular values that are rounding, and how far they are below the others.
_NOTHING, _DROP = 1e-5, 1e-2
#: Relative error of an input up to which its image is worth trusting: the one estimated, and
#: by how much the image, put through the network, misses it.
TRUSTED = 1e-2
#: Relative deviation of an input from which the layer below is asked.
_VAGUE = 3e-6
#: Bounds the searches for large batches, of which each costs as the sixth power of their size.
_WORK = 4e10
#: Entries of the normal equations of all starts at once.
_ENTRIES = 2e6


@dataclass
class Demixed:
    """The batch behind one head gradient.

    Attributes
    ----------
    inputs : Tensor, shape (B, features)
        The head's inputs.
    cotangents : Tensor, shape (B, classes)
        ``dL/dlogits`` of the batch's mean loss.
    labels : Tensor, int64, shape (B,)
    deviation : Tensor, shape (B,)
        Estimated standard deviation of the entries of each input.
    misfit : float
        Mean square residual, in units of the rounding expected: about 1 at the truth.
    ratio : float
        Smallest over largest singular value of ``G``, of the first ``B``: the conditioning.
    noise : float
        Of the entries of ``G``, relative to their root mean square: what ``B`` images do not
        explain.
    factor : float
        By what the gradients were found to be multiplied; all else is of them divided by it.
    rank : int
        Of ``G``, where its singular values fall clearly to those of rounding; else 0.
    loss : CanonicalLoss or None
        Another than was declared, which explains the batch.
    """

    inputs: Tensor
    cotangents: Tensor
    labels: Tensor
    deviation: Tensor
    misfit: float
    ratio: float
    noise: float
    factor: float = 1.0
    rank: int = 0
    loss: CanonicalLoss | None = None

    @property
    def solved(self) -> bool:
        """Whether the misfit is one of rounding, and the images can be told apart at all."""
        return self.misfit < _SOLVED and self.ratio > max(_DISTINCT, 2 * self.noise)

    @property
    def why_not(self) -> str:
        """Why the images are not told apart; empty if they are."""
        if self.solved:
            return ""
        if self.ratio <= max(_DISTINCT, 2 * self.noise):
            hides = f"its noise ({self.noise:.0e})" if self.noise > NOISY else "float32"
            return (
                f"the singular values of its gradient fall to {self.ratio:.0e} of the largest, "
                f"where {hides} hides them (strong noise, or an image that is there twice)"
            )
        return (
            f"what is found misses its gradient by {math.sqrt(self.misfit):.1g} times the "
            f"rounding expected (singular values fall to {self.ratio:.1e} of the largest)"
        )

    @property
    def relative_error(self) -> Tensor:
        """Estimated error of each input, relative to it, shape (B,)."""
        return self.deviation / rows_rms(self.inputs)

    def report(self, made: Tensor) -> dict[str, Any]:
        """Return the conditioning, and which images to trust, as plain values.

        Parameters
        ----------
        made : Tensor, shape (B, features)
            What the reconstructed images give at the head.
        """
        missed = rows_rms(made - self.inputs) / rows_rms(self.inputs)
        return {
            "singular_value_ratio": self.ratio,
            "misfit": self.misfit,
            "relative_error": self.relative_error.tolist(),
            "missed": missed.tolist(),
            "trusted": (self.relative_error.maximum(missed) < TRUSTED).tolist(),
        }


def demix(
    gradient: Tensor,
    bias: Tensor,
    weight: Tensor,
    offset: Tensor,
    images: int,
    typical: Tensor,
    labels: Tensor | None = None,
    constraint: Constraint | None = None,
    rounding: tuple[float, float] = (0.0, 0.0),
    loss: CanonicalLoss | None = None,
    scaled: bool = False,
) -> Demixed:
    """Find the inputs of a fully connected head, and the labels, of one batch.

    Parameters
    ----------
    gradient : Tensor, float64, shape (classes, features)
        Gradient of the head's weight, for the mean loss of the batch.
    bias : Tensor, shape (classes,)
        Gradient of its bias.
    weight, offset : Tensor, shapes (classes, features) and (classes,)
        The head.
    images : int
        Batch size B; at most ``classes - 1`` and ``features``.
    typical : Tensor, shape (classes,)
        Mean class probabilities on images of the server's own, to guess label counts.
    labels : Tensor, int64, shape (B,), optional
        Where they are known.
    constraint : callable, optional
        What the layer below demands of inputs; sharpens the result.
    rounding : tuple of float
        Standard deviations of rounding, beside that of float32 gradients, in the entries of
        ``gradient`` and ``bias``: where they are differences of weights.
    loss : CanonicalLoss, optional
        Of the batch; by default the mean cross-entropy.
    scaled : bool
        Whether they are known to be multiplied by an unknown number above 0. Else that is tried
        where no likely labels solve them as they are.

    Returns
    -------
    Demixed
        The best of all sets of labels tried; not ``solved`` if none fits within rounding.
    """
    loss = loss or PLAIN
    values, right = torch.linalg.svd(gradient, full_matrices=False)[1:]
    if not float(values[0]) > 0:  # withheld, or pruned away
        return _indistinct(right[:images], len(bias), 0.0, 0.0)
    rank = _rank(values)
    ratio = float(values[images - 1] / values[0])
    # What B images do not explain is noise.
    entry = float((values[images:].square().sum() / gradient[images:].numel()).sqrt())
    noise = entry / float(gradient.square().mean().sqrt())
    basis = right[:images]
    if ratio <= max(_DISTINCT, 2 * noise):
        return replace(_indistinct(basis, len(bias), ratio, noise), rank=rank)
    batch = _Batch(
        gradient, bias, weight, offset, images, typical, labels, constraint, rounding, basis, noise,
        ratio, loss,
    )  # fmt: skip
    if scaled:
        found = batch.scaled((1,)) or _indistinct(basis, len(bias), ratio, noise)
    else:
        found = batch.plain()
    return replace(found, rank=rank)


def _rank(values: Tensor) -> int:
    """Return how many singular values stand clear of the rest, which are rounding; else 0."""
    relative = values / values[0]
    drops = relative[1:] / relative[:-1].clamp_min(1e-300)
    clear = ((relative[1:] < _NOTHING) & (drops < _DROP)).nonzero()
    return int(clear[0]) + 1 if len(clear) else 0


@dataclass
class _Batch:
    """One batch, as :func:`demix` is given it, and what its singular values say."""

    gradient: Tensor
    bias: Tensor
    weight: Tensor
    offset: Tensor
    images: int
    typical: Tensor
    labels: Tensor | None
    constraint: Constraint | None
    rounding: tuple[float, float]
    basis: Tensor
    noise: float
    ratio: float
    loss: CanonicalLoss

    def problem(self, labels: Tensor, t: float = 1.0) -> Mixture:
        """Return the equations for the update times ``t``."""
        of_g, of_bias = self.rounding
        return Mixture(
            t * self.gradient, t * self.bias, self.weight, self.offset, self.basis, self.noise,
            labels, (abs(t) * of_g, abs(t) * of_bias), self.loss,
        )  # fmt: skip

    def candidates(self, t: float = 1.0) -> Iterator[Tensor]:
        """Yield sets of labels, the likeliest first."""
        if self.labels is not None:
            return iter([self.labels])
        return label_candidates(t * self.bias, self.images, self.typical, self.loss)

    def plain(self) -> Demixed:
        """Demix the update as it is, or, where no likely labels explain that, a multiple of it."""
        fresh = (_Try(self.problem(y)) for y in itertools.islice(self.candidates(), _CANDIDATES))
        tried: list[_Try] = []
        left, asked = max(2, int(_WORK / self.images**6)), False
        near: Demixed | None = None
        for effort in range(_EFFORTS):
            # At first every set of labels, later the better half of them again, and so on.
            tried = sorted(tried, key=lambda t: t.misfit)[: (len(tried) + 1) // 2]
            for attempt in itertools.islice(list(tried) if effort else fresh, left):
                if deadline.passed() and tried:
                    break
                if not asked and (effort or len(tried) == _LIKELY):
                    asked, found = True, self.scaled((1, -1))
                    if found is not None and found.solved:
                        return found
                    near = found
                    weighted = self.weighted()
                    if weighted is not None:
                        return weighted
                left -= 1
                m, misfit = _sharpen(attempt.problem, _search(attempt.problem, effort))
                if misfit < _SOLVED:
                    return _asked(attempt.problem, m, misfit, self.ratio, self.constraint)
                if effort == 0:
                    tried.append(attempt)
                if misfit < attempt.misfit:
                    attempt.misfit, attempt.m = misfit, m
        best = min(tried, key=lambda t: t.misfit)
        if near is not None and near.misfit < best.misfit:
            return near
        if best.m is None:  # no start came anywhere
            return _indistinct(self.basis, len(self.bias), self.ratio, self.noise)
        return _finished(best.problem, best.m, best.misfit, self.ratio)

    def scaled(self, signs: tuple[int, ...]) -> Demixed | None:
        """Demix a multiple of the update, by any number of these signs; None if none does.

        Where rounding hides the images, the factor may still be found: then not ``solved``.
        """
        best: Demixed | None = None
        for t, labels, m in factor.search(
            self.bias, self.candidates, lambda t, y: self.problem(y, t), self.images, signs
        ):
            if abs(t - 1) < _AS_IT_IS and signs != (1,):
                problem = self.problem(labels)
                plain, misfit = _sharpen(problem, m)
                if misfit < _SOLVED:
                    return _asked(problem, plain, misfit, self.ratio, self.constraint)
            problem = self.problem(labels, t)
            m, misfit = _sharpen(problem, m)
            if misfit < _SOLVED:
                found = _asked(problem, m, misfit, self.ratio, self.constraint)
                return replace(found, factor=1 / t)
            if misfit < (_CLOSE if best is None else best.misfit):
                best = replace(_finished(problem, m, misfit, self.ratio), factor=1 / t)
        return best

    def weighted(self) -> Demixed | None:
        """Demix under class weights that nobody declared; None if none explain it."""
        if self.loss != PLAIN or self.labels is not None or self.noise > NOISY:
            return None
        like = self.problem(torch.zeros(self.images, dtype=torch.int64, device=self.bias.device))
        for loss, labels in weights.search(like, self.typical):
            other = replace(self, loss=loss, labels=labels)
            found = other.scaled((1,))
            if found is not None and found.solved:
                return replace(found, loss=loss)
        return None


@dataclass
class _Try:
    """One set of labels, and the best that was found for it."""

    problem: Mixture
    misfit: float = math.inf
    m: Tensor | None = None


def _indistinct(basis: Tensor, classes: int, ratio: float, noise: float) -> Demixed:
    """Return that nothing was found."""
    count = len(basis)
    zero, unknown = basis.new_zeros(count, classes), basis.new_full((count,), torch.inf)
    labels = torch.zeros(count, dtype=torch.int64, device=basis.device)
    return Demixed(torch.zeros_like(basis), zero, labels, unknown, math.inf, ratio, noise)


def _asked(
    problem: Mixture, m: Tensor, misfit: float, ratio: float, constraint: Constraint | None
) -> Demixed:
    """Return the solution, sharpened by the layer below where it is vague."""
    found = _finished(problem, m, misfit, ratio)
    if constraint is None or float(found.relative_error.max()) < _VAGUE:
        return found
    problem.constraint = constraint
    return _finished(problem, _sharpen(problem, m)[0], misfit, ratio)


def _search(problem: Mixture, effort: int) -> Tensor:
    """Return the best ``M`` of some random starts; each ``effort`` draws others.

    Weighted and unweighted equations have different false minima, so they take turns.
    """
    count, classes = problem.own.shape
    generator = torch.Generator().manual_seed(effort)
    starts = max(1, min(_STARTS, int(_ENTRIES / count**4)))
    noise = torch.randn(starts, count, classes, generator=generator, dtype=torch.float64)
    spread = _SPREADS[effort % len(_SPREADS)]
    mean = problem.mean_probabilities().clamp_min(1e-9)
    loss = problem.loss
    p = loss.link(loss.unlink(mean) + spread * noise.to(mean))
    target = problem.target.expand(starts, -1, -1)
    start = torch.linalg.lstsq(problem.cotangents(p).mT, target).solution
    problem.unweigh()
    if effort % 2:
        problem.weigh(start[0])
    m, value = problem.solve(start, _STEPS if effort else _STEPS // 2)
    return m[int(value.nan_to_num(torch.inf).argmin())]


def _sharpen(problem: Mixture, m: Tensor, rounds: int = 3) -> tuple[Tensor, float]:
    """Go on from a solution with every equation weighted by its own rounding.

    Returns ``M`` and the mean square of what is left, in units of that rounding.
    """
    freedom = problem.target.numel() + len(problem.bias) - problem.batch**2
    misfit = math.inf
    for _ in range(rounds):
        problem.weigh(m)
        found, values = problem.solve(m.unsqueeze(0), _STEPS)
        before, misfit = misfit, float(values[0]) / max(freedom, 1)
        m = found[0]
        if misfit > 0.5 * before:
            break
    problem.weigh(m)
    return m, misfit


def _finished(problem: Mixture, m: Tensor, misfit: float, ratio: float) -> Demixed:
    """Return the inputs, and how well they are known: ``M``'s error, and that of ``R``."""
    count = problem.batch
    e = problem.evaluate(m.unsqueeze(0))[1][0]
    variance = problem.covariance(m).diagonal().reshape(count, count).sum(1)
    deviation = torch.hypot((variance / problem.basis.shape[1]).sqrt(), problem.of_basis(e))
    return Demixed(m @ problem.basis, e, problem.labels, deviation, misfit, ratio, problem.noise)
