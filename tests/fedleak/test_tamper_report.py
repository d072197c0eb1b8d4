"""What a report says of a server that changes the model."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest

from fedleak.report.sources import Arm, Study
from fedleak.report.tampers import sentences, tamper_rows
from fedleak.results.format import TAMPERING
from fedleak.results.tampering import tamper_figures


def table(rows: list[tuple[int, int, str, int, int, int, int]]) -> pd.DataFrame:
    """Return rows of (round, client, tamper, images, recovered, certified, suspected)."""
    names = ["round", "client", "tamper", "images", "recovered", "certified", "suspected"]
    return pd.DataFrame(rows, columns=names).reindex(columns=[*TAMPERING.columns])


def test_what_is_summed_up() -> None:
    found = tamper_figures(
        table([
            (1, 0, "", 0, 0, 0, 1),  # a false alarm
            (1, 1, "peel", 8, 8, 6, 1),
            (2, 0, "peel", 8, 0, 0, 0),
            (2, 1, "", 0, 0, 0, 1),  # after a changed model: what it holds against is not honest
            (3, 2, "", 0, 0, 0, 0),
        ])
    )  # fmt: skip
    assert (found.sent, found.honest, found.batch) == (2, 2, 8)
    assert (found.recovered, found.certified, found.hit) == (8 / 16, 6 / 16, 1 / 2)
    assert (found.detected, found.false_alarms) == (1 / 2, 1 / 2)
    assert found.certified_wrong == 0


def test_nothing_is_known_where_nothing_was_attacked_or_looked_at() -> None:
    rows = table([(1, 0, "peel", 0, 0, 0, 0)]).assign(images=math.nan, suspected=math.nan)
    found = tamper_figures(rows)
    assert math.isnan(found.recovered)
    assert math.isnan(found.detected)
    assert math.isnan(found.false_alarms)
    assert tamper_figures(rows.iloc[:0]).sent == 0


def study(seen: int = 1, lost: float = 0.0) -> Study:
    """Return an honest arm, and one of a server that peels."""
    honest = Arm(rounds=pd.DataFrame({"round": [1, 2], "accuracy": [0.5, 0.9]}))
    honest.tampering = table([(n, 0, "", 8, 1, 0, 0) for n in (1, 2)])
    other = Arm(rounds=pd.DataFrame({"round": [1, 2], "accuracy": [0.5, 0.9 - lost]}))
    other.tamper = "peel"
    other.tampering = table([(n, 0, "peel", 8, 8, 8, seen) for n in (1, 2)])
    for arm in (honest, other):
        arm.rounds = arm.rounds.reindex(columns=["seed", "round", "accuracy", "c_metric",
                                                 "predicted_psnr_db", "bytes_sent"])  # fmt: skip
    return Study("one", [honest], {}, False, [other])


def test_the_words_are_those_of_the_numbers() -> None:
    rows = tamper_rows(study())
    assert [r.label for r in rows] == ["an honest server", "peel"]
    said = " ".join(sentences(rows))
    assert "(peel) gets 8 of 8 images of a client so exactly" in said
    assert "prove all of them right" in said
    assert "one that changes nothing gets 1 of 8 images" in said
    assert "suspected 2 of 2 models of this kind" in said
    assert "Of 2 honest models that arrived it suspected none." in said
    assert "becomes as good" in said
    assert [round(share, 3) for _, share, _ in rows[1].shown] == [1, 1, 0]


def test_what_it_costs_is_said() -> None:
    said = " ".join(sentences(tamper_rows(study(seen=0, lost=0.125))))
    assert "It costs the training 12.5 points of accuracy." in said
    assert "suspected 0 of 2 models of this kind" in said


def test_without_a_guard_it_is_not_known() -> None:
    given = study()
    for arm in (*given.arms, *given.tampered):
        arm.tampering["suspected"] = math.nan
    rows = tamper_rows(given)
    assert "none of them looked" in " ".join(sentences(rows))
    assert rows[1].shown[1][2] == "not looked for"


@pytest.mark.parametrize("name", ["strange:x=<script>", "peal"])
def test_a_strangers_tamper_is_named_and_not_loaded(name: str) -> None:
    given = study()
    given.tampered[0].tamper = name
    rows = tamper_rows(given)
    assert (rows[1].label, rows[1].plain) == (name, "")


def test_a_study_without_tampering_says_nothing() -> None:
    assert tamper_rows(replace(study(), tampered=[])) == []
    assert sentences([]) == []
