"""Every command with broken input of every kind that it reads: one message, and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedleak.commands.app import main
from tests.fedleak.test_capture import make_capture

Harm = Callable[[Path], object]


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _zero(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(50 << 30)


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


HARMS: dict[str, Harm] = {
    "missing": lambda path: path.unlink(missing_ok=True),
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "deep": lambda path: path.write_text("a=" + "[" * 100_000),
    "json": lambda path: path.write_text("[" * 100_000),
    "list": lambda path: path.write_text("[1, 2]"),
    "pipe": _pipe,
    "zero": _zero,
    "sparse": _sparse,
    "folder": _folder,
}
#: What each command reads, and the command. X is the file or folder with the harm in it.
READS: dict[str, tuple[str, list[str]]] = {
    "simulate": ("x.toml", ["simulate", "X"]),
    "simulate weights": ("x.pt", ["simulate", "--set", "model.weights='X'", "--out", "out"]),
    "simulate safetensors": (
        "x.safetensors", ["simulate", "--set", "model.weights='X'", "--out", "out"],
    ),
    "simulate model": ("x.py", ["simulate", "--set", "model.name='X:make'", "--out", "out"]),
    "evaluate": ("x.toml", ["evaluate", "X", "--out", "out"]),
    "evaluate scenario": (
        "x.toml", ["evaluate", "noise-pruning", "--set", "scenario='X'", "--out", "out"],
    ),
    "reconstruct": ("x.png", ["reconstruct", "--model", "cnn2-v1", "--images", "X"]),
    "reconstruct tif": ("x.tif", ["reconstruct", "--model", "cnn2-v1", "--images", "X"]),
    "reconstruct model": ("x.py", ["reconstruct", "--model", "X:make", "--images", "good.png"]),
    "audit public": (
        "x.png", ["audit", "--model", "cnn2-v1", "--input-shape", "1,8,8", "--public", "X"],
    ),
    "audit": ("x.png", ["audit", "--model", "cnn2-v1", "--input-shape", "1,8,8", "--images", "X"]),
    "audit weights": (
        "x.pt", ["audit", "--model", "cnn2-v1", "--input-shape", "1,8,8", "--weights", "X"],
    ),
    "attack": ("captures/manifest.json", ["attack", "captures", "--attack", "linear"]),
    "attack settings": (
        "out/attack.json", ["attack", "captures", "--attack", "linear", "--out", "out"],
    ),
    "attack model": ("x.py", ["attack", "captures", "--model", "X:make"]),
    "compare": ("run/run.json", ["compare", "run"]),
    "compare table": ("run/leakage.csv", ["compare", "run"]),
    "compare folder": ("x", ["compare", "X"]),
    "report folder": ("x", ["report", "X"]),
    "report audit": ("audit/audit.json", ["report", "audit"]),
    "paper": ("x.png", ["paper", "--images", "X", "--networks", "cnn2-v1"]),
}  # fmt: skip


#: Where this is no harm: a scenario of defaults alone, and a folder that is still to be written.
FINE = {("simulate", "empty"), ("evaluate scenario", "empty"), ("attack settings", "missing")}
QUICK = ("noise", "deep", "pipe", "zero")
CASES = [
    pytest.param(what, harm, marks=() if harm in QUICK else pytest.mark.slow, id=f"{what}-{harm}")
    for what in READS for harm in HARMS if (what, harm) not in FINE
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole inputs of every kind."""
    import torch

    from fedleak.images import png

    folder = tmp_path_factory.mktemp("inputs")
    make_capture(folder / "captures", clients=1, rounds=1)
    (folder / "good.png").write_bytes(png(torch.rand(3, 12, 12).numpy()))
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text(json.dumps({"scenario": {}, "status": "finished"}))
    (folder / "run" / "leakage.csv").write_text("round,psnr_db,status\n1,20,ok\n")
    (folder / "run" / "rounds.csv").write_text("round,accuracy\n1,0.5\n")
    (folder / "audit").mkdir()
    (folder / "out").mkdir()
    return folder


@pytest.mark.parametrize(("what", "harm"), CASES)
def test_one_message_and_exit_code_2(
    what: str,
    harm: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "w"
    shutil.copytree(inputs, place)
    monkeypatch.chdir(place)
    name, command = READS[what]
    HARMS[harm](place / name)
    monkeypatch.setattr("sys.argv", ["fedleak", *(a.replace("X", name) for a in command)])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert (ended.value.code, "Traceback" in told.err) == (2, False), told.err[-600:]
    last = told.err.strip().splitlines()[-1]
    assert 10 < len(last) < 4100
    assert not set(told.err) & set("\x00\x07\x1b")
