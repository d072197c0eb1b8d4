"""One-shot reconstruction, in Python and on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.io import write_png

from fedleak.attacks import HybridAttack
from fedleak.commands.app import main
from fedleak.errors import DataUnavailableError, InvalidInputError
from fedleak.laboratory import labels_of, read_images, reconstruct
from fedleak.models import build_model


@pytest.fixture
def folder(tmp_path: Path, photos: Tensor) -> Path:
    """Two classes of two photographs each."""
    for n, photo in enumerate(photos):
        place = tmp_path / "photos" / ("sky" if n % 2 else "flower")
        place.mkdir(parents=True, exist_ok=True)
        write_png((photo * 255).round().byte(), str(place / f"{n}.png"))
    return tmp_path / "photos"


def test_three_lines(photos: Tensor) -> None:
    model = build_model("cnn2-v1", (3, 32, 32), 10, seed=0)
    trials = reconstruct(model, photos[:2], [3, 4])
    assert min(trials.psnr_db) > 135
    noisy = reconstruct(model, photos[:2], [3, 4], attack="linear", defence="noise:0.1")
    assert max(noisy.psnr_db) < 60


def test_a_time_limit_is_said(photos: Tensor) -> None:
    """What is matched as a whole takes half a minute; here it is cut, and says so."""
    model = torch.nn.Sequential(
        build_model("cnn2-v2", (3, 32, 32), 10, seed=0), torch.nn.Dropout(0)
    )
    trials = reconstruct(model, photos, [3, 4, 4, 4], batch_size=4, seconds=0.5)
    assert trials.seconds < 20
    assert all("time: stopped" in t.reconstruction.doubts[0] for t in trials.trials)


def test_files_folders_and_labels(folder: Path) -> None:
    files, images = read_images([folder])
    assert [f.name for f in files] == ["0.png", "2.png", "1.png", "3.png"]
    assert images.shape == (4, 3, 32, 32)
    assert labels_of(files, 10, 0) == [0, 0, 1, 1]
    single, _ = read_images([files[3]], channels=1)
    assert labels_of(single, 10, 5) == labels_of(single, 10, 5)
    assert read_images([folder], limit=3)[1].shape[0] == 3


def test_unreadable_images(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataUnavailableError, match="nowhere"):
        read_images([folder / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataUnavailableError, match="no images in"):
        read_images([tmp_path / "empty"])
    write_png(torch.zeros(3, 8, 9, dtype=torch.uint8), str(folder / "sky" / "wide.png"))
    with pytest.raises(InvalidInputError, match=r"wide.png' has shape \(3, 8, 9\)"):
        read_images([folder])
    (folder / "flower" / "bad.png").write_bytes(b"text")
    with pytest.raises(InvalidInputError, match="cannot be read as an image"):
        read_images([folder / "flower" / "bad.png"])


def test_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fedleak", "reconstruct", "--model", "cnn2-v1", "--images", str(folder), "--json",
                 "--attack", "linear", "--out", str(folder / "out")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    result = json.loads(capsys.readouterr().out)
    assert [i["label_inferred"] for i in result["images"]] == [0, 0, 1, 1]
    assert min(i["psnr_db"] for i in result["images"]) > 130
    assert result["rank"] == [{"name": "conv1", "unknowns": 3072, "rank": 3072}]
    assert result["seconds"] > 0
    assert (folder / "out" / "reconstructions.png").is_file()


def test_what_an_update_shows_is_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clipping is found and said, once for all images; signs are a doubt."""
    base = ["fedleak", "reconstruct", "--model", "cnn2-v1", "--images", str(folder), "--limit", "1",
            "--attack", "linear"]  # fmt: skip
    for defence, words in (
        ("clip:0.1", "Seen, and taken into account: the update is 0.0"),
        ("sign:1", "Doubtful: 100% of the update's entries are of one size"),
    ):
        monkeypatch.setattr(sys, "argv", [*base, "--defence", defence])
        main()
        assert capsys.readouterr().out.count(words) == 1
    monkeypatch.setattr(sys, "argv", [*base, "--defence", "sign:1", "--json"])
    main()
    (image,) = json.loads(capsys.readouterr().out)["images"]
    assert image["status"] == "doubtful"
    assert len(image["doubts"]) == 1


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--attack", "linaer"], "did you mean 'linear'"),
        (["--label", "guess"], "'guess'"),
        (["--defence", "noise:x"], "is not a number"),
        (["--model", "resnet"], "unknown model 'resnet'"),
    ],
)
def test_bad_input(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    words: str,
) -> None:
    base = ["fedleak", "reconstruct", "--model", "cnn2-v1", "--images", str(folder)]
    monkeypatch.setattr(sys, "argv", [*base, *extra])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_batches(photos: Tensor) -> None:
    """Two images behind each gradient come back, each scored against its own truth."""
    model = build_model("cnn2-v1", (3, 16, 16), 10, seed=0)
    small = photos[:, :, ::2, ::2]
    trials = reconstruct(model, small, [3, 4, 5, 5], attack=HybridAttack(steps=150), batch_size=2)
    assert [t.label for t in trials.trials] == [3, 4, 5, 5]
    assert [t.label_inferred for t in trials.trials] == [3, 4, 5, 5]
    assert trials.trials[0].reconstruction is trials.trials[1].reconstruction
    assert min(trials.psnr_db[:2]) > 18
    with pytest.raises(InvalidInputError, match="4 images do not make batches of 3"):
        reconstruct(model, small, [3, 4, 5, 5], batch_size=3)
    with pytest.raises(InvalidInputError, match="3 labels for 4 images"):
        reconstruct(model, small, [3, 4, 5])


def test_priors_and_options_on_the_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["fedleak", "reconstruct", "--model", "cnn2-v2", "--images", str(folder / "sky"),
            "--limit", "1", "--json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*base, "--prior", "tv", "--option", "steps=40"])
    main()
    result = json.loads(capsys.readouterr().out)
    assert (result["attack"], result["prior"]) == ("hybrid", "tv")
    assert result["images"][0]["by"] in ("matching", "linear")
    learned = ["--prior", "gaussian:learned", "--public", str(folder / "flower")]
    monkeypatch.setattr(sys, "argv", [*base, *learned])
    main()
    assert json.loads(capsys.readouterr().out)["images"][0]["psnr_db"] > 10
    for extra, words in (
        (["--prior", "gaussian:learned"], "--public FOLDER"),
        (["--attack", "linear", "--prior", "tv"], "does not take these options"),
        (["--option", "steps"], "write KEY=VALUE"),
        (["--option", "steps=fast"], "steps must be a whole number"),
    ):
        monkeypatch.setattr(sys, "argv", [*base, *extra])
        with pytest.raises(SystemExit):
            main()
        assert words in capsys.readouterr().err
