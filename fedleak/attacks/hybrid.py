"""Linear systems where they are solvable, joint matching under a prior elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedleak import deadline
from fedleak.attacks import on_graph, packaging
from fedleak.attacks.base import ATTACKS, Attack, Reconstruction
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.first_layer import whole_batch
from fedleak.attacks.head.account import account
from fedleak.attacks.head.batch import Demixed
from fedleak.attacks.head.single import HeadSolution, demix_heads, of_batches
from fedleak.attacks.linear import (
    CLEAN,
    LinearSolution,
    package,
    row_deviations,
    solve_layer,
    solve_recursively,
)
from fedleak.attacks.packaging import ROUNDED, snapped
from fedleak.attacks.prior_matching import Match, match
from fedleak.attacks.targets import shared_rows
from fedleak.attacks.targets.base import ChainTarget, Target
from fedleak.attacks.targets.local_training import module_target, with_order
from fedleak.attacks.targets.whole_update import UpdateTarget
from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.images import read_images
from fedleak.observation import Observation
from fedleak.priors import PRIORS, Prior, make_prior
from fedleak.systems import Affine, Pointwise
from fedleak.wording import EXPLAINED

#: Least squares fits the noise too: under noise the prior may cost this much of the fit, and
#: any fit within twice the noise is a good one (the discrepancy principle).
_SLACK = 1.1
#: Fit of a batch solved layer by layer from which it is matched as a whole, too.
_POOR = 0.05
#: Fit of an update solved on its model's graph up to which nothing else is tried.
_SOLVED = 1e-3
#: Distance, in known errors, at which a defended update is explained: 1 at the truth.
_AT_NOISE = 1.2
#: Part of another's fit that a fit must come to, to be taken for the better reconstruction.
_CLEARLY = 0.9
#: Parameters times updates that a module is matched on at once, by device.
_PARAMETERS = {"cpu": 3e7, "cuda": 5e8}


@ATTACKS.register("hybrid")
@dataclass(frozen=True)
class HybridAttack(Attack):
    """Linear systems from the head down, then joint matching under an image prior.

    Layers are solved exactly, from the head down, as long as their systems have full rank.
    What is left, the image and the layers up to the first deficient one, is matched
    jointly: the most probable image that reproduces the known values and every gradient
    below them. Under noise the whole network is matched, with the noise level estimated
    from the update itself. The result never fits a clean gradient worse than the linear
    one, and a noisy one hardly. An image that comes out on the grid of 8-bit pixels is
    rounded to it: all pixels of a wrong image do not lie there by chance.

    Batches are read off the rows of a fully connected first layer where those show all of their
    images (:class:`fedleak.attacks.RowsAttack`), and told apart at the head elsewhere. Those that
    cannot be, and models that are no chain of layers with linear systems (residual blocks,
    attention, ...), are matched on the module itself, with the head's input where it is known.

    Parameters
    ----------
    prior : str
        Name in :data:`fedleak.priors.PRIORS`.
    public : path or Tensor, optional
        Public images, a folder or shape (M, C, H, W), for a prior that is learned.
    prior_options : mapping, optional
        Settings of the prior.
    steps : int
        Evaluations of the objective, at most, where Gauss-Newton is out of reach: large
        images, batches, a prior that is not Gaussian.
    precision : float
        Relative error at which a value counts as matched; noise raises it.
    local_training : bool
        Where clients take several steps, match through all of them, the order of their images
        unknown (:class:`fedleak.attacks.local.LocalTarget`); else take them for one step.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    """

    prior: str = "gaussian"
    public: str | Path | Tensor | None = None
    prior_options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 600
    precision: float = 1e-3
    local_training: bool = True
    device: str = "auto"
    _made: dict[Any, Prior] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InvalidInputError(f"steps must be a whole number above 0, not {self.steps!r}")
        good = isinstance(self.precision, (int, float)) and math.isfinite(self.precision)
        if not good or self.precision <= 0:
            raise InvalidInputError(f"precision must be a number above 0, not {self.precision!r}")
        if not isinstance(self.local_training, bool):
            raise InvalidInputError(
                f"local_training must be true or false, not {self.local_training!r}"
            )
        if not isinstance(self.prior_options, Mapping):
            raise InvalidInputError(f"prior_options must be a table, not {self.prior_options!r}")
        if self.prior not in PRIORS:
            PRIORS[self.prior]  # raises, with the nearest names
        if self.prior_options:
            make_prior(self.prior, (3, 8, 8), **self.prior_options)  # refuses what it does not take
        if self.prior.endswith(":learned") and self.public is None:
            raise InvalidInputError(
                f"prior {self.prior!r} is learned from public images: name a folder of them "
                "(--public FOLDER), none of them a client's"
            )

    def needs(self, observation: Observation) -> set[str]:
        learned = self.public is not None
        return super().needs(observation) | ({"public_images"} if learned else set())

    def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        whole = [whole_batch(o, self.device) for o in observations]
        left = [o for o, read in zip(observations, whole, strict=True) if read is None]
        others = iter(self._reconstruct(left) if left else [])
        return [next(others) if read is None else read for read in whole]

    def _reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        evidence = Evidence.gather(observations, self.device, simulate=self.local_training)
        if evidence.signs:
            return self._match_module(evidence, "only the signs of the update are known")
        if evidence.rescales == "tensor" and evidence.num_images > 1:
            return self._match_module(evidence, "the update is known up to a factor only")
        if not evidence.is_chain:
            match_module = partial(self._match_module, why=evidence.why_not_chain)
            return self._solve_graphs(evidence, match_module)
        if evidence.num_images == 1:
            solve_chain = partial(self._solve_chain, heads=None)
            if on_graph.flat(evidence):
                return self._solve_graphs(evidence, solve_chain)
            return solve_chain(evidence)
        results = []
        demixed = demix_heads(evidence)
        for n in range(len(evidence)):
            # One after the other: none takes the time of those behind it.
            with deadline.part(1 / (len(evidence) - n)) as allowed:
                part = evidence.subset(torch.tensor([n], device=evidence.replay.device))
                with deadline.part(0.5) as search:  # what is no batch's gradient is matched, too
                    batch = next(demixed)
                result = self._solve_batch(part, batch)
            result.details["cut_short"] = allowed.hit or search.hit
            results.append(result)
        return results

    def _solve_graphs(
        self,
        evidence: Evidence,
        otherwise: Callable[[Evidence], list[Reconstruction]],
        batch: Demixed | None = None,
    ) -> list[Reconstruction]:
        """Solve what the rules on the model's graph do; ``otherwise`` does the rest.

        ``batch`` is what was told apart at the head of the one update that there then is.
        Of the two the one that fits the gradient better is returned.
        """
        if on_graph.why_not(evidence):
            return otherwise(evidence)
        found: dict[int, Reconstruction] = {}
        open_, why = [], ""
        prior = self._prior(evidence)
        for n in range(len(evidence)):
            with deadline.part(1 / (len(evidence) - n)):
                part = evidence.subset(torch.tensor([n], device=evidence.replay.device))
                made = on_graph.solve(part, prior, batch)
            if isinstance(made, Reconstruction):
                part = part.with_labels(made.labels[None].to(part.labels.device))
                found[n] = made
            else:
                why = made
            if n not in found or not self._settled(part, found[n]):
                open_.append(n)
        if open_:
            rest = evidence.subset(torch.tensor(open_, device=evidence.replay.device))
            with deadline.part(0.5 if evidence.defended else 1.0):
                others = otherwise(rest)
            for n, other in zip(open_, others, strict=True):
                part = evidence.subset(torch.tensor([n], device=evidence.replay.device))
                if n not in found or self._better(part, other, found[n], prior):
                    reason = {"why_not_graph": why} if n not in found else {}
                    found[n] = replace(other, details={**other.details, **reason})
        if open_ and evidence.errors and evidence.defended:
            # What the defence hides counts little; a search that takes all as it is may go further.
            # A factor that clipping left unknown stays so, with errors that are none.
            none = {k: torch.zeros_like(e) for k, e in rest.errors.items()} if rest.rescales else {}
            for n, other in zip(open_, otherwise(replace(rest, errors=none)), strict=True):
                part = evidence.subset(torch.tensor([n], device=evidence.replay.device))
                if self._off(part, other) < _CLEARLY * self._off(part, found[n]):
                    images = other.images[None].to(part.labels.device)
                    fit = float(part.with_labels(_labels_of(other, part)).fit(images)[0])
                    found[n] = replace(other, fit=fit)
        return [found[n] for n in range(len(evidence))]

    def _settled(self, evidence: Evidence, solved: Reconstruction) -> bool:
        """Whether nothing else need be tried: the update is explained up to its errors."""
        if solved.details["undetermined"]:
            return False
        if evidence.defended:
            return self._off(evidence, solved) < _AT_NOISE
        return bool(solved.details["certified"]) or solved.fit <= _SOLVED

    def _off(self, evidence: Evidence, found: Reconstruction) -> float:
        """Return how far a reconstruction is from the update, in known errors."""
        images = found.images[None].to(evidence.labels.device)
        evidence = evidence.with_labels(_labels_of(found, evidence))
        return float(evidence.misfit(images, self.precision)[0])

    def _better(
        self, evidence: Evidence, matched: Reconstruction, solved: Reconstruction, prior: Prior
    ) -> bool:
        """Whether images matched as a whole are to be preferred to those of the graph."""
        if evidence.defended:
            return self._off(evidence, matched) < _CLEARLY * self._off(evidence, solved)
        if solved.details["undetermined"] and solved.fit < _SOLVED:
            # Both explain the update: the prior decides. The graph takes it for a normal one.
            return matched.fit < (_SOLVED if prior.gaussian else EXPLAINED)
        return matched.fit < _CLEARLY * solved.fit

    def _solve_batch(self, evidence: Evidence, batch: Demixed) -> Reconstruction:
        """Solve one batch: on its model's graph where layers lose values, else layer by layer."""
        evidence, batch = account(evidence, batch)
        solve_chain = partial(self._solve_batch_chain, batch=batch)
        if batch.solved and on_graph.flat(evidence):
            return self._solve_graphs(evidence, solve_chain, batch)[0]
        return solve_chain(evidence)[0]

    def _solve_batch_chain(self, evidence: Evidence, batch: Demixed) -> list[Reconstruction]:
        """Solve one batch layer by layer, and match it as a whole where that leaves much open."""
        try:
            (result,) = self._solve_chain(evidence, [of_batches([batch], evidence)])
        except UnsupportedModelError as error:
            return self._match_module(evidence, str(error))
        if result.fit > _POOR:  # the layers below left little: perhaps all at once do more
            why = "the layers below the head leave too much open"
            (whole,) = self._match_module(evidence.with_labels(batch.labels.unsqueeze(0)), why)
            if whole.fit < _CLEARLY * result.fit:
                return [whole]
        return [result]

    def _solve_chain(
        self, evidence: Evidence, heads: list[HeadSolution] | None
    ) -> list[Reconstruction]:
        """Solve what is determined, layer by layer, and match what is not."""
        try:
            solution = solve_recursively(evidence, heads=heads)
        except UnsupportedModelError as error:  # a layer that has no way back
            return self._match_module(evidence, str(error))
        images, by = solution.image.clone(), [{"by": "linear"}] * len(evidence)
        unknown = solution.deviations[-1].isinf().flatten(1).any(1)
        unknown = unknown.unflatten(0, (-1, evidence.num_images)).any(1)
        clean = (solution.noise < CLEAN) & evidence.whole & ~unknown
        for mask, known in ((clean, True), (~clean, False)):
            if not bool(mask.any()):
                continue
            part, below = evidence.subset(mask), solution.subset(mask)
            depth = below.undetermined(evidence.chain.layers) if known else 0
            if known and depth == 0:
                continue
            found = self._match_chain(part, below, depth, known)
            if part.defended:
                bound = (_SLACK * part.misfit(images[mask], self.precision)).clamp_min(2.0)
                better = part.misfit(found.images, self.precision) <= bound
            else:
                bound = part.fit(images[mask]).clamp_min(ROUNDED)
                if not known:
                    bound = torch.maximum(_SLACK * bound, 2 * solution.noise[mask])
                better = part.fit(found.images) <= bound
            chosen = better.reshape(-1, 1, 1, 1, 1)
            images[mask] = torch.where(chosen, found.images, images[mask])
            for i, n in enumerate(mask.nonzero().flatten().tolist()):
                if better[i]:
                    by[n] = _by(found, i)
        results = package(evidence, snapped(evidence, images), solution, ["hybrid"] * len(evidence))
        for result, how in zip(results, by, strict=True):
            result.details.update(how)
        return results

    def image_prior(self, shape: tuple[int, int, int], device: torch.device | str) -> Prior:
        """Return the prior of these images, made once for each shape and device."""
        device = torch.device(device)
        if (shape, device) not in self._made:
            public = self.public
            if isinstance(public, (str, Path)):
                public = read_images([Path(public)], shape[0], size=shape[1:])[1]
            self._made[shape, device] = make_prior(
                self.prior, shape, device, public, **self.prior_options
            )
        return self._made[shape, device]

    def _prior(self, evidence: Evidence) -> Prior:
        return self.image_prior(evidence.terms.input_shape, evidence.replay.device)

    def _match_chain(
        self, evidence: Evidence, solution: LinearSolution, depth: int, clean: bool
    ) -> Match:
        """Match the first ``depth`` layers to what is known above; all of them under noise."""
        layers = evidence.chain.layers
        target: Target
        if clean or evidence.num_images > 1 or not evidence.defended:
            target = ChainTarget(evidence, solution, depth if clean else len(layers), clean)
        else:
            target = UpdateTarget(evidence, solution)
        start, batch = solution.image.clamp(0, 1), evidence.num_images
        prior = self._prior(evidence)
        if clean and not evidence.defended and shared_rows.covers(evidence, prior, depth):
            found = shared_rows.match_batch(evidence, solution, prior, self.precision)
        else:
            found = match(target, prior, start, batch, self.steps, self.precision)
        first = evidence.chain.layers[evidence.chain.lead]
        if clean and depth == evidence.chain.lead + 1 and isinstance(first, Affine):
            # One linear system: fit what it determines to the last digit.
            z, e = solution.values[depth], solution.cotangents[depth]
            gradient = evidence.gradient[first.weight_name]
            noise, errors = solution.noise_below(depth), evidence.errors.get(first.weight_name)
            deviations = row_deviations(z, solution.deviations[depth], gradient, noise, errors)
            lead = evidence.chain.lead
            x = evidence.chain.features(found.images.flatten(0, 1), lead)[-1]
            x, _ = solve_layer(first, z, e, gradient, deviations, x)
            for above in reversed(evidence.chain.layers[:lead]):
                assert isinstance(above, Pointwise)
                x = above.inverse(x)
            found.images = x.reshape(found.images.shape)
        return found

    def _match_module(self, evidence: Evidence, why: str) -> list[Reconstruction]:
        """Match a model that is no chain, or batches, on the module itself."""
        prior, count, batch = self._prior(evidence), len(evidence), evidence.num_images
        # The reverse pass keeps the weights of every client and step.
        kept = evidence.steps * (evidence.terms.clients if evidence.simulated else 1)
        kept *= batch if evidence.replay.clip else 1
        parameters = kept * sum(p.numel() for p in evidence.replay.parameters.values())
        together = int(_PARAMETERS[evidence.replay.device.type] / max(parameters, 1))
        parts = torch.arange(count, device=evidence.replay.device).split(max(1, together))
        out = []
        for index in parts:
            part = evidence.subset(index)
            grey = prior.mean.expand(len(index), batch, *prior.shape)
            target = module_target(part)
            try:
                found = match(target, prior, grey, batch, self.steps, self.precision)
            except RuntimeError as error:  # torch names the operator
                if "not implemented" not in str(error):
                    raise
                raise UnsupportedModelError(
                    f"the model cannot be matched, which takes second derivatives: {error}"
                ) from error
            part = with_order(part, target, found)
            score = partial(target.misfit, precision=self.precision) if part.defended else part.fit
            images = torch.where(
                (score(found.images) <= score(grey)).reshape(-1, 1, 1, 1, 1), found.images, grey
            )
            about = {"layers": [], "why_not_linear": why}
            out += packaging.package(
                part, images, [{**_by(found, n), **about} for n in range(len(index))]
            )
        return out


def _labels_of(found: Reconstruction, evidence: Evidence) -> Tensor:
    return found.labels[None].to(evidence.labels.device)


def _by(found: Match, n: int) -> dict[str, str]:
    return {"by": "matching", "solver": found.solver, "prior": found.priors[n]}
