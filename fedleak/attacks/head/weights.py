"""Class weights that nobody declared, found with what demixes a batch.

Under a weighted cross-entropy an image of label ``y`` counts ``w_y``, so that ``E = m (p - y)``
with one mass ``m`` for each label that is there: ``E(M, m)^T M = G R^T`` and ``sum E = g`` have a
few unknowns more. The masses also hold any factor of the whole update.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement, islice

import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from fedleak import deadline
from fedleak.attacks.head.equations import Mixture, damped
from fedleak.client.loss import CrossEntropy

#: Sets of labels tried, random starts of each, and steps of them.
_LABELS, _STARTS, _STEPS = 4, 24, 150
#: How far their logits are from typical ones, in turn.
_SPREADS = (0.1, 0.3, 1.0)
#: Images of a batch: of six, no start of 24 came to the solution.
_MOST = 5
#: Classes beside those that are surely there which may be there twice; equations to spare.
_BESIDE, _SPARE = 6, 4
#: Part of the largest entry of a bias gradient from which its sign is sure.
_SURE = 1e-3
#: Relative residual of a solution, and how near to a number of three digits a weight is it.
_NEAR, _ROUND = 3e-5, 1e-4
#: Relative difference of weights from which they are no plain mean.
_DIFFERENT = 1e-2


def search(problem: Mixture, typical: Tensor) -> Iterator[tuple[CrossEntropy, Tensor]]:
    """Yield losses with class weights that explain a batch, and its labels.

    Parameters
    ----------
    problem : Mixture
        Of a mean cross-entropy; its labels do not matter.
    typical : Tensor, shape (classes,)
        Mean class probabilities on images of the server's own.
    """
    count, classes = problem.own.shape
    spare = (classes - 1) * (count + 1) - count * (count + 1)
    if spare < _SPARE or count > _MOST:
        return
    for labels in islice(_labels(problem.bias, count), _LABELS):
        if deadline.passed():
            return
        masses = _solve(problem, torch.tensor(labels, device=problem.bias.device), typical)
        if masses is None:
            continue
        kinds = sorted(set(labels))
        weights = {y: float(m / masses.min()) for y, m in zip(kinds, masses, strict=True)}
        if max(weights.values()) < 1 + _DIFFERENT:
            continue
        near = {y: round(w, 3) for y, w in weights.items()}
        weights = {y: near[y] if abs(near[y] - w) < _ROUND * w else w for y, w in weights.items()}
        # What is not in the batch has a weight that does not show.
        whole = tuple(weights.get(c, 1.0) for c in range(classes))
        yield CrossEntropy(weight=whole), torch.tensor(labels, device=problem.bias.device)


def _labels(bias: Tensor, count: int) -> Iterator[tuple[int, ...]]:
    """Yield sets of labels: only they have negative entries, and some may be there twice."""
    order = bias.argsort().tolist()
    sure = [c for c in order if float(bias[c]) < -_SURE * float(bias.abs().max())]
    if not sure or len(sure) > count:
        return
    for more in combinations_with_replacement(order[:_BESIDE], count - len(sure)):
        yield tuple(sorted([*sure, *more]))


def _solve(problem: Mixture, labels: Tensor, typical: Tensor) -> Tensor | None:
    """Return the mass of each label that is there, ascending; None where none explain the batch."""
    count, classes = problem.own.shape
    kinds, group = labels.unique(return_inverse=True)
    own = torch.nn.functional.one_hot(labels, classes).to(problem.bias)
    h, g = problem.target, problem.bias
    of_h, of_g = h.norm(), g.norm()

    def residual(theta: Tensor) -> Tensor:
        m, mass = theta[: count**2].reshape(count, count), theta[count**2 :].exp()
        p = (m @ problem.logits + problem.offset).softmax(-1)
        e = mass[group].unsqueeze(1) * (p - own)
        return torch.cat([((e.mT @ m - h) / of_h).flatten(), (e.sum(0) - g) / of_g])

    here = torch.zeros_like(g, dtype=torch.bool)
    here[kinds] = True
    total = -g[here].sum() / (1 - typical[here].sum()).clamp_min(0.05)
    mass = ((total * typical - g)[kinds] / torch.bincount(group)).clamp_min(1e-3 * total.abs())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_STARTS, count, classes, generator=generator, dtype=torch.float64).to(g)
    spread = torch.tensor(_SPREADS).to(g).repeat(_STARTS // len(_SPREADS)).reshape(-1, 1, 1)
    p = (typical.clamp_min(1e-9).log() + spread * noise).softmax(-1)
    e = mass[group].reshape(1, -1, 1) * (p - own)
    m = torch.linalg.lstsq(e.mT, h.expand(_STARTS, -1, -1)).solution
    theta = torch.cat([m.flatten(1), mass.log().expand(_STARTS, -1)], 1)
    value, slopes = vmap(residual), vmap(jacfwd(residual))
    r = value(theta)
    damping, idle = torch.full((_STARTS,), 1e-2).to(g), torch.zeros(_STARTS).to(g)
    for _ in range(_STEPS):
        if deadline.passed():
            break
        j = slopes(theta)
        step = damped(j.mT @ j, (j.mT @ r.unsqueeze(2)).squeeze(2), damping)
        trial = theta - step
        made = value(trial)
        down = made.square().sum(1) < r.square().sum(1)
        gained = made.square().sum(1) < r.square().sum(1) * (1 - 1e-3)
        idle = torch.where(down & gained, 0.0, idle + 1)
        theta = torch.where(down.unsqueeze(1), trial, theta)
        r = torch.where(down.unsqueeze(1), made, r)
        damping = torch.where(down, damping * 0.3, damping * 4).clamp(1e-15, 1e8)
        if bool((idle >= 8).all()) or float(r.norm(dim=1).min()) < 1e-7:
            break
    best = int(r.norm(dim=1).nan_to_num(torch.inf).argmin())
    return theta[best, count**2 :].exp() if float(r[best].norm()) < _NEAR else None
