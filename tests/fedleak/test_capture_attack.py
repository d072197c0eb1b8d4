"""Attacks on captures: resumed, repeated, in any number of processes, the same table."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fedleak.capture import Capture, CaptureWriter, Update
from fedleak.capture.jobs import Chunk, Result
from fedleak.capture.run import Attacked, attack_capture
from fedleak.capture.store import Results
from fedleak.capture.table import summary, write_table
from fedleak.capture.truth import write_truth
from fedleak.commands.app import main
from fedleak.errors import FedleakError, InvalidInputError
from fedleak.models import build_model
from fedleak.results.format import ATTACKS
from fedleak.terms import Terms
from tests.fedleak.test_capture import SHAPE, gradient_of, images, make_capture

ROUND = "round-0001/client-00000"


def table_of(folder: Path) -> str:
    """Return the table as text, without the column that never comes twice."""
    table = pd.read_csv(folder / "attacks.csv", dtype=str, keep_default_na=False)
    return table.drop(columns="seconds").to_csv()


def with_truth(folder: Path) -> None:
    """Write the truth of :func:`make_capture` beside it."""
    for path in sorted(folder.glob("round-*/client-*.json")):
        number, client = int(path.parent.name[6:]), int(path.stem[7:])
        x, y = images(1, 100 * number + client)
        write_truth(folder, f"{path.parent.name}/{path.stem}", [(client, 9)], x, y)


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """Two rounds of five clients, one image each, with the truth."""
    make_capture(tmp_path / "captures")
    with_truth(tmp_path / "captures")
    return tmp_path / "captures"


def attacked(capture: Path, out: str = "out", **options: Any) -> Attacked:
    return attack_capture(capture, "linear", out=capture.parent / out, **{"together": 2, **options})


def test_a_table_pictures_and_the_attacks_settings(capture: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = attack_capture(capture, "linear", on_progress=lambda *now: seen.append(now), together=4)
    assert found.folder.parent == capture / "attacks"
    assert tuple(found.table.columns) == ATTACKS.columns
    assert (found.table["status"] == "ok").all()
    assert found.table["psnr_db"].min() > 60
    assert (found.table["label_true"] == found.table["label_inferred"]).all()
    assert found.table["client"].tolist() == [0, 1, 2, 3, 4] * 2
    assert (found.table["image"] == 9).all()
    assert (found.table["fit"] < 1e-5).all()
    assert seen == [(0, 10), (4, 10), (5, 10), (9, 10), (10, 10)]
    assert len(list(found.folder.glob("pictures/round-*/client-*.png"))) == 10
    assert (found.folder / "reconstructions.png").read_bytes()[:4] == b"\x89PNG"
    about = json.loads((found.folder / "attack.json").read_text())["settings"]
    assert (about["attack"], about["model"], about["threads"]) == ("linear", "cnn2-v1", 1)
    again = attack_capture(capture, "linear", together=4)
    assert (again.folder, again.skipped) == (found.folder, 10)
    # Another attack on the same capture lies elsewhere by itself.
    assert attack_capture(capture, "linear", together=3).folder != found.folder


def test_without_the_truth_the_same_images_and_no_scores(capture: Path) -> None:
    known = attacked(capture, "known")
    shutil.rmtree(capture / "truth")
    blind = attacked(capture, "blind")
    for path in known.folder.glob("results/*/*.safetensors"):
        other = blind.folder / path.relative_to(known.folder)
        assert path.read_bytes() == other.read_bytes()
    assert blind.table["psnr_db"].isna().all()
    assert blind.table["label_true"].isna().all()
    assert blind.table["label_inferred"].tolist() == known.table["label_inferred"].tolist()
    assert blind.table["client"].tolist() == [70, 71, 72, 73, 74] * 2  # the nodes
    assert (blind.folder / "reconstructions.png").is_file()
    assert summary(blind.table)["psnr_db_mean"] is None
    with_truth(capture)  # found later: only scored, not attacked again
    scored = attacked(capture, "blind")
    assert scored.skipped == 10
    assert table_of(scored.folder) == table_of(known.folder)


def test_a_damaged_file_costs_its_own_row_and_is_tried_again(capture: Path) -> None:
    whole = attacked(capture, "whole")
    spoilt = capture / f"{ROUND}1.safetensors"
    content = spoilt.read_bytes()
    spoilt.write_bytes(content[:100])
    (capture / f"{ROUND}3.json").unlink()
    (capture / "truth" / f"{ROUND}4.safetensors").write_bytes(b"spoilt")
    found = attacked(capture)
    assert found.table["status"].tolist() == ["ok", "failed", "ok", "failed"] + ["ok"] * 6
    assert "checksum differs" in found.table["reason"][1]
    assert "client-000003.json is missing" in found.table["reason"][3]
    assert "not scored: " in found.table["reason"][4]
    assert found.table["psnr_db"].notna().sum() == 7
    assert attacked(capture).skipped == 10  # as damaged as before
    spoilt.write_bytes(content)
    mended = attacked(capture)
    assert mended.skipped == 8  # what was attacked together is attacked together again
    assert (mended.table["status"] == "failed").sum() == 1
    ok = mended.table.index.difference([3, 4])
    pd.testing.assert_frame_equal(
        mended.table.loc[ok].drop(columns="seconds"), whole.table.loc[ok].drop(columns="seconds"),
        check_dtype=False,
    )  # fmt: skip


def test_a_damaged_model_costs_its_round(capture: Path) -> None:
    (capture / "round-0001" / "model.safetensors").unlink()
    found = attacked(capture)
    assert found.table["status"].tolist() == ["failed"] * 5 + ["ok"] * 5
    assert (found.table["reason"][:5] == "model.safetensors is missing").all()


def test_results_that_were_spoilt_are_made_again(capture: Path) -> None:
    before = table_of(attacked(capture).folder)
    results = capture.parent / "out" / "results"
    (results / f"{ROUND}0.json").write_text("{")
    (results / "round-0002" / "client-000000.safetensors").write_bytes(b"half")
    again = attacked(capture)
    assert again.skipped == 6
    assert table_of(again.folder) == before


def test_a_capture_that_grows_and_a_limit(capture: Path) -> None:
    assert len(attacked(capture, limit=3).table) == 3
    assert attacked(capture).skipped == 2  # the third was attacked without the fourth
    shutil.copytree(capture / "round-0002", capture / "round-0003")
    for path in (capture / "round-0003").glob("*.json"):
        path.write_text(path.read_text().replace('"round": 2', '"round": 3'))
    grown = attacked(capture)
    assert (grown.skipped, len(grown.table)) == (10, 15)


FATAL = """
import os, signal, torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(144, 10)
        self.register_buffer("fatal", torch.zeros(()))

    def forward(self, x):
        if self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.fc(self.conv(x).tanh().flatten(1) * 1.0)
"""


@pytest.mark.parametrize("rounds", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_same_table_and_one_that_ends_costs_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    """With four rounds, the process that ended is replaced."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fatal.py").write_text(FATAL)
    model = build_model("fatal.py:Net", SHAPE, 10, seed=0)
    writer = CaptureWriter("captures", model, SHAPE, spec="fatal.py:Net")
    for number in range(1, rounds + 1):
        sent = {**model.state_dict(), "fatal": torch.tensor(float(number == 2))}
        for node in (0, 1):
            received = gradient_of(model, *images(1, 10 * number + node))
            writer.add(Update(number, (node,), sent, received, Terms(input_shape=SHAPE)))
    options = {"steps": 5}
    found = attack_capture(
        "captures", options=options, model="fatal.py:Net", jobs=2, out="two"
    ).table
    assert found["status"].tolist() == ["ok", "ok", "failed", "failed"] + ["ok"] * (2 * rounds - 4)
    assert found["reason"][2].startswith("the worker process was ended by SIGKILL; out of memory?")
    shutil.rmtree("captures/round-0002")
    rest = attack_capture("captures", options=options, model="fatal.py:Net", out="two")
    assert rest.skipped == 2 * rounds - 2
    attack_capture("captures", options=options, model="fatal.py:Net", out="one")
    assert table_of(tmp_path / "one") == table_of(tmp_path / "two")
    crashed = json.loads((tmp_path / "two/results/round-0002/client-000000.json").read_text())
    assert crashed["retry"] == "crashed"  # tried again, if it were still there


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_same_table(capture: Path) -> None:
    one, ray = attacked(capture, "one"), attacked(capture, "ray", engine="ray")
    assert table_of(one.folder) == table_of(ray.folder)


def run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Run the command line in this process; return code, output and errors."""
    monkeypatch.setattr(sys, "argv", ["fedleak", "attack", *arguments])
    code = 0
    try:
        main()
    except SystemExit as error:
        code = int(error.code or 0)
    return code, *capsys.readouterr()


#: ``fedleak attack`` in a process that kills itself: no clock decides where.
_KILLED_AFTER_TWO_CHUNKS = """
import os, signal, sys
from fedleak.capture import store
from fedleak.commands.app import main

save, saved = store.Results.save, []

def save_and_die(*given):
    save(*given)
    saved.append(given)
    if len(saved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

store.Results.save = save_and_die
sys.argv[1:1] = ["attack"]
main()
"""


def test_killed_in_the_middle_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = tmp_path / "captures"
    make_capture(capture, clients=8)
    with_truth(capture)
    line = [str(capture), "--attack", "cosine", "--option", "steps=8", "--together", "2"]
    killed = [*line, "--out", str(tmp_path / "killed")]
    script = [sys.executable, "-c", _KILLED_AFTER_TWO_CHUNKS, *killed]
    process = subprocess.run(script, check=False, stdout=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "killed" / "results").glob("*/*.json"))) == 4
    assert not (tmp_path / "killed" / "attacks.csv").exists()
    code, output, _ = run([*killed, "--json"], monkeypatch, capsys)
    assert code == 0
    assert json.loads(output)["images"] == 16
    assert run([*line, "--out", str(tmp_path / "whole")], monkeypatch, capsys)[0] == 0
    assert table_of(tmp_path / "killed") == table_of(tmp_path / "whole")


def test_ctrl_c_says_what_is_kept(
    capture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fedleak.capture.run as module

    real = module.run_inline

    def stops(work: Any, chunks: Any) -> Any:
        yield next(iter(real(work, chunks)))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_inline", stops)
    line = [str(capture), "--attack", "linear", "--together", "2"]
    code, _, errors = run(line, monkeypatch, capsys)
    assert code == 130
    assert "stopped; 2 of 10 updates are done and kept" in errors
    monkeypatch.undo()
    assert attack_capture(capture, "linear", together=2).skipped == 2


def test_the_closing_table(
    capture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (capture / f"{ROUND}2.safetensors").unlink()
    monkeypatch.chdir(capture.parent)
    code, output, _ = run(["captures", "--attack", "linear"], monkeypatch, capsys)
    assert code == 0
    for words in ("100%", "reason for a failure: client-000002.safetensors is missing",
                  "captures/attacks/linear-", "attacks.csv", "reconstructions.png"):  # fmt: skip
        assert words in output
    _, output, _ = run(["captures", "--attack", "linear", "--json"], monkeypatch, capsys)
    found = json.loads(output)
    assert (found["images"], found["failed"], found["labels_right"]) == (9, 1, 1.0)
    assert len(found["rows"]) == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "is no capture"),
        (["captures", "--attack", "linaer"], "did you mean 'linear'"),
        (["captures", "--option", "stepz=1"], "does not take these options"),
        (["captures", "--option", "steps"], "write KEY=VALUE"),
        (["captures", "--option", "device=cpu"], "--device"),
        (["captures", "--prior", "patches:learned"], "--public FOLDER"),
        (["captures", "--engine", "rya"], "did you mean 'ray'"),
        (["captures", "--engine", "ray", "--jobs", "2"], "Ray decides"),
        (["captures", "--device", "mps"], "'mps' is not one of"),
        (["captures", "--model", "cnn2-v2"], "is not the one that was captured"),
        (["captures", "--model", "mine.py:Net"], "there is no file 'mine.py'"),
        (["captures", "--out", "."], "is not empty and holds no attack"),
        (
            ["captures", "--attack", "dlg", "--out", "linear"],
            "was made with other settings (attack",
        ),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    capture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(capture.parent)
    if "linear" in arguments:
        attacked(capture, "linear", limit=1)
    code, output, errors = run(arguments, monkeypatch, capsys)
    assert code == 2
    assert words in errors
    assert (errors.startswith("fedleak: "), errors.count("\n"), output) == (True, 1, "")
    assert not (capture / "attacks").exists()


def test_an_empty_capture_says_so(tmp_path: Path) -> None:
    make_capture(tmp_path, clients=0)
    with pytest.raises(InvalidInputError, match="holds no updates yet"):
        summary(attack_capture(tmp_path, "linear", out=tmp_path.parent / "none").table)


def test_only_its_own_files_are_overwritten(capture: Path) -> None:
    attacked(capture)
    (capture.parent / "out" / "notes.txt").write_text("mine")
    assert attacked(capture, overwrite=True).skipped == 0
    assert (capture.parent / "out" / "notes.txt").read_text() == "mine"


def test_public_images_are_part_of_the_settings(capture: Path) -> None:
    from torchvision.io import write_png

    public = capture.parent / "public"
    public.mkdir()
    generator = np.random.default_rng(0)
    for n in range(6):
        pixels = torch.tensor(generator.integers(0, 255, (1, 8, 8)), dtype=torch.uint8)
        write_png(pixels, str(public / f"{n}.png"))
    options = {"prior": "gaussian:learned", "public": str(public)}
    first = attack_capture(capture, options=options, limit=1)
    assert attack_capture(capture, options=options, limit=1).skipped == 1
    (public / "5.png").unlink()
    other = attack_capture(capture, options=options, limit=1)
    assert (other.skipped, other.folder == first.folder) == (0, False)
    with pytest.raises(FedleakError):
        attack_capture(capture, options={**options, "public": str(public / "none")}, limit=1)


def test_a_time_limit_ends_an_attack_with_what_there_is(
    capture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10**9))
    monkeypatch.setattr("fedleak.deadline._now", lambda: float(next(now)))
    cut = attack_capture(capture, "cosine", out=capture.parent / "cut", limit=1, seconds=5)
    assert cut.table["status"].isin(("failed", "doubtful")).all()
    assert cut.table["reason"].str.startswith("time: ").all()
    assert json.loads((cut.folder / "attack.json").read_text())["settings"]["seconds"] == 5
    with pytest.raises(InvalidInputError, match=r"seconds 5\.0, now 0\.0"):
        attack_capture(capture, "cosine", out=capture.parent / "cut", limit=1, seconds=0)
    with pytest.raises(InvalidInputError, match="a time limit must be a number of seconds"):
        attack_capture(capture, "cosine", seconds=-1)


def test_what_an_attack_proved_and_allowed_for_is_in_the_table(tmp_path: Path) -> None:
    make_capture(tmp_path / "captures")
    capture, name = Capture(tmp_path / "captures"), f"{ROUND}0"
    made = Result(
        name, np.zeros((2, *SHAPE)), (1, 2), 0.5, certified=(True, False), notes="a factor of 2"
    )  # fmt: skip
    stored = Results(tmp_path / "out", {}, SHAPE)
    stored.save(Chunk((name,), "d"), [made])
    found = stored.load(name, "d")
    assert found is not None
    assert found.certified == (True, False)
    table = write_table(capture, "rows", {name: found}, tmp_path / "out")
    assert table["certified"].tolist() == [1, 0]
    assert table["notes"].tolist() == ["a factor of 2"] * 2
    assert summary(table)["note"] == "2 images: a factor of 2"
    assert table["defence"].isna().all()  # none is declared
