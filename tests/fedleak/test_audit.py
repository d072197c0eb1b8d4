"""``fedleak audit``, in Python and on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.io import write_png

from fedleak.commands.app import main
from fedleak.errors import InvalidInputError
from fedleak.metric import audit
from fedleak.metric.verdict import verdict
from fedleak.models import build_model
from fedleak.wording import grade
from tests.fedleak.test_attribution import SHAPE, tiny

LAYER_KEYS = {
    "name", "kind", "unknowns", "weight_rank", "gradient_rank", "rank", "deficiency", "weight",
}  # fmt: skip


def test_audit_holds_all_that_is_promised() -> None:
    found = audit(tiny(), SHAPE)
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["unknowns"] == 72
    assert plain["references"] == len(plain["predicted_psnr_each_db"]) == 2
    mean = sum(plain["predicted_psnr_each_db"]) / 2
    assert plain["predicted_psnr_db"] == pytest.approx(mean)
    # The convolution counts in c(M), the fully connected layer has no weight in it.
    assert [(x["name"], x["weight"] > 0) for x in plain["layers"]] == [("0", True), ("3", False)]
    assert all(set(x) >= LAYER_KEYS for x in plain["layers"])
    assert plain["c"] == sum(round(x["weight"] * x["deficiency"]) for x in plain["layers"])
    assert plain["prior_db"] < plain["predicted_psnr_db"] < plain["i2f"]["psnr_db"]
    assert plain["cramer_rao_db"] >= plain["predicted_psnr_db"] - 1e-6
    assert 0 < plain["effective_dimensions"] <= 72
    assert plain["why_no_c"] is plain["why_no_attribution"] is plain["target_db"] is None
    assert plain["advice"] == []
    assert plain["seconds"] > 0


def test_model_that_is_no_chain_has_no_c() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.GELU(), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 4)
    )
    found = audit(model, SHAPE, defence="noise:0.1", references=1)
    plain = found.to_dict()
    assert plain["c"] is plain["c_normalised"] is None
    assert plain["layers"] == []
    assert "GELU" in plain["why_no_c"]
    assert [x["name"] for x in plain["attribution"]["layers"]] == ["0", "3", "4"]


def test_verdict_is_in_plain_words() -> None:
    open_ = audit(tiny(), SHAPE, references=1, target_db=14.0)
    said = verdict(open_)
    assert "people and objects can be recognised" in said
    assert "tells most" in said
    assert "Under 14 dB come:" in said
    assert "no proof of safety" in said
    assert {a.kind for a in open_.advice} >= {"withhold", "prune", "noise", "filters"}
    closed = audit(tiny(), SHAPE, 2, "noise:30", references=1, target_db=15.0)
    said = verdict(closed)
    assert "little more than the average image" in said
    assert "the 2 images of a batch" in said
    assert "under the target" in said
    impossible = audit(tiny(), SHAPE, references=1, target_db=5.0)
    assert "Nothing brings it under 5 dB" in verdict(impossible)
    assert not any(a.reached for a in impossible.advice)
    assert [grade(x)[:11] for x in (45, 25, 15, 10)] == [
        "images that", "images in w", "blurred ima", "little more",
    ]  # fmt: skip


@pytest.mark.slow
def test_matrix_free_leaves_attribution_out() -> None:
    found = audit(tiny(), SHAPE, defence="noise:0.1", references=1, matrix_free=True, target_db=15)
    dense = audit(tiny(), SHAPE, defence="noise:0.1", references=1)
    near = 3 * found.prediction.error_db + 0.5
    assert found.prediction.psnr_db == pytest.approx(dense.prediction.psnr_db, abs=near)
    assert found.attribution is None
    assert found.advice == ()
    plain = found.to_dict()
    assert plain["cramer_rao_db"] is None
    assert "matrix-free" in plain["why_no_attribution"]
    assert "No change towards 15 dB was tried" in verdict(found)


def test_bad_input_is_named() -> None:
    with pytest.raises(InvalidInputError, match="no trainable parameters"):
        audit(nn.Sequential(nn.Flatten()), SHAPE)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4))
    with pytest.raises(InvalidInputError, match=r"'1' \(BatchNorm2d\).*model.eval\(\)"):
        audit(model, SHAPE)
    with pytest.raises(InvalidInputError, match=r"cannot take images of shape \(3, 6, 6\)"):
        audit(tiny(), (3, 6, 6))
    with pytest.raises(InvalidInputError, match=r"input shape \(6, 6\) is not"):
        audit(tiny(), (6, 6))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="not a finite number of dB"):
        audit(tiny(), SHAPE, target_db=float("nan"))
    with pytest.raises(InvalidInputError, match="reference images have shape"):
        audit(tiny(), SHAPE, images=torch.zeros(2, 3, 6, 6))
    with pytest.raises(InvalidInputError, match="batch size 0"):
        audit(tiny(), SHAPE, 0)


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fedleak", "audit", *words])
    main()


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(
        "from torch import nn\n"
        "def make(input_shape, classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),\n"
        "        nn.Flatten(), nn.Linear(64, classes))\n"
        "def nothing():\n"
        "    return nn.Sequential(nn.Flatten())\n"
    )
    return str(path)


def test_command_line(
    tmp_path: Path,
    model_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for n in range(3):
        pixels = torch.randint(0, 256, (3, 6, 6), generator=torch.Generator().manual_seed(n))
        write_png(pixels.to(torch.uint8), str(tmp_path / f"{n}.png"))
    words = ["--model", f"{model_file}:make", "--input-shape", "3,6,6", "--classes", "4"]
    words += ["--images", str(tmp_path), "--out", str(tmp_path / "out")]
    _run(monkeypatch, *words, "--json", "--defence", "noise:0.01", "--batch-size", "2")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["defence"] == "noise:0.01"
    assert found["batch_size"] == 2
    assert found["model"] == f"{model_file}:make"
    assert len(found["predicted_psnr_each_db"]) == 1  # three images make one batch of two
    out = tmp_path / "out"
    assert json.loads((out / "audit.json").read_text()) == found
    assert {p.name for p in out.iterdir()} == {"audit.json", "layers.png", "open.png"}
    _run(monkeypatch, *words[:6], "--target", "15", "--references", "1")
    said = capsys.readouterr().out
    assert "c(M) = " in said
    assert "What each layer tells" in said
    assert "To come under 15 dB" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input-shape", "3x32"], "--input-shape '3x32' is not channels,height,width"),
        (["--input-shape", "3,0,6"], "--input-shape '3,0,6' is not"),
        (["--target", "much"], "--target 'much' is not a number of dB"),
        (["--prior", "tv"], "takes a Gaussian prior"),
        (["--prior", "gaussian:learned"], "learned from public images"),
        (["--defence", "nois:1"], "did you mean 'noise'"),
        (["--model", "cnn2"], "unknown model 'cnn2'; did you mean"),
        (["--model", "NET:nothing"], "no trainable parameters"),
        (["--model", "NET:absent"], "cannot be loaded"),
        (["--input-shape", "1,6,6"], "cannot take images of shape (1, 6, 6)"),
        (["--images", "absent"], "no image file or folder 'absent'"),
    ],
)
def test_command_line_errors(
    words: list[str],
    message: str,
    model_file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [w.replace("NET", model_file) for w in words]
    given = {"--model": f"{model_file}:make", "--input-shape": "3,6,6"}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    with pytest.raises(SystemExit) as stop:
        _run(monkeypatch, *(w for pair in given.items() for w in pair))
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said


def test_paper_network_is_judged_like_its_c() -> None:
    model = build_model("cnn2-v1", (3, 8, 8), 10, seed=0)
    found = audit(model, (3, 8, 8), references=1)
    assert found.metric is not None
    assert found.metric.c == 0
    # Every layer can be solved: so the prediction is that nothing is left open.
    assert found.prediction.psnr_db > 100
    assert found.prediction.effective_dimensions == pytest.approx(192, abs=0.5)
