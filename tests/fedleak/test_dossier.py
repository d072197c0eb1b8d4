"""What a server holds of a client: images of different rounds, associated and merged."""

from __future__ import annotations

import random

import pytest
import torch

from fedleak.attacks import Dossier, Reconstruction, make_attack
from fedleak.quality import decibels_between
from tests.fedleak.test_rounds import DIGITS, observed, psnr


def followed(
    batches: list[list[int]], defence: str = "none", informed: bool = True, model: str = "cnn2-v1"
) -> tuple[Dossier, list[Reconstruction], list[Reconstruction]]:
    """Return the dossier, and what each round gave alone and with those before."""
    attack = make_attack("hybrid")
    dossier, alone, together = Dossier(attack), [], []
    for n, seen in enumerate(observed(batches, defence, informed, model)):
        alone += attack([seen])
        together.append(dossier.add(n, seen, alone[-1]))
    return dossier, alone, together


def nearest(dossier: Dossier, images: list[int]) -> tuple[list[int], list[float]]:
    """Return which true image each of the gallery is nearest to, and its PSNR."""
    made = torch.stack([h.image for h in dossier.gallery])
    best, place = decibels_between(made, DIGITS.batch(images)[0]).max(1)
    return [images[p] for p in place.tolist()], best.tolist()


def test_a_gallery_of_distinct_images_from_batches_drawn_anew() -> None:
    draw, own = random.Random(0), list(range(12))
    batches = [draw.sample(own, 4) for _ in range(6)]
    dossier, *_ = followed(batches)
    who, best = nearest(dossier, own)
    used = {i for b in batches for i in b}
    assert sorted(who) == sorted(used)  # each once, none invented
    assert min(best) > 60
    for held, image in zip(dossier.gallery, who, strict=True):
        assert held.rounds == [n for n, b in enumerate(batches) if image in b]
        assert held.certainty_db > 60


def test_of_a_batch_that_is_read_in_part_the_proved_images_are_held() -> None:
    (seen,) = observed([[0, 1, 2, 3]])
    truth, labels = DIGITS.batch([0, 1, 2, 3])
    dossier = Dossier(make_attack("rows"))
    details = {"by": "rows", "certified": [True, False]}
    first = Reconstruction(truth[:2].double(), labels[:2], 0.5, details, seen.terms.threat)
    assert dossier.add(1, seen, first).details["memory"] == {"known": 0, "held": 1}
    details = {"by": "rows", "certified": [True, True, True]}
    both = Reconstruction(truth[:3].double(), labels[:3], 0.5, details, seen.terms.threat)
    assert dossier.add(2, seen, both).details["memory"] == {"known": 1, "held": 3}
    assert [h.rounds for h in dossier.gallery] == [[1, 2], [2], [2]]


@pytest.mark.slow
def test_batches_that_are_ambiguous_alone_are_not_beside_the_next() -> None:
    batch = list(range(20, 28))
    dossier, alone, together = followed([batch] * 3, model="cnn2-v2")
    assert max(min(psnr(a, batch)) for a in alone) < 50
    assert min(psnr(together[-1], batch)) > 60
    assert len(dossier.gallery) == len(batch)
    assert dossier.gallery[0].together >= 2  # the surer of two rounds and of three


@pytest.mark.slow
def test_noisy_rounds_of_two_images_are_told_apart_and_averaged() -> None:
    order = [0, 10, 0, 10, 0, 10]  # two zeros
    dossier, alone, together = followed([[i] for i in order], "noise:0.1")
    who, best = nearest(dossier, [0, 10])
    assert sorted(who) == [0, 10]
    single = [psnr(a, [i])[0] for a, i in zip(alone, order, strict=True)]
    for image, found in zip(who, best, strict=True):
        own = [p for p, i in zip(single, order, strict=True) if i == image]
        assert found > sorted(own)[1] + 2  # three rounds: 4.8 dB by theory
    for n, i in enumerate(order):  # never worse than alone
        assert psnr(together[n], [i])[0] >= single[n] - 0.5


@pytest.mark.slow
def test_a_pruned_round_waits_for_another() -> None:
    dossier, alone, together = followed([[1]] * 4, "prune:0.95", model="cnn2-v2")
    assert psnr(alone[0], [1])[0] < 25  # predicted: 28
    assert together[0].details["memory"]["held"] == 0
    _, best = nearest(dossier, [1])
    assert best[0] > 60
    assert len(dossier.gallery) == 1


def test_a_failed_tie_leaves_what_the_round_gave() -> None:
    _, alone, together = followed([[0], [1], [2]], "noise:0.1")
    for a, t in zip(alone, together, strict=True):
        assert torch.equal(a.images, t.images)
    assert together[-1].details["memory"] == {"known": 0, "held": 3}


@pytest.mark.parametrize("budget", [0, 10**9])
def test_memory_is_bounded(budget: int) -> None:
    attack = make_attack("hybrid")
    dossier = Dossier(attack, budget)
    for n, seen in enumerate(observed([[0]] * 2, "noise:0.1")):
        dossier.add(n, seen, attack([seen])[0])
    assert len(dossier._kept) == (2 if budget else 0)
    assert len(dossier.gallery) == 1
