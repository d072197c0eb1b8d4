"""Several rounds of one client in one estimate: every update under the model that was sent then.

What one round leaves open the next may tell: noise is drawn anew, pruning drops other entries, and
the model has changed. All that is asked of an attack is what it made of each round alone, and what
it expects of images (:meth:`Attack.image_prior`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak import deadline
from fedleak.attacks.base import Attack, Reconstruction, placed
from fedleak.attacks.certainty import at_most_db, expected_db, fits, unexplained
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.prior_matching import Match, Several, match, posterior
from fedleak.attacks.suspicions.hidden import HIDDEN, VAGUE
from fedleak.attacks.suspicions.unexplained import UNEXPLAINED
from fedleak.attacks.targets.local_training import module_target
from fedleak.attacks.targets.rounds import RoundsTarget
from fedleak.errors import InvalidInputError
from fedleak.priors import Prior
from fedleak.solvers import jacobian
from fedleak.solvers.box import MOST, into_box
from fedleak.wording import RECOGNISABLE

#: Relative error of an entry, at least, where it is asked whether images explain a round.
TOLERANCE = 1e-2
#: The same where a round is exact, and its images can be told from their likes.
EXACTLY = 1e-3
#: Root mean square error, in units of the expected ones, up to which they do: it is 1 at the
#: truth, give or take some hundredths, and above it where an estimate is not yet exact.
EXPLAINED = 1.2
#: How much worse a round may be explained than by its own images, where these miss it, too.
_SLACK = 1.1
#: Relative errors that a match works with, and that two matches are compared at.
_PRECISION, _FINE = 1e-3, 1e-6
#: Cosine, on average, between what two rounds leave unexplained, from which it is no noise. Noise
#: of 2,000 entries stays below 0.1, another loss was at 0.98.
_ALIKE = 0.5
#: Evaluations of the objective where Gauss-Newton is out of reach.
_STEPS = 600


@dataclass(frozen=True, eq=False)
class Round:
    """One update, and what its own attack made of it.

    Attributes
    ----------
    evidence : Evidence
        Of this update alone, with the labels of ``alone``.
    weighed : Evidence
        The same with an error for every entry: the known defence's, or where none is known, for
        each tensor what ``alone`` leaves unexplained of it.
    alone : Reconstruction
    """

    evidence: Evidence
    weighed: Evidence
    alone: Reconstruction

    @classmethod
    def of(cls, attack: Attack, alone: Reconstruction, observation: Any) -> Round:
        """Take an observation that ``attack`` has made ``alone`` of."""
        device = getattr(attack, "device", "auto")
        evidence = Evidence.gather([observation], device, simulate=True)
        evidence = evidence.with_labels(alone.labels[None].to(evidence.labels.device))
        noise = float(alone.details.get("noise", 0.0))
        errors = evidence.errors or unexplained(evidence, alone.images, noise)
        return cls(evidence, evidence.with_errors(errors), alone)

    @property
    def num_images(self) -> int:
        """Number of images behind the update."""
        return self.evidence.num_images

    def with_labels(self, labels: Tensor) -> Round:
        """Return the same round with other labels, shape (B,)."""
        labels = labels[None].to(self.evidence.labels.device)
        parts = self.evidence.with_labels(labels), self.weighed.with_labels(labels)
        return replace(self, evidence=parts[0], weighed=parts[1])

    def misfit(self, images: Tensor, precision: float = TOLERANCE) -> float:
        """Return how far images, shape (B, C, H, W), miss the update: 1 is as expected."""
        images = images[None].to(self.evidence.labels.device)
        return float(self.weighed.misfit(images, precision)[0])

    @property
    def determined(self) -> bool:
        """Whether one round leaves no other images: its linear systems have full rank."""
        layers = self.alone.details.get("layers")
        if layers:
            return all(layer["rank"] >= layer["unknowns"] for layer in layers)
        proved = self.alone.certified
        return self.alone.details.get("by") == "rows" or (bool(proved) and all(proved))

    def explained_by(self, images: Tensor, exactly: bool = False) -> bool:
        """Whether images explain the update as its noise lets expect, or hardly worse than its own.

        Its own images fit its noise as well, so that no others come quite as near.
        """
        precision = EXACTLY if exactly else TOLERANCE
        own = self.misfit(self.alone.images, precision)
        return self.misfit(images, precision) <= max(EXPLAINED, _SLACK * own)


def solve(
    rounds: Sequence[Round],
    prior: Prior,
    members: Sequence[Sequence[int]],
    start: Tensor,
    steps: int = _STEPS,
    near: bool = False,
) -> Match | None:
    """Find the images that all rounds and the prior agree on.

    Parameters
    ----------
    rounds : sequence of Round
    prior : Prior
    members : sequence of sequence of int
        Of each round, which of the images were in it.
    start : Tensor, shape (K, C, H, W)
        Several images are solved from here while that leads to what explains all rounds.
    near : bool
        Look nowhere else where it does not.

    Returns
    -------
    Match or None
        Of one update with ``K`` images.
    """
    target = RoundsTarget([module_target(r.weighed) for r in rounds], members)
    if len(start) > 1 and prior.gaussian and fits(target, start.numel()):
        several, begin = Several(prior, len(start)), start[None]
        solver, _, chosen = posterior(target, several, begin, _PRECISION, begin)
        images = solver.x.reshape(begin.shape)
        if _explain(rounds, members, images):
            made = _as_pixels(target, rounds, chosen[0], members, images)
            return Match(made, "gauss-newton", [str(chosen[0])])
    if near:
        return None
    found = match(target, prior, start[None], len(start), steps, _PRECISION)
    if len(start) > 1 or not found.chosen:
        return found
    made = _as_pixels(target, rounds, found.chosen[0], members, found.images)
    return replace(found, images=made)


def _explain(rounds: Sequence[Round], members: Sequence[Sequence[int]], images: Tensor) -> bool:
    """Whether images, shape (1, K, C, H, W), explain every round."""
    pairs = zip(rounds, members, strict=True)
    return all(r.explained_by(images[0, list(m)]) for r, m in pairs)


def _as_pixels(
    target: RoundsTarget,
    rounds: Sequence[Round],
    prior: Prior,
    members: Sequence[Sequence[int]],
    images: Tensor,
) -> Tensor:
    """Return the most probable images near an estimate that are pixels in [0, 1].

    Noise puts dark and bright pixels outside; held at their bound they tell of the others. It is
    left as it is where it has too many unknowns, or pixels explain the rounds no longer.
    """
    outside = (images - images.clamp(0, 1)).abs().max()
    few = images.numel() <= MOST and fits(target, images.numel())
    if not few or float(outside) < _PRECISION:
        return images

    def residual(x: Tensor) -> Tensor:
        return target.made(x.reshape(images.shape)) - target.values

    flat = images.flatten(1)
    rows = jacobian(residual, flat)[0] / target.errors.clamp_min(_PRECISION)[0].unsqueeze(1)
    factor = prior.dense().factor.reshape(rows.shape[1], -1)
    eye = torch.eye(len(factor)).to(factor)
    expected = torch.linalg.solve_triangular(factor, eye, upper=False)
    root = torch.linalg.qr(torch.cat([rows, expected]), mode="r")[1]
    made = into_box(flat, root).reshape(images.shape)
    return made if _explain(rounds, members, made) else images


def certainty(
    rounds: Sequence[Round], members: Sequence[Sequence[int]], images: Tensor, prior: Prior
) -> list[float]:
    """Return the PSNR in dB that an attacker expects of images, shape (K, C, H, W).

    From the covariance that all rounds and the prior leave open, linearised at the images
    themselves: no truth is asked. NaN where there are too many unknowns for that.
    """
    target = RoundsTarget([module_target(r.weighed) for r in rounds], members)
    if not fits(target, images.numel()):
        return [math.nan] * len(images)
    return expected_db(target, images[None], Several(prior, len(images)).dense())[0]


def together(
    attack: Attack, observations: Sequence[Any], alone: Sequence[Reconstruction] | None = None
) -> Reconstruction:
    """Reconstruct images that one client used in several rounds, from all of them at once.

    Parameters
    ----------
    attack : Attack
    observations : sequence of Observation
        Each of the model that was sent in its round; of the same images, in any order.
    alone : sequence of Reconstruction, optional
        What the attack made of each of them, where that is known already.

    Returns
    -------
    Reconstruction
        The joint estimate where it explains every round; else the one of a single round that
        explains all of them best, which is then doubtful. ``details["misfit"]`` is of each round,
        1 where it is as near as its noise lets expect; ``fit`` is the root mean square over rounds.

    Raises
    ------
    InvalidInputError
        If there is none, or they are of different numbers or shapes of images.
    ForbiddenError
        If a threat model does not allow the attack.

    Notes
    -----
    Where the attacker does not know the clients' defence, each round's noise is estimated from
    what its own reconstruction leaves unexplained.
    """
    observations = placed(observations)
    kinds = {(o.num_images, o.input_shape) for o in observations}
    if len(kinds) != 1:
        raise InvalidInputError(
            f"rounds of the same images have one number and shape of them, not {sorted(kinds)}"
        )
    if not alone:
        alone, left = [], len(observations) + 1  # the last share is that of all of them together
        for observation in observations:
            with deadline.part(1 / left):  # none takes the time of those behind it
                alone.append(attack([observation])[0])
            left -= 1
    rounds = [Round.of(attack, a, o) for a, o in zip(alone, observations, strict=True)]
    rounds = agreed(rounds)
    shape = observations[0].input_shape
    prior = attack.image_prior(shape, rounds[0].evidence.replay.device)
    return joint(rounds, prior)


def _answered(rounds: Sequence[Round], images: Tensor) -> tuple[str, ...]:
    """Return the doubts of single rounds that all of them together, which agree, dispel.

    None where what the images leave unexplained is alike in all rounds: noise never is, and a
    client that does something else than was declared does it in every round.
    """
    if _alike([_rest(r, images) for r in rounds]):
        return ()
    target = RoundsTarget(
        [module_target(r.weighed) for r in rounds], [range(len(images))] * len(rounds)
    )
    expected = at_most_db(target, images[None], RECOGNISABLE)[0]
    if any(map(math.isnan, expected)):  # too many unknowns to ask
        return UNEXPLAINED
    return (*UNEXPLAINED, HIDDEN, VAGUE) if min(expected) >= RECOGNISABLE else ()


def _rest(one: Round, images: Tensor) -> Tensor:
    """Return what images, shape (B, C, H, W), leave unexplained of a round, shape (m,)."""
    target = module_target(one.weighed)
    images = images[None].to(one.evidence.labels.device)
    with torch.no_grad():
        rest = target.made(images) - target.values
    return torch.where(target.errors.isfinite(), rest, 0.0)[0].double()


def _alike(rests: Sequence[Tensor]) -> bool:
    """Whether two in a row point into one direction, on average."""
    found = [
        float(F.cosine_similarity(a, b, dim=0))
        for a, b in pairwise(rests)
        if len(a) == len(b)  # of what both rounds tell
    ]
    return bool(found) and sum(found) / len(found) > _ALIKE


def agreed(rounds: Sequence[Round]) -> list[Round]:
    """Return rounds with the labels that most of them have: noise may have hidden some."""
    each = [tuple(sorted(r.alone.labels.tolist())) for r in rounds]
    most = max(each, key=each.count)  # of equally many the first
    chosen = rounds[each.index(most)].alone.labels
    return [r if len(rounds) == 1 else r.with_labels(chosen) for r in rounds]


def joint(rounds: Sequence[Round], prior: Prior) -> Reconstruction:
    """Return what rounds of the same images, with the same labels, tell together."""
    count = rounds[0].num_images
    misfits = [sum(r.misfit(o.alone.images, _FINE) ** 2 for r in rounds) for o in rounds]
    best = min(range(len(rounds)), key=misfits.__getitem__)
    images, details = rounds[best].alone.images, dict(rounds[best].alone.details)
    if len(rounds) > 1:
        start = images.clamp(0, 1).to(rounds[0].evidence.replay.device)
        found = solve(rounds, prior, [range(count)] * len(rounds), start)
        assert found is not None
        made = found.images[0].cpu()
        if sum(r.misfit(made, _FINE) ** 2 for r in rounds) < misfits[best]:
            images = made
            details = {"by": "rounds", "solver": found.solver, "prior": found.priors[0]}
    missed = [n for n, r in enumerate(rounds) if not r.explained_by(images)]
    answered = _answered(rounds, images) if len(rounds) > 1 and not missed else ()
    doubts = dict.fromkeys(d for r in rounds for d in r.alone.doubts if d not in answered)
    if missed:
        said = f"{len(missed)} of {len(rounds)} rounds are not explained by the same images"
        doubts[said] = None
    fits = torch.cat([r.evidence.fit(images[None]) for r in rounds])
    details |= {"rounds": len(rounds), "misfit": [r.misfit(images) for r in rounds]}
    return Reconstruction(
        images,
        rounds[0].evidence.labels[0].cpu(),
        float(fits.square().mean().sqrt()),
        details,
        rounds[0].alone.threat,
        tuple(doubts),
    )
