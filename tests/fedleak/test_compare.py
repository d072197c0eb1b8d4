"""``fedleak compare``: runs that are whole, old, interrupted or no runs at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from fedleak.commands.app import app
from fedleak.commands.compare import draw, summary
from fedleak.errors import InvalidInputError
from fedleak.results.runs import differences, read_runs

LEAKAGE = ("round", "client", "image", "psnr_db", "predicted_psnr_db", "label_true",
           "label_inferred", "status", "reason")  # fmt: skip


def make_run(
    folder: Path, defence: tuple[str, float] = ("none", 0.0), base: float = 30.0, **settings: Any
) -> Path:
    """Write a run of two rounds and two clients: round r leaks base + r and base + r + 4 dB."""
    folder.mkdir(parents=True)
    scenario = {
        "name": folder.name,
        "seed": 0,
        "federation": {"rounds": 2, "clients": 2},
        "defence": {"name": defence[0], "strength": defence[1]},
        **settings,
    }
    about = {"status": "finished", "arms": [], "scenario": scenario, "commit": "a" * 40}
    (folder / "run.json").write_text(json.dumps(about))
    rows = [
        (r, c, 10 * r + c, base + r + 4 * c, base + 3, 1, c, "ok", "")
        for r in (1, 2)
        for c in (0, 1)
    ]
    pd.DataFrame(rows, columns=list(LEAKAGE)).to_csv(folder / "leakage.csv", index=False)
    rounds = pd.DataFrame(
        {"round": [1, 2], "accuracy": [0.25, 0.75], "predicted_psnr_db": [base, base + 3]}
    )
    rounds.to_csv(folder / "rounds.csv", index=False)
    return folder


def change_about(folder: Path, **changes: Any) -> None:
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**about, **changes}))


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "a")])
    found = summary(run, {})
    assert found["first"] == {
        "round": 1, "psnr_db_median": 33.0, "psnr_db_worst": 35.0, "images": 2, "scored": 2,
        "exact": 0,
    }  # fmt: skip
    assert found["last"]["psnr_db_median"] == 34.0
    assert (found["labels_right"], found["accuracy"], found["predicted_psnr_db"]) == (0.5, 0.75, 33)
    assert not run.gaps


def test_only_what_differs_is_shown(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", training={"epochs": 1, "batch_size": 8})
    second = make_run(tmp_path / "b", ("noise", 0.1), seed=3, training={"epochs": 5})
    runs = read_runs([first, second])
    assert [r.defence for r in runs] == ["none", "noise-0.1"]
    assert differences(runs) == [
        {"seed": 0, "training.epochs": 1, "training.batch_size": 8},
        {"seed": 3, "training.epochs": 5, "training.batch_size": None},
    ]


def test_the_command(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "x" / "a"), make_run(tmp_path / "y" / "a", base=15, seed=7)]
    out = tmp_path / "out"
    words = [*map(str, folders), "--out", str(out)]
    done = CliRunner().invoke(app, ["compare", *words], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    for word in ("simulated", "x/a", "y/a", "33.0", "35.0", "seed", "compare.png"):
        assert word in done.stdout
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads(CliRunner().invoke(app, ["compare", *words, "--json"]).stdout)
    assert found["simulated"] is True
    assert [r["last"]["psnr_db_median"] for r in found["runs"]] == [34.0, 19.0]
    assert [r["differs"] for r in found["runs"]] == [{"seed": 0}, {"seed": 7}]


def test_strings_of_a_folder_are_shown_as_they_are(tmp_path: Path) -> None:
    evil = make_run(tmp_path / "[red]$a_{$", ("\x1b[31m[red]" + "x" * 200, 0.1), seed=3)
    words = ["compare", str(evil), str(make_run(tmp_path / "b")), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert done.stdout.count("[red]$a_{$") >= 2
    assert "\x1b" not in done.stdout
    assert (tmp_path / "out" / "compare.png").is_file()


def test_the_picture_has_a_line_for_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def catch(leakage: pd.DataFrame, rounds: pd.DataFrame, path: Path, **rest: Any) -> Path:
        drawn.update(rest, leakage=leakage, rounds=rounds)
        return path

    monkeypatch.setattr("fedleak.plots.leakage_vs_rounds", catch)
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", ("prune", 0.9))])
    draw(runs, tmp_path / "compare.png")
    assert set(drawn["leakage"]["run"]) == {"a, none", "b, prune-0.9"}
    assert len(drawn["rounds"]) == 4
    assert drawn["by"] == "run"
    assert "simulated" in drawn["title"]


def test_the_arms_of_one_run(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "a")
    make_run(whole / "none")
    make_run(whole / "noise-0.3", ("noise", 0.3))
    change_about(whole, arms=["none", "noise-0.3", "prune-0.9"])
    runs = read_runs([whole])
    assert [(r.name, r.defence) for r in runs] == [("a", "none"), ("a", "noise-0.3")]
    assert runs[0].gaps == ("a: not run yet: prune-0.9",)


def test_an_evaluation_is_a_run_for_each_defence(tmp_path: Path) -> None:
    out = tmp_path / "ev"
    for defence, seed in ((("none", 0.0), 0), (("noise", 0.1), 0), (("noise", 0.1), 1)):
        cell = out / "cells" / f"{defence[0]}_seed-{seed}"
        make_run(cell / "unaware", defence, base=10, seed=seed)
        if defence[1]:
            known = make_run(cell / "informed", defence, base=20, seed=seed)
            table = pd.read_csv(known / "leakage.csv").assign(predicted_psnr_db=math.nan)
            table.to_csv(known / "leakage.csv", index=False)
        (cell / "cell.json").write_text("{}")
    (out / "sweep.json").write_text("{}")
    undefended, noise = read_runs([out])
    assert (undefended.defence, noise.defence) == ("none", "noise-0.1")
    assert noise.settings["seeds"] == 2
    assert list(noise.leakage.groupby("round")["psnr_db"].median()) == [23.0, 24.0]  # informed
    assert set(noise.leakage["predicted_psnr_db"]) == {13.0}  # kept beside the unaware one
    assert len(noise.leakage) == 8


def test_exact_and_failed_images(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    table = pd.read_csv(folder / "leakage.csv").astype({"reason": object})
    table.loc[3, "psnr_db"] = math.inf
    table.loc[0, ["psnr_db", "status", "reason"]] = [math.nan, "failed", "no rank"]
    table.to_csv(folder / "leakage.csv", index=False)
    done = CliRunner().invoke(
        app, ["compare", str(folder), "--out", str(tmp_path / "o")], env={"COLUMNS": "100"}
    )
    assert "exact" in done.stdout
    assert "1 of 4 images were not reconstructed, most often: no rank" in done.stdout
    found = json.loads((tmp_path / "o" / "compare.json").read_text())["runs"][0]
    assert (found["last"]["psnr_db_worst"], found["last"]["exact"]) == (None, 1)


def test_an_interrupted_run_and_an_older_one(tmp_path: Path) -> None:
    killed = make_run(tmp_path / "killed")
    change_about(killed, status="running")
    with (killed / "leakage.csv").open("a") as file:
        file.write("3,0,7,50.0,50.0,1,1,ok,\n3,1")  # a round that is not over, half a line
    old = make_run(tmp_path / "old")
    for name in ("leakage.csv", "rounds.csv"):
        pd.read_csv(old / name).drop(columns="predicted_psnr_db").to_csv(old / name, index=False)
    first, second = read_runs([killed, old])
    assert first.leakage["round"].max() == 2
    assert first.gaps == ("killed, none: running, or killed; 2 of 2 rounds are finished",)
    assert second.gaps == ("old, none: no predicted_psnr_db (written by an earlier version)",)
    assert summary(second, {})["predicted_psnr_db"] is None


def test_a_run_without_a_finished_round(tmp_path: Path) -> None:
    empty = make_run(tmp_path / "a")
    for name in ("leakage.csv", "rounds.csv"):
        pd.read_csv(empty / name).iloc[:0].to_csv(empty / name, index=False)
    (run,) = read_runs([empty])
    assert run.gaps == ("a, none: no round is finished",)
    found = summary(run, {})
    assert (found["first"], found["accuracy"], found["rounds"]) == (None, None, 0)
    assert draw([run], tmp_path / "compare.png") is None
    done = CliRunner().invoke(app, ["compare", str(empty), "--out", str(tmp_path / "o")])
    assert done.exit_code == 0


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "run.json").unlink(), r"run.json' is missing: give a folder"),
        (lambda f: (f / "run.json").write_text("{"), r"run.json' cannot be read \(JSONDecode"),
        (lambda f: (f / "run.json").write_text("[]"), r"run.json' cannot be read \(TypeError"),
        (lambda f: (f / "rounds.csv").unlink(), r"rounds.csv' is missing; run the scenario again"),
        (lambda f: (f / "leakage.csv").write_text(""), r"leakage.csv' cannot be read"),
        (lambda f: (f / "rounds.csv").write_text("a,b\n1,2\n"), "has no column 'round'"),
        (lambda f: (f / "leakage.csv").write_bytes(b"\xff\xfe\x00"), r"leakage.csv'"),
        (lambda f: f.rename(f.parent / "ab"), "there is no folder .*did you mean 'ab'"),
        (lambda f: change_about(f, arms=["none"]), "no defence of this run has started"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, harm: Any, words: str) -> None:
    folder = make_run(tmp_path / "a")
    harm(folder)
    with pytest.raises(InvalidInputError, match=words):
        read_runs([folder])


def test_folders_around_runs_and_the_same_twice(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    with pytest.raises(InvalidInputError, match="there are runs in it: a"):
        read_runs([tmp_path])
    with pytest.raises(InvalidInputError, match="given twice"):
        read_runs([tmp_path / "a", tmp_path / "a" / ".." / "a"])


def test_what_is_not_known_is_neither_exact_nor_none(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    table = pd.read_csv(folder / "leakage.csv")
    table.assign(psnr_db="", label_true="").to_csv(folder / "leakage.csv", index=False)
    words = ["compare", str(folder), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert done.stdout.count("not known") >= 4
    assert "exact" not in done.stdout
    assert "of 4 of 4 images the true one is not known" in done.stdout
    (run,) = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]
    assert run["labels_right"] is None
    assert run["last"]["scored"] == 0
