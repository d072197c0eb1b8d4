"""Several rounds in one estimate: against single rounds, and against the prediction."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedleak.attacks import Reconstruction, make_attack
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.rounds import _alike, together
from fedleak.attacks.targets.base import ModuleTarget
from fedleak.attacks.targets.rounds import RoundsTarget
from fedleak.client.compute import gradient
from fedleak.data import load_data
from fedleak.defences import defend, parse_defence
from fedleak.errors import InvalidInputError
from fedleak.models import build_model
from fedleak.observation import Observation
from fedleak.quality import score_batch
from fedleak.solvers.box import into_box
from fedleak.wording import more_rounds_words

DIGITS, _ = load_data("digits")


def observed(
    batches: list[list[int]], defence: str = "none", informed: bool = True, model: str = "cnn2-v2"
) -> list[Observation]:
    """Return what a server sees of a client round by round; the others' images move the model."""
    net, spec = build_model(model, DIGITS.shape, DIGITS.classes, seed=0), parse_defence(defence)
    out = []
    for n, batch in enumerate(batches):
        sent = copy.deepcopy(net)
        clean, _ = gradient(sent, *DIGITS.batch(batch), None)
        seen = Observation.from_gradient(
            sent, defend(clean, spec, n), DIGITS.shape, len(batch),
            defence=spec if informed and spec.parts else None,
        )  # fmt: skip
        out.append(replace(seen, place=(n,)))
        others, _ = gradient(net, *DIGITS.batch(list(range(100 + 8 * n, 108 + 8 * n))), None)
        with torch.no_grad():
            for name, p in net.named_parameters():
                p -= 0.5 * others[name]
    return out


def psnr(made: Reconstruction, batch: list[int]) -> list[float]:
    scored = score_batch(made.images, made.labels, *DIGITS.batch(batch))
    return [s.quality.psnr_db for s in scored if s.quality is not None]


def test_residuals_of_rounds_stand_one_below_the_other() -> None:
    seen = observed([[0, 1], [2, 0]])
    parts = [ModuleTarget(Evidence.gather([o], "cpu", infer=False)) for o in seen]
    target = RoundsTarget(parts, [(0, 1), (2, 0)])
    images = torch.rand(1, 3, 1, 8, 8, dtype=torch.float64)
    expected = [parts[0].made(images[:, [0, 1]]), parts[1].made(images[:, [2, 0]])]
    assert torch.equal(target.made(images), torch.cat(expected, 1))
    assert target.values.shape == target.errors.shape == target.made(images).shape


@pytest.mark.parametrize("informed", [True, False])
def test_noise_averages_out_over_rounds(informed: bool) -> None:
    seen = observed([[3]] * 5, "noise:0.2", informed)
    attack = make_attack("hybrid")
    alone = [attack([o])[0] for o in seen]
    made = together(attack, seen, alone)
    single = sorted(psnr(a, [3])[0] for a in alone)[len(alone) // 2]
    # Five rounds of independent noise are 7 dB by theory, less what the prior knew before.
    assert psnr(made, [3])[0] > single + 4
    assert made.labels.tolist() == [3]
    assert not made.doubts
    assert made.details["rounds"] == 5
    assert max(made.details["misfit"]) < 1.2


def test_pruned_entries_differ_from_round_to_round() -> None:
    seen = observed([[1]] * 4, "prune:0.9")
    attack = make_attack("hybrid")
    alone = [attack([o])[0] for o in seen]
    made = together(attack, seen, alone)
    assert max(psnr(a, [1])[0] for a in alone) < 40 < 60 < psnr(made, [1])[0]


def test_a_batch_that_one_round_leaves_open_is_exact_in_three() -> None:
    batch = list(range(8))
    seen = observed([batch] * 3)
    attack = make_attack("hybrid")
    alone = [attack([o])[0] for o in seen]
    made = together(attack, seen, alone)
    assert max(min(psnr(a, batch)) for a in alone) < 50 < min(psnr(made, batch))


@pytest.mark.parametrize(
    ("name", "options"),
    [("linear", {}), pytest.param("cosine", {"steps": 300}, marks=pytest.mark.slow)],
)
def test_other_attacks_take_rounds_together(name: str, options: dict[str, int]) -> None:
    seen = observed([[0]] * 3, "noise:0.2")
    attack = make_attack(name, **options)
    alone = [attack([o])[0] for o in seen]
    made = together(attack, seen, alone)
    single = sorted(psnr(a, [0])[0] for a in alone)[1]
    assert psnr(made, [0])[0] > single + 2


def test_rounds_of_other_images_are_not_merged_silently() -> None:
    seen = observed([[0], [0], [10]], "noise:0.1")
    made = together(make_attack("hybrid"), seen)
    assert made.status == "doubtful"
    assert "not explained by the same images" in made.doubts[0]
    assert max(made.details["misfit"]) > 2
    with pytest.raises(InvalidInputError, match="one number and shape"):
        together(make_attack("hybrid"), observed([[0], [0, 1]]))


def test_what_is_exact_alone_stays_exact() -> None:
    seen = observed([[5]] * 3, model="cnn2-v1")
    attack = make_attack("hybrid")
    alone = [attack([o])[0] for o in seen]
    made = together(attack, seen, alone)
    best = max(psnr(a, [5])[0] for a in alone)
    assert psnr(made, [5])[0] == best or math.isinf(best) or psnr(made, [5])[0] > 120


def test_what_one_more_round_buys_is_said() -> None:
    table = pd.DataFrame({"client": 0, "image": [0, 0, 0, 1], "round": [1, 2, 3, 1],
                          "predicted_psnr_db": [20.0, 20.0, 20.0, 30.0],
                          "predicted_together_db": [math.nan, 23.0, 24.5, math.nan]})  # fmt: skip
    said = more_rounds_words(table, 7.25)
    assert said.startswith("predicted for the same images again: 20.0 dB after one round, 24.5 dB")
    assert "after 3, the last of which bought +1.5 dB; epsilon of differential" in said
    assert said.endswith("is 7.25 then")
    assert more_rounds_words(table[table["image"] == 1]) == ""
    assert more_rounds_words(table.drop(columns="predicted_together_db")) == ""


@given(seed=st.integers(0, 10**6), size=st.integers(1, 6))
@example(seed=606, size=5)  # the solver's -3e-18
def test_the_nearest_point_of_the_box_has_no_nearer_one(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64).triu()
    root.diagonal().add_(3 * root.diagonal().sign() + (root.diagonal() == 0))
    point = torch.randn(2, size, generator=generator, dtype=torch.float64)
    found = into_box(point, root)
    assert bool(((found >= 0) & (found <= 1)).all())
    others = torch.rand(200, 1, size, generator=generator, dtype=torch.float64)
    far = ((others - point) @ root.mT).square().sum(2)
    assert bool((((found - point) @ root.mT).square().sum(1) <= far + 1e-9).all())
    inside = torch.rand(size, generator=generator, dtype=torch.float64)
    assert torch.equal(into_box(inside, root), inside)


def test_what_rounds_leave_unexplained_alike_is_no_noise() -> None:
    """A client that does another thing than was declared does it in every round."""
    draw = torch.Generator().manual_seed(0)
    noise = [torch.randn(2000, generator=draw, dtype=torch.float64) for _ in range(4)]
    assert not _alike(noise)
    assert _alike([noise[0] + 0.5 * n for n in noise[1:]])
    assert not _alike([n * 0 for n in noise])
    assert not _alike(noise[:1])
