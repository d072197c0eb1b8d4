"""The report: words, escaping, and folders that are incomplete, old, damaged or hostile."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from fedleak.commands.app import app
from fedleak.errors import FedleakError, InvalidInputError
from fedleak.report.numbers import GRADES, figures, ranges
from fedleak.report.page import NAME, render, write_report
from fedleak.report.pictures import COLUMNS, ROUNDS, gallery, spread, to_uri
from fedleak.report.sources import Arm, read_source
from fedleak.report.toml import to_toml
from fedleak.report.words import decibels, headline, percent
from fedleak.results import pictures
from fedleak.results.format import LEAKAGE
from fedleak.results.pictures import read_round
from fedleak.results.reading import try_table
from fedleak.wording import defence_words

EVIL = '"><img src=x onerror=alert(1)><script>alert(1)</script>'
LEAK = (
    "round", "client", "image", "attack", "defence", "strength", "psnr_db", "predicted_psnr_db",
    "ssim", "label_true", "label_inferred", "status", "reason",
)  # fmt: skip


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    import csv

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def leaks(psnr: Sequence[float | str], defence: str = "none", strength: float = 0.0) -> list[Any]:
    """Return rows of leakage.csv: two clients, a round for each pair."""
    return [
        (1 + n // 2, n % 2, n, "hybrid", defence, strength, p, p, 0.9, n % 3, n % 3,
         "failed" if p == "" else "ok", "refused" if p == "" else "")
        for n, p in enumerate(psnr)
    ]  # fmt: skip


def make_run(
    folder: Path,
    psnr: Sequence[float | str] = (150.0, 30.0, 15.0, 9.0, ""),
    defence: str = "none",
    strength: float = 0.0,
    **about: Any,
) -> Path:
    write_csv(folder / "leakage.csv", LEAK, leaks(psnr, defence, strength))
    rounds = [(1, 0.4, -3, 20.0, 2608), (2, 0.5, -3, 20.0, 2608), (3, 0.6, -3, "", 2608)]
    columns = ("round", "accuracy", "c_metric", "predicted_psnr_db", "bytes_sent")
    write_csv(folder / "rounds.csv", columns, rounds)
    layers = ("round", "name", "kind", "unknowns", "rank", "deficiency", "weight", "exact")
    write_csv(folder / "metric.csv", layers, [(1, "conv1", "conv2d", 64, 61, 3, 1.0, True)])
    scenario = {
        "name": "small", "seed": 3, "data": {"name": "digits"}, "model": {"name": "cnn2-v2"},
        "defence": {"name": defence, "strength": strength},
        "threat": {"view": "client", "defence": True, "labels": False, "tamper": False},
    }  # fmt: skip
    found = {
        "status": "finished", "simulated": True, "seed": 3, "arms": [], "commit": "abc123" * 7,
        "scenario": scenario, "versions": {"torch": "2.5"}, "engine": "inline", **about,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


def make_pictures(folder: Path, number: int = 1, count: int = 2, side: int = 8) -> None:
    made = np.random.default_rng(number).random((count, 1, side, side))
    (folder / "reconstructions").mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "reconstructions" / f"round-{number:04d}.npz", client=np.arange(count),
        image=np.arange(count), truth=made, reconstruction=made * 0.9,
        psnr_db=np.linspace(10, 20 + number, count),
    )  # fmt: skip


def make_arms(folder: Path) -> Path:
    make_run(folder, arms=["none", "noise-0.3"])
    for name, psnr in (("none", (150.0, 140.0)), ("noise", (25.0, 18.0))):
        arm = folder / ("none" if name == "none" else "noise-0.3")
        make_run(arm, psnr, name, 0.0 if name == "none" else 0.3)
        make_pictures(arm)
    return folder


class Text(HTMLParser):
    """The words of a page, its tags and their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._skip = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skip = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._skip = False

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.words += data.replace("\xa0", " ")


def report(folder: Path) -> Text:
    path, _ = write_report(folder)
    return checked(path.read_text(encoding="utf-8"))


def checked(page: str) -> Text:
    """Return a page that loads nothing, and runs nothing but its own script."""
    text = Text(page)
    names = [tag for tag, _ in text.tags]
    assert names.count("script") == 1
    for tag, attributes in text.tags:
        assert not [a for a in attributes if a.startswith("on") or a == "style"], (tag, attributes)
        if tag in ("img", "script", "link", "iframe", "use"):
            for key in ("src", "href"):
                value = attributes.get(key)
                assert value is None or value.startswith(("data:image/png;base64,", "#"))
    assert not {"link", "iframe", "object", "form", "a"} & set(names)
    (policy,) = [a["content"] for t, a in text.tags if "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert "no proof of safety" in text.words
    return text


def test_a_run_of_one_arm_in_plain_words(tmp_path: Path) -> None:
    make_pictures(make_run(tmp_path / "run"))
    text = report(tmp_path / "run")
    for words in (
        "Without a defence, the server recovered 2 of 5 attacked images well enough to be",
        "1 of them nobody can tell", "Simulated clients · one seed",
        "All 2 attacked clients", "sees the update of each client", "40 %",
        "fedleak evaluate noise-pruning", "fedleak audit --model cnn2-v2 --input-shape 1,8,8",
        "abc123", "torch 2.5", "refused", "61",
    ):  # fmt: skip
        assert words in text.words, words
    assert sum(tag == "img" for tag, _ in text.tags) == 8


def test_grades_and_ranges(tmp_path: Path) -> None:
    arm = read_source(make_run(tmp_path)).studies[0].arms[0]
    found = figures(arm)
    assert found.grades == (1, 1, 1, 1, 1)
    assert len(GRADES) == 5
    assert found.recovered == 2
    assert found.recognisable == pytest.approx(0.4)
    assert found.rounds == (1, 2, 3)
    assert found.accuracy == pytest.approx(0.6)
    assert [c.client for c in found.exposed] == ["0", "1"]
    assert ranges([1, 2, 3, 7]) == "1–3, 7"
    assert ranges(list(range(1, 40, 2))).endswith("…, 39")


@pytest.mark.parametrize(
    ("psnr", "words"),
    [
        ((60.0, 50.0), "all 2 attacked images so well that nobody can tell"),
        ((float("inf"), 50.0), "all 2 attacked images so well that nobody can tell"),
        ((25.0, 21.0), "all 2 attacked images well enough to be recognised."),
        ((15.0, 9.0), "blurred versions of 1 of 2 attacked images; none is recognisable"),
        ((9.0, 8.0), "little more than an average image"),
        (("", ""), "recovered none of 2 attacked images. With this attack: that is no proof"),
        ((), "no attack is on record"),
    ],
)
def test_headlines(tmp_path: Path, psnr: tuple[float, ...], words: str) -> None:
    arm = read_source(make_run(tmp_path, psnr)).studies[0].arms[0]
    assert words in headline(arm, figures(arm))
    report(tmp_path)


def test_defences_are_compared_and_costs_named(tmp_path: Path) -> None:
    text = report(make_arms(tmp_path))
    assert "One defence was tried, noise 0.3. It leaves 50 % of the images" in text.words
    assert "no less than without a defence" in text.words
    assert "What a defence costs" in text.words
    assert sum(tag == "tr" for tag, _ in text.tags) > 4


def test_an_uninformed_attacker_is_no_ground_to_choose_by(tmp_path: Path) -> None:
    make_arms(tmp_path)
    about = json.loads((tmp_path / "run.json").read_text())
    about["scenario"]["threat"]["defence"] = False
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert "this table is no ground to choose by" in report(tmp_path).words
    arm = read_source(make_run(tmp_path / "one", (12.0, 11.0), "noise", 0.5)).studies[0].arms[0]
    said = headline(arm, figures(arm), informed=False)
    assert said.startswith("Under noise 0.5, a server that does not know of it got little")


def test_what_the_metric_leaves_open_is_said(tmp_path: Path) -> None:
    make_run(tmp_path)
    rows = [(1, 0, 5, "noise", 0.5, 12.0, 25.0, "ok"), (1, 1, 6, "noise", 0.5, 11.0, 24.0, "ok")]
    columns = (*LEAK[:3], "defence", "strength", "psnr_db", "predicted_psnr_db", "status")
    write_csv(tmp_path / "leakage.csv", columns, rows)
    assert "The updates leave open 24.5 dB in the median" in report(tmp_path).words


def make_evaluation(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    from fedleak.results.format import EVALUATION, EVALUATION_ROUNDS

    base = {"scenario": "demo", "data": "digits", "model": "cnn2-v2", "images": 10, "status": "ok"}
    table = [[{**base, **row}.get(c, "") for c in EVALUATION.columns] for row in rows]
    write_csv(folder / "evaluation.csv", EVALUATION.columns, table)
    write_csv(folder / "rounds.csv", EVALUATION_ROUNDS.columns, [])
    about = {"simulated": True, "sweep": {"name": "mine", "seeds": [0, 1]}}
    (folder / "sweep.json").write_text(json.dumps(about))
    return folder


def cell(defence: str, strength: float, seed: int, accuracy: float, psnr: float) -> dict[str, Any]:
    return {
        "defence": defence, "strength": strength, "seed": seed, "accuracy": accuracy,
        "psnr_db_median_informed": psnr, "psnr_db_median_unaware": psnr - 10,
        "psnr_db_worst_informed": psnr + 5, "identified_informed": float(psnr > 20),
    }  # fmt: skip


def test_an_evaluation_of_which_only_the_tables_are_left(tmp_path: Path) -> None:
    rows = [
        cell(*arm, seed, accuracy + seed / 100, psnr)
        for arm, accuracy, psnr in ((("none", 0), 0.9, 140.0), (("prune", 0.7), 0.9, 130.0),
                                    (("noise", 3), 0.89, 12.0), (("prune", 0.99), 0.5, 9.0))
        for seed in (0, 1)
    ]  # fmt: skip
    text = report(make_evaluation(tmp_path, rows))
    assert "mean of 2 seeds" in text.words
    assert "recovered all 20 attacked images well enough to be recognised." in text.words
    assert "Of 3 defences tried, prune 0.99 leaves least" in text.words
    assert "at most 2 points of accuracy, noise 3 leaves least" in text.words
    assert "Beware of tests by an attacker who does not know the defence" in text.words


def test_failed_cells_only(tmp_path: Path) -> None:
    row = {"defence": "none", "strength": 0, "seed": 0, "status": "failed", "reason": "boom"}
    text = report(make_evaluation(tmp_path, [row]))
    assert "1 of 1 cells failed and are not counted (boom)" in text.words
    assert "no attack is on record" in text.words
    assert "has no rows" in report(make_evaluation(tmp_path, [])).words


def test_several_studies_have_headlines_of_their_own(tmp_path: Path) -> None:
    rows = [{**cell("none", 0, 0, 0.9, 140.0), "model": m} for m in ("cnn2-v1", "cnn2-v2")]
    text = report(make_evaluation(tmp_path, rows))
    assert sum(tag == "h1" for tag, _ in text.tags) == 1
    assert "demo, digits, cnn2-v2" in text.words
    ids = [a["id"] for _, a in text.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    name = f"{EVIL} $\\frac{{1}}$ ünïcödé 数据 \x00\x1b[31m ‮ " + "x" * 5000
    make_run(tmp_path, defence=name, status=EVIL, reason=f"{EVIL}\u202e", commit=EVIL, seed=EVIL,
             versions={EVIL: EVIL, "more": [1, {"a": EVIL}]})  # fmt: skip
    about = json.loads((tmp_path / "run.json").read_text())
    about["scenario"] |= {"name": EVIL, "model": {"name": EVIL}, EVIL: {EVIL: EVIL}}
    about["scenario"]["data"]["name"] = EVIL
    (tmp_path / "run.json").write_text(json.dumps(about))
    write_csv(tmp_path / "leakage.csv", LEAK, [
        (1, EVIL, n, EVIL, name, EVIL, 30.0, 31.0, 0.9, 1, 1, "ok", EVIL) for n in range(3)
    ] + [(2, EVIL, 1, EVIL, name, EVIL, "", "", "", "", "", "failed", EVIL)])  # fmt: skip
    write_csv(tmp_path / "metric.csv", (*LEAK[:1], "name", "kind", "unknowns", "rank"),
              [(1, EVIL, EVIL, 4, 4)])  # fmt: skip
    make_pictures(tmp_path)
    text = report(tmp_path)
    assert EVIL in text.words
    assert "\u202e" not in text.words
    assert sum(tag == "img" and a.get("src") == "x" for tag, a in text.tags) == 0


def test_nothing_finite_is_no_crash(tmp_path: Path) -> None:
    make_run(tmp_path, ("nan", "inf", "-inf", "1e999", "text", 12.5))
    write_csv(tmp_path / "rounds.csv", ("round", "accuracy", "c_metric", "bytes_sent"),
              [("inf", "nan", "inf", "-inf"), (2, "inf", "", "text")])  # fmt: skip
    text = report(tmp_path)
    assert not re.search(r"\bnan\b|Infinity", text.words)
    assert decibels(math.inf) == "exact"
    assert decibels(math.nan) == "–"
    assert percent(0.999) == ">\xa099\xa0%"


@pytest.mark.parametrize("keep", [("run.json",), ("leakage.csv",), ("run.json", "rounds.csv"),
                                  ("run.json", "leakage.csv")])  # fmt: skip
def test_incomplete_folders_say_what_is_missing(tmp_path: Path, keep: tuple[str, ...]) -> None:
    make_run(tmp_path, status="running")
    for path in list(tmp_path.iterdir()):
        if path.name not in keep:
            path.unlink()
    text = report(tmp_path)
    assert "is missing" in text.words
    if "run.json" in keep:
        assert "had not finished" in text.words
    if "leakage.csv" not in keep:
        assert "no attack is on record" in text.words


@pytest.mark.parametrize("content", ["", "round\n", "\x00\x00\xff", "a,b\n1,2,3,4\n1"])
def test_empty_and_broken_tables(tmp_path: Path, content: str) -> None:
    make_run(tmp_path)
    for name in ("leakage.csv", "rounds.csv", "metric.csv"):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    report(tmp_path)


def test_half_a_row_is_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, (30.0, 31.0))
    with (tmp_path / "leakage.csv").open("a") as file:
        file.write("2,1,7,hyb")
    text = report(tmp_path)
    assert "1 incomplete rows of leakage.csv were left out" in text.words
    assert "all 2 attacked images" in text.words


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    make_run(tmp_path, (30.0, 31.0))
    rows = [(1, 0, 5, "none", 0.0, 30.0, "ok"), (1, 1, 6, "none", 0.0, 31.0, "ok")]
    columns = ("round", "client", "image", "defence", "strength", "psnr_db", "status")
    write_csv(tmp_path / "leakage.csv", columns, rows)
    write_csv(tmp_path / "rounds.csv", ("round", "accuracy"), [(1, 0.5)])
    about = json.loads((tmp_path / "run.json").read_text())
    del about["scenario"]["threat"]
    (tmp_path / "run.json").write_text(json.dumps(about))
    text = report(tmp_path)
    assert "an earlier version wrote it" in text.words
    assert "does not say what the server was assumed to know" in text.words
    assert "all 2 attacked images" in text.words


def test_an_arm_that_did_not_run(tmp_path: Path) -> None:
    import shutil

    make_arms(tmp_path)
    shutil.rmtree(tmp_path / "noise-0.3")
    assert "No folder of: noise-0.3" in report(tmp_path).words
    shutil.rmtree(tmp_path / "none")  # only the common tables are left
    assert "2 of 5 attacked images" in report(tmp_path).words


def test_arms_lead_to_no_other_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "other", (90.0,))
    make_run(tmp_path / "run", (30.0,), arms=["../other", str(tmp_path / "other"), ".."])
    assert "all 1" not in (words := report(tmp_path / "run").words)
    assert "1 of 1 attacked image well enough" in words


@pytest.mark.parametrize("kind", ["truncated", "pickle", "no zip", "shapes", "fields", "bomb"])
def test_damaged_pictures_are_named(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(make_run(tmp_path))
    path = tmp_path / "reconstructions" / "round-0001.npz"
    with np.load(path) as stored:
        arrays = {k: stored[k] for k in stored.files}
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:400])
    elif kind == "no zip":
        path.write_bytes(b"\x93NUMPY nonsense")
    elif kind == "pickle":
        np.savez(path, **{**arrays, "truth": np.array([{"a": 1}] * 2, dtype=object)})
    elif kind == "shapes":
        np.savez(path, **{**arrays, "truth": np.zeros((2, 8))})
    elif kind == "fields":
        np.savez(path, client=arrays["client"])
    else:
        monkeypatch.setattr(pictures, "_BYTES", 1000)
    text = report(tmp_path)
    assert "round-0001.npz is damaged" in text.words
    assert not [tag for tag, _ in text.tags if tag == "img"]


def test_pixels_that_are_not_finite(tmp_path: Path) -> None:
    image = np.full((3, 8, 8), np.nan)
    image[0, 0, 0], image[1, 0, 0] = np.inf, -np.inf
    assert to_uri(image).startswith("data:image/png;base64,")
    assert len(to_uri(np.random.default_rng(0).random((3, 500, 300)))) < 60_000
    assert to_uri(np.zeros((1, 1, 400)))


def test_pictures_are_capped(tmp_path: Path) -> None:
    for number in range(1, 41):
        make_pictures(make_run(tmp_path) if number == 1 else tmp_path, number, count=9)
    found = gallery(read_source(tmp_path).studies[0].arms, [])
    assert found is not None
    assert len(found.panels) == ROUNDS
    assert {p.number for p in found.panels} >= {1, 40}
    assert found.start == 40
    assert all(len(p.names) == COLUMNS for p in found.panels)
    assert "24 of 40 attacked rounds" in found.left_out
    assert list(spread([1, 2, 3, 4, 5])) == [1, 5, 3, 2, 4]
    assert list(spread([7])) == [7]
    assert list(spread([])) == []
    assert "24 of 40 attacked rounds" in report(tmp_path).words
    small = gallery(read_source(tmp_path).studies[0].arms, [], budget=1000)
    assert small is not None
    assert len(small.panels) == 1
    assert 0 < len(small.panels[0].names) < COLUMNS


def test_many_defences_with_long_names(tmp_path: Path) -> None:
    rows = [cell(f"{'defence' * 9}{n}", n, 0, n / 20, 5.0 * n) for n in range(1, 20)]
    text = report(make_evaluation(tmp_path, rows))
    assert "Of 19 defences tried" in text.words


def test_an_audit_alone_and_beside_a_run(tmp_path: Path) -> None:
    audit = {"model": EVIL, "predicted_psnr_db": 31.2, "prior_db": 12.0, "defence": "noise:0.1",
             "attribution": {"layers": [{"name": "fc", "withheld_db": 4.1, "alone_db": None}, 7]},
             "advice": [{"what": EVIL, "predicted_psnr_db": 14.0, "reached": True, "cost": "x"}],
             "target_db": 15.0}  # fmt: skip
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(audit))
    text = report(tmp_path / "audit")
    assert "images in which people and objects can be recognised: 31.2 dB" in text.words
    assert "Layer fc tells most: without it 4.1 dB less" in text.words
    assert "To come under 15.0 dB" in text.words
    assert "What each layer tells" in report(make_run(tmp_path)).words
    (tmp_path / "audit" / "audit.json").write_text("{}")
    assert "gives no prediction" in report(tmp_path / "audit").words


def make_attack(
    folder: Path, fits: Sequence[float | str], defence: str = "", psnr: Sequence[Any] = ()
) -> Path:
    """Write an attack on a capture of clients with one image each; its truth is not known.

    A ``fit`` that is a text is a failure ("failed") or doubtful, and with "certified" proved.
    """
    from fedleak.results.format import ATTACKS

    rows = []
    for n, fit in enumerate(fits):
        status = fit if fit in ("failed", "doubtful") else "ok"
        reason = {"failed": "no step converged", "doubtful": "several steps"}.get(str(status), "")
        number = "" if status == "failed" else {"doubtful": 0.01, "certified": 0.9}.get(fit, fit)  # type: ignore[call-overload]
        score = psnr[n] if n < len(psnr) else ""
        true = "" if score == "" else 2
        certified = 1 if fit == "certified" else 0
        rows.append({
            "round": 1, "client": n + 70, "image": 0, "psnr_db": score, "label_true": true,
            "label_inferred": 2, "fit": number, "certified": certified, "defence": defence,
            "status": status, "reason": reason,
        })  # fmt: skip
    ATTACKS.write(folder, rows)
    (folder / "attack.json").write_text(json.dumps({"attack": "hybrid", "options": {}}))
    (folder.parent.parent / "manifest.json").write_text(json.dumps({"simulated": False}))
    return folder


@pytest.mark.parametrize(
    ("fits", "defence", "said", "not_said"),
    [
        ((1e-7, 2e-7, 4e-7), "", (
            "With hybrid, the server reconstructed all 3 attacked images, as far as can be told "
            "without the true ones: its pictures explain exactly what the clients sent.",
            "take these pictures for the clients' images",
            "in the median 2e-7 (best 1e-7, worst 4e-7", "All 3 attacked clients, with 1 image",
            "3 of 3 taken for recovered"), ("it is not known what it learned",)),
        ((0.9, 0.95), "", (
            "With hybrid, it is not known what the server learned of 2 images",
            "explain too little of the updates. That is no all-clear.",
            "It is not known for any of the 2 attacked clients.",
            "Whether 2 images resemble the true ones"), ("for the clients' images",)),
        ((1e-7, 0.9, "failed", "doubtful"), "", (
            "reconstructed 1 of 4 attacked images", "Of the other 3, it is not known",
            "At least 1 of 4 attacked clients, most of all client 70 (1). Of the others it is not "
            "known.", "1 image; the most frequent reason: no step converged",
            "1 image; most often: several steps", "1 or more of 4"), ()),
        ((0.05, 1e-7), "", ("explain almost all that the clients sent.",), ("exactly what",)),
        (("certified", "certified"), "", (
            "reconstructed all 2 attacked images", "2 images passed the attack's own proof"), ()),
        ((1e-7, 1e-7), "noise:0.3", (
            "it is not known what the server learned of 2 images",
            "the updates, defended by noise:0.3, do not prove the pictures",
        ), ("for the clients' images",)),
        ((1e-7, 1e-7), "clip:1.0", ("reconstructed all 2 attacked images",), ("not prove",)),
        (("doubtful",), "", ("the pictures that it made are doubtful. That is no all-clear",), ()),
    ],
)  # fmt: skip
def test_of_a_capture_without_truth_unknown_is_not_none(
    tmp_path: Path,
    fits: Sequence[Any],
    defence: str,
    said: Sequence[str],
    not_said: Sequence[str],
) -> None:
    folder = make_attack(tmp_path / "captures" / "attacks" / "hybrid-1", fits, defence)
    text = report(folder)
    for part in (*said, "There are no true images", "Real updates"):
        assert part in text.words, (part, text.words)
    never = ("no image was recognisable", "recognisable (at least 20 dB)", "0 % recognisable")
    for part in (*not_said, *never):
        assert part not in text.words, part
    (arm,) = read_source(folder).studies[0].arms
    assert math.isnan(figures(arm).recognisable)


def test_images_of_several_rounds_are_not_taken_for_as_many_images(tmp_path: Path) -> None:
    folder = make_attack(tmp_path / "captures" / "attacks" / "hybrid-1", (1e-7, 2e-7))
    several = "an image that a client uses in several counts in each"
    assert several not in report(folder).words
    table = pd.read_csv(folder / "attacks.csv")
    table["round"], table["client"] = [1, 2], 70
    table.to_csv(folder / "attacks.csv", index=False)
    assert (
        f"The one attacked client, with 2 images. Over 2 rounds: {several}" in report(folder).words
    )


def test_a_capture_of_which_nothing_came_says_so(tmp_path: Path) -> None:
    folder = make_attack(tmp_path / "captures" / "attacks" / "hybrid-1", ("failed", "failed"))
    text = report(folder)
    assert "recovered none of 2 attacked images. With this attack: that is no proof" in text.words
    assert "for the clients' images" not in text.words


def test_a_capture_whose_truth_is_known_in_part(tmp_path: Path) -> None:
    folder = make_attack(
        tmp_path / "captures" / "attacks" / "hybrid-1", (1e-7, 0.9, 1e-7, 0.8), "", (90.0, 8.0)
    )
    text = report(folder)
    for part in (
        "recovered 1 of 2 images that can be compared with the true ones well enough to be",
        "Of the others, it reconstructed 1 of 2 attacked images",
        "Of the other 1, it is not known", "1 at least",
    ):  # fmt: skip
        assert part in text.words, (part, text.words)


def test_the_attacks_on_one_capture_beside_each_other(tmp_path: Path) -> None:
    for name, fits in (("hybrid-1", (1e-7, 2e-7)), ("cosine-1", (0.9, 0.8))):
        make_attack(tmp_path / "captures" / "attacks" / name, fits)
    words = report(tmp_path / "captures").words
    assert "2 of 2 taken for recovered" in words
    assert "0 of 2 taken for recovered" not in words  # not known is not none
    assert "Real updates" in words


def test_refusals_name_the_folder_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is no folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match="holds no results of fedleak"):
        write_report(tmp_path)
    make_run(tmp_path / "runs" / "mine")
    with pytest.raises(InvalidInputError, match="these folders in it do: mine"):
        write_report(tmp_path / "runs")
    with pytest.raises(InvalidInputError, match="is a folder; name a file"):
        write_report(tmp_path / "runs" / "mine", tmp_path)
    (tmp_path / "audit.json").write_text("[1")
    with pytest.raises(FedleakError, match=r"audit\.json' cannot be read as JSON"):
        write_report(tmp_path)
    (tmp_path / "captures" / "attacks").mkdir(parents=True)
    with pytest.raises(FedleakError, match="has not been attacked"):
        write_report(tmp_path / "captures")


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '"text"', '{"arms": 3, "scenario": []}',
     '{"arms": [1], "scenario": {"threat": [], "defence": 2}}'],
)  # fmt: skip
def test_run_json_of_other_shapes(tmp_path: Path, content: str) -> None:
    make_run(tmp_path, (30.0,))
    (tmp_path / "run.json").write_text(content)
    report(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    out = tmp_path / "pages" / "one.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "recovered 2 of 5" in done.output
    assert out.is_file()
    assert not (tmp_path / "run" / NAME).exists()


def test_the_scenario_is_toml_again() -> None:
    table = {"name": 'a"b\\c\n', "seed": 3, "x": {"y z": [1, 2.5, True], "n": None, "e": {}},
             "compare": [{"name": "noise", "strength": 0.3}], "é": "数"}  # fmt: skip
    assert tomllib.loads(to_toml(table)) == {
        "name": 'a"b\\c\n', "seed": 3, "x": {"y z": [1, 2.5, True]},
        "compare": [{"name": "noise", "strength": 0.3}], "é": "数",
    }  # fmt: skip


def test_words_of_defences() -> None:
    assert defence_words("none", "0.0") == "no defence"
    assert defence_words("clip+noise", "1+0.10") == "clip 1 + noise 0.1"
    assert defence_words("dp", "clip=1,noise=1") == "dp clip=1,noise=1"
    assert "\u202e" not in Arm(label="a\u202eb").label


def test_tables_have_the_columns_asked_for(tmp_path: Path) -> None:
    notes: list[str] = []
    found = try_table(tmp_path, LEAKAGE, notes)
    assert list(found.columns) == list(LEAKAGE.columns)
    assert notes
    assert read_round(tmp_path / "round-0001.npz", notes) == {}


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    make_arms(tmp_path)
    pages = [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", render(read_source(tmp_path))[0])
             for _ in range(2)]  # fmt: skip
    assert pages[0] == pages[1]


@pytest.mark.slow
def test_the_report_needs_neither_flower_nor_ray() -> None:
    code = (
        "import sys, fedleak.report.page; "
        "assert not {'flwr', 'ray', 'simulations', 'strategies'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_files_on_the_page_repeat_run_and_sweep(tmp_path: Path) -> None:
    from simulations.evaluation.sweep import load_sweep
    from simulations.scenario import load_scenario

    scenario = load_scenario("demo", ["defence=clip:1+noise:0.1", "strategy.options.x=2"])
    (tmp_path / "scenario.toml").write_text(to_toml(scenario.model_dump(mode="json")))
    assert load_scenario(tmp_path / "scenario.toml") == scenario
    sweep = load_sweep("all-defences", ['strengths={"clip:1+noise"=[0.3,"1"]}'])
    (tmp_path / "sweep.toml").write_text(to_toml(sweep.model_dump(mode="json")))
    assert load_sweep(tmp_path / "sweep.toml") == sweep
