"""What a server knows of one client after several rounds: a gallery of distinct images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedleak.attacks.base import Attack, Reconstruction
from fedleak.attacks.rounds import Round, certainty, solve
from fedleak.errors import FedleakError, UnsupportedModelError
from fedleak.observation import Observation
from fedleak.priors import Prior

#: Predicted PSNR in dB from which an image is one, and the fit that is asked for where none is
#: predicted.
CERTAIN_DB, CERTAIN_FIT = 20.0, 1e-3
#: The same of one round whose entries are dropped in part: other images keep these entries nearly
#: as well, far from the estimate that errors are taken around.
_ALONE_DB = 60.0
#: Fit of an update without noise up to which its images are taken for right, and for exact.
SETTLED, _ROUNDED = 3e-6, 1e-5
#: The same of several rounds at once, which wrong images hardly explain all.
_SETTLED_ALL = 5e-5
#: PSNR in dB between two reconstructions from which they are taken for one image.
SAME_DB = 35.0
#: How many times their joint error two images of one label may differ and not be told apart.
_WITHIN = 4.0
#: Images of the gallery that each new one is compared with, and groups that are solved for it.
_NEAREST, _TRIED = 3, 3
#: Images and rounds that are solved as one, at most.
_IMAGES, _ROUNDS = 16, 16
#: Bytes of the updates that a dossier keeps to solve them again.
BUDGET = 64 * 2**20


@dataclass(eq=False)
class Held:
    """One image of a client's gallery.

    Attributes
    ----------
    image : Tensor, float64, shape (C, H, W)
        The best estimate so far.
    label : int
    rounds : list of int
        In which it was seen.
    certainty_db : float
        PSNR that the attacker expects of it; NaN where the images are too many pixels for that.
    misfit : float
        How far it misses its last round, with the others of it: 1 is as its noise lets expect.
    certified : bool
        Whether the attack's own test proved it.
    together : int
        Rounds that this estimate is from.
    sure : bool
        Whether it is certain enough to be in the gallery; else it waits for other rounds.
    """

    image: Tensor = field(repr=False)
    label: int
    rounds: list[int]
    certainty_db: float = math.nan
    misfit: float = math.nan
    certified: bool = False
    together: int = 1
    sure: bool = False

    @property
    def known(self) -> bool:
        """Whether it may stand in for what another round gives: sure, or of several rounds."""
        return self.sure or self.together > 1


@dataclass(eq=False)
class _Kept:
    """A round that may be solved again, and which of the gallery was in it."""

    observation: Observation
    alone: Reconstruction
    members: list[Held]

    @property
    def bytes(self) -> int:
        tensors = [*self.observation.gradient.values(), *self.observation.model.parameters()]
        errors = [e for e in self.observation.errors.values() if e.stride() and any(e.stride())]
        return sum(t.numel() * t.element_size() for t in [*tensors, *errors])


class Dossier:
    """What the updates of one client told so far, each under the model that was sent then.

    What is not known is which images were in which round. A new reconstruction is taken for an
    image of the gallery only where that image explains the new update as well as the noise lets
    expect, by itself or after all rounds that it was in have been solved as one estimate.

    Parameters
    ----------
    attack : Attack
        What made each round's reconstruction, and is asked again for what known images leave.
    budget : int
        Bytes of updates that are kept to be solved again; of more the oldest is dropped. Rounds
        that are exact need not be kept.

    Attributes
    ----------
    held : list of Held
        Distinct images, in the order in which they were first seen; some may not be certain yet.
    """

    def __init__(self, attack: Attack, budget: int = BUDGET):
        self.attack, self.budget = attack, budget
        self.held: list[Held] = []
        self._kept: list[_Kept] = []

    @property
    def gallery(self) -> list[Held]:
        """The images that are certain enough."""
        return [h for h in self.held if h.sure]

    def add(
        self, server_round: int, observation: Observation, alone: Reconstruction
    ) -> Reconstruction:
        """Take a round; return what the server now makes of its images.

        Parameters
        ----------
        server_round : int
        observation : Observation
        alone : Reconstruction
            What the attack made of it.

        Returns
        -------
        Reconstruction
            ``alone``, with the images that other rounds tell better; ``details["memory"]`` says
            how many of them were known before.

        Raises
        ------
        UnsupportedModelError
            If the client takes several local steps: what one round tells is not exact enough to
            say whether another has the same images.
        """
        if observation.terms.steps > 1:
            raise UnsupportedModelError(
                "rounds are put together of clients that take one local step, not "
                f"{observation.terms.steps}"
            )
        if len(alone.images) < observation.num_images:  # of a model that was tampered with
            return self._part(server_round, alone)
        alone = self._without_known(observation, alone)
        one = Round.of(self.attack, alone, observation)
        prior = self.attack.image_prior(observation.input_shape, one.evidence.replay.device)
        images, members = self._substituted(one)
        if None in members and not _exact(one):
            images, members = self._solved(one, images, members, prior, observation)
        known = sum(m is not None for m in members)
        members = self._admitted(server_round, one, images, members, prior)
        for held in (m for m in members if m is not None):
            held.rounds.append(server_round)
            held.misfit = one.misfit(images)
        if not _exact(one) and all(m is not None for m in members):
            self._keep(_Kept(observation, alone, [m for m in members if m is not None]))
            self._refined(one, members, images, prior)
        better = [m if m is not None and m.known and not _exact(one) else None for m in members]
        shown = [i if m is None else m.image for i, m in zip(images, better, strict=True)]
        details = {**alone.details, "memory": {"known": known, "held": len(self.gallery)}}
        made = torch.stack(shown)
        fit = float(one.evidence.fit(made[None].to(one.evidence.labels.device))[0])
        return replace(alone, images=made, fit=fit, details=details)

    def _part(self, server_round: int, alone: Reconstruction) -> Reconstruction:
        """Take from some images of a batch those that are proved: the others explain nothing."""
        taken: list[Held | None] = []
        known = 0
        for image, label, proof in zip(
            alone.images, alone.labels.tolist(), alone.certified, strict=False
        ):
            if proof:
                held = self._twin(image, label, math.nan, taken)
                known += held is not None
                if held is None:
                    held = Held(image.clone(), label, [], certified=True, sure=True)
                    self.held.append(held)
                elif not held.sure:
                    held.image, held.certified, held.sure = image.clone(), True, True
                    held.certainty_db, held.together = math.nan, 1
                held.rounds.append(server_round)
                taken.append(held)
        memory = {"known": known, "held": len(self.gallery)}
        return replace(alone, details={**alone.details, "memory": memory})

    def _near(self, image: Tensor, label: int) -> list[Held]:
        same = [h for h in self.held if h.label == label]
        return sorted(same, key=lambda h: _mse(h.image, image))[:_NEAREST]

    def _substituted(self, one: Round) -> tuple[Tensor, list[Held | None]]:
        """Put images of the gallery into a round's, one by one, where they explain it as well."""
        images = one.alone.images.clone()
        members: list[Held | None] = [None] * len(images)
        pairs = [
            (_mse(h.image, image), n, h)
            for n, (image, label) in enumerate(zip(images, one.alone.labels.tolist(), strict=True))
            for h in self._near(image, label)
        ]
        for _, n, held in sorted(pairs, key=lambda p: p[:2]):
            if not held.known or members[n] is not None or any(m is held for m in members):
                continue
            trial = images.clone()
            trial[n] = held.image
            if one.explained_by(trial, _exact(one)):
                members[n] = held
                if not _exact(one):
                    images = trial
        return images, members

    def _solved(
        self,
        one: Round,
        images: Tensor,
        members: list[Held | None],
        prior: Prior,
        observation: Observation,
    ) -> tuple[Tensor, list[Held | None]]:
        """Solve a round with those kept, as if some of its images were in them, too."""
        for group in self._groups(one, images, members):
            tied = list(group)
            kept = [k for k in self._kept if any(m is t for m in k.members for t in tied)]
            found = self._bundle(kept[-_ROUNDS + 1 :], one, tied, images, prior)
            if found is not None:
                return found, tied
        return images, members

    def _groups(
        self, one: Round, images: Tensor, members: list[Held | None]
    ) -> Iterable[list[Held | None]]:
        """Yield who the images may be: a whole round again, or the nearest ones."""
        labels = one.alone.labels.tolist()
        whole: list[tuple[float, list[Held | None]]] = []
        seen: set[tuple[int, ...]] = set()
        for kept in reversed(self._kept):
            key = tuple(sorted(map(id, kept.members)))
            if len(kept.members) == len(images) and key not in seen:
                seen.add(key)
                order = _assigned(images, labels, kept.members)
                if order is not None:
                    far = sum(_mse(i, h.image) for i, h in zip(images, order, strict=True))
                    whole.append((far, list(order)))
        for _, group in sorted(whole, key=lambda w: w[0])[:_TRIED]:
            yield group
        if len(images) > 1:
            near = list(members)
            for n, image in enumerate(images):
                for held in self._near(image, labels[n]) if near[n] is None else ():
                    if not any(m is held for m in near) and _mse(held.image, image) < 0.02:
                        near[n] = held
                        break
            if any(a is not b for a, b in zip(near, members, strict=True)):
                yield near

    def _bundle(
        self,
        kept: Sequence[_Kept],
        one: Round,
        members: Sequence[Held | None],
        images: Tensor,
        prior: Prior,
    ) -> Tensor | None:
        """Solve rounds as one; update the gallery and return the images of ``one``, or None.

        None where not every round is explained by what is found.
        """
        rounds = [Round.of(self.attack, k.alone, k.observation) for k in kept]
        unknown = list({id(h): h for k in kept for h in k.members}.values())
        unknown += [h for h in members if h is not None and not any(h is u for u in unknown)]
        free = [n for n, m in enumerate(members) if m is None]
        if not rounds or len(unknown) + len(free) > _IMAGES:
            return None
        place = {id(h): n for n, h in enumerate(unknown)}
        start = torch.stack([h.image for h in unknown] + [images[n] for n in free])
        own = [
            len(unknown) + free.index(n) if m is None else place[id(m)]
            for n, m in enumerate(members)
        ]
        who = [[place[id(h)] for h in k.members] for k in kept] + [own]
        rounds = [
            r.with_labels(torch.tensor([h.label for h in k.members]))
            for r, k in zip(rounds, kept, strict=True)
        ]
        last = torch.tensor(
            [int(one.alone.labels[n]) if m is None else m.label for n, m in enumerate(members)]
        )
        rounds.append(one.with_labels(last))
        start = start.clamp(0, 1).to(rounds[0].evidence.replay.device)
        match = solve(rounds, prior, who, start, near=len(start) > 1)
        if match is None:
            return None
        found = match.images[0].cpu()
        if not all(r.explained_by(found[m]) for r, m in zip(rounds, who, strict=True)):
            return None
        expected = certainty(rounds, who, found, prior)
        pairs = zip(rounds, who, strict=True)
        settled = all(_settled(r, found[m], _SETTLED_ALL) for r, m in pairs)
        for held, image, decibels in zip(unknown, found, expected, strict=False):
            sure = settled and decibels >= CERTAIN_DB
            if (sure, decibels) > (held.sure, held.certainty_db) or math.isnan(held.certainty_db):
                held.image, held.certainty_db, held.together = image, decibels, len(rounds)
                held.sure = held.sure or sure
        return found[own]

    def _refined(
        self, one: Round, members: Sequence[Held | None], images: Tensor, prior: Prior
    ) -> None:
        """Solve a round whose images were all known again with the others that have them."""
        kept = [k for k in self._kept[:-1] if any(m is h for m in k.members for h in members)]
        if kept and all(m is not None and m.together <= len(kept) for m in members):
            self._bundle(kept[-_ROUNDS + 1 :], one, members, images, prior)

    def _admitted(
        self,
        server_round: int,
        one: Round,
        images: Tensor,
        members: list[Held | None],
        prior: Prior,
    ) -> list[Held | None]:
        """Take new images of a round that is explained, the certain ones into the gallery."""
        new = [n for n, m in enumerate(members) if m is None]
        if not new or not one.explained_by(images):
            return members
        proved = one.alone.certified
        expected = certainty([one], [range(len(images))], images, prior)
        for n in new:
            label, decibels = int(one.alone.labels[n]), expected[n]
            proof = n < len(proved) and proved[n]
            sure = proof or _certain(one, images, n, decibels)
            twin = self._twin(images[n], label, decibels, members)
            if twin is None:
                twin = Held(images[n].clone(), label, [], decibels, certified=proof, sure=sure)
                self.held.append(twin)
            elif sure >= twin.sure and decibels > twin.certainty_db:
                twin.image, twin.certainty_db, twin.together = images[n].clone(), decibels, 1
                twin.sure = sure
            members[n] = twin
        return members

    def _twin(
        self, image: Tensor, label: int, decibels: float, taken: Sequence[Held | None]
    ) -> Held | None:
        """Return what cannot be told apart from an image, at the certainty of both."""
        for held in self._near(image, label):
            errors = sum(10 ** (-d / 10) for d in (decibels, held.certainty_db) if d == d)
            limit = max(_WITHIN * errors, 10 ** (-SAME_DB / 10))
            if _mse(held.image, image) <= limit and not any(t is held for t in taken):
                return held
        return None

    def _keep(self, kept: _Kept) -> None:
        self._kept.append(kept)
        while self._kept and sum(k.bytes for k in self._kept) > self.budget:
            self._kept.pop(0)

    def _without_known(self, observation: Observation, alone: Reconstruction) -> Reconstruction:
        """Look for images of the gallery in an update that its own reconstruction misses.

        What they add to a mean gradient is subtracted, and the rest is attacked as an update of
        fewer images.
        """
        terms, count = observation.terms, observation.num_images
        plain = terms.shared == "gradient" and terms.defence is None and terms.clients == 1
        if not plain or count == 1 or alone.fit <= SETTLED or not self.gallery:
            return alone
        one = Round.of(self.attack, alone, observation)
        found = _present(one, self.gallery, count)
        if not found or len(found) == count:
            return alone
        known = torch.stack([h.image for h in found])
        labels = torch.tensor([h.label for h in found])
        rest = one.evidence.with_images(len(found)).with_labels(labels[None])
        part = rest.replay(known[None], labels[None]).gradients
        left = {
            k: (count * g - len(found) * part[k][0].detach().cpu()) / (count - len(found))
            for k, g in observation.gradient.items()
        }
        own = None
        if terms.labels is not None:
            own = list(terms.labels)
            for h in found:
                if h.label in own:
                    own.remove(h.label)
            if len(own) != count - len(found):
                return alone
        smaller = replace(
            observation.with_terms(
                num_images=count - len(found), labels=None if own is None else tuple(own)
            ),
            gradient=left,
        )
        try:
            (made,) = self.attack([smaller])
        except FedleakError:
            return alone
        images = torch.cat([known, made.images])
        labels = torch.cat([labels, made.labels])
        whole = one.evidence.with_labels(labels[None].to(one.evidence.labels.device))
        fit = float(whole.fit(images[None].to(one.evidence.labels.device))[0])
        if not fit < alone.fit:
            return alone
        details = {"by": "memory", "subtracted": len(found)}
        return replace(alone, images=images, labels=labels, fit=fit, details=details)


def _present(one: Round, gallery: Sequence[Held], count: int) -> list[Held]:
    """Return which known images are in an update: each adds its gradient, divided by the count."""
    device = one.evidence.labels.device
    rows = []
    for held in gallery:
        single = one.evidence.replay(
            held.image[None, None].to(device), torch.tensor([[held.label]], device=device)
        )
        rows.append(torch.cat([single.gradients[k][0].flatten() for k in one.evidence.gradient]))
    made = torch.stack(rows).detach()
    seen = torch.cat([g[0].flatten() for g in one.evidence.gradient.values()])
    shares = torch.linalg.lstsq(made.T, seen).solution * count
    order = (shares - 1).abs().argsort().tolist()
    return [gallery[n] for n in order if abs(float(shares[n]) - 1) < 0.2][: count - 1]


def _exact(one: Round) -> bool:
    """Whether a round is explained to rounding: it tells no more with others."""
    return not one.evidence.defended and one.alone.fit <= _ROUNDED and one.determined


def _certain(one: Round, images: Tensor, place: int, decibels: float) -> bool:
    """Whether a new image of a round is certain enough, by all that its attack says of it."""
    if not _settled(one, images):
        return False
    if math.isnan(decibels):
        return not one.evidence.defended and one.alone.fit <= CERTAIN_FIT
    # How well images of a batch are told apart is not in the covariance around them.
    trusted = one.alone.details.get("head", {}).get("trusted")
    dropped = any(not bool(told.all()) for told in one.evidence.told.values())
    least = _ALONE_DB if dropped else CERTAIN_DB
    return decibels >= least and (trusted is None or bool(trusted[place]))


def _settled(one: Round, images: Tensor, limit: float = SETTLED) -> bool:
    """Whether images leave no more of an update than its noise, as far as that is known.

    Images of a batch that are wrong together may explain it well, but not to rounding.
    """
    if one.evidence.defended:
        return one.explained_by(images)
    fit = float(one.evidence.fit(images[None].to(one.evidence.labels.device))[0])
    return fit <= max(limit, 3 * float(one.alone.details.get("noise", 0.0)))


def _mse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean())


def _assigned(images: Tensor, labels: Sequence[int], members: Sequence[Held]) -> list[Held] | None:
    """Return members in the order of images with nearly their labels; None where these differ."""
    wrong = len(labels) - sum(
        min(labels.count(y), [m.label for m in members].count(y)) for y in set(labels)
    )
    if wrong > len(labels) // 4:
        return None
    cost = [
        [_mse(i, h.image) + (h.label != y) for h in members]
        for i, y in zip(images, labels, strict=True)
    ]
    _, columns = linear_sum_assignment(cost)
    return [members[c] for c in columns]
