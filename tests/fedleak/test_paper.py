"""The comparison of the paper: cells, resuming, tables and the figure."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torchvision.io import write_png

from fedleak.attacks import ATTACKS, Reconstruction
from fedleak.commands.app import main
from fedleak.errors import InvalidInputError, UnknownNameError
from fedleak.observation import Observation
from fedleak.paper import photographs
from fedleak.paper.cells import Images, parse_attack, pictures_of, run_cell
from fedleak.paper.comparison import compare
from fedleak.paper.tables import cell_text, mean_and_width
from fedleak.results.format import PAPER

NETWORK = "cnn2-v1"


@pytest.fixture
def images() -> Images:
    names, pixels = photographs(2, 12)
    return Images(names, pixels, [3, 7])


class Refuses:
    """Refuses one of the photographs, and counts its calls."""

    calls = 0

    def __call__(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        type(self).calls += 1
        for o in observations:
            if float(o.gradient["fc.bias"].argmin()) == 7:
                raise InvalidInputError("not | this\none")
        grey = torch.full((1, *observations[0].input_shape), 0.5, dtype=torch.float64)
        return [Reconstruction(grey, torch.tensor([3]), 1.0) for _ in observations]


@pytest.fixture
def refuses(monkeypatch: pytest.MonkeyPatch) -> type[Refuses]:
    monkeypatch.setitem(ATTACKS._entries, "refuses", Refuses)
    Refuses.calls = 0
    return Refuses


def _run(
    out: Path, images: Images, *attacks: str, slow: int = 1, **options: object
) -> pd.DataFrame:
    specs = [parse_attack(a) for a in attacks]
    compare([NETWORK], specs, images, slow, out, device="cpu", **options)  # type: ignore[arg-type]
    return pd.read_csv(out / "paper.csv", keep_default_na=False)


def test_photographs_are_distinct_and_always_the_same() -> None:
    names, pixels = photographs()
    assert len(set(names)) == len(names) >= 12
    assert pixels.shape == (len(names), 3, 32, 32)
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1
    assert torch.equal((pixels * 255).round() / 255, pixels)
    apart = torch.cdist(pixels.flatten(1), pixels.flatten(1)) + 99 * torch.eye(len(names))
    assert float(apart.min()) / math.sqrt(3072) > 0.05
    assert torch.equal(photographs(3)[1], pixels[:3])
    with pytest.raises(InvalidInputError, match="not 99; give --images"):
        photographs(99)


def test_attacks_are_read_with_their_options() -> None:
    spec = parse_attack("cosine:steps=40,tv=0.5")
    assert (spec.name, spec.options, spec.slow) == ("cosine", {"steps": 40, "tv": 0.5}, True)
    assert spec.label == "cosine:steps=40,tv=0.5"
    spec = parse_attack("hybrid:prior=patches:learned")
    assert spec.options == {"prior": "patches:learned"}
    assert not spec.slow
    with pytest.raises(InvalidInputError, match="give public images with --public"):
        spec.make("cpu", 0)
    with pytest.raises(UnknownNameError, match="did you mean 'cosine'"):
        parse_attack("cosin:steps=3")
    for bad in ("cosine:steps", "cosine:=3", "cosine:steps=", "cosine:a b=3"):
        with pytest.raises(InvalidInputError, match="write cosine:KEY=VALUE"):
            parse_attack(bad)
    with pytest.raises(InvalidInputError, match="'steps' is given twice"):
        parse_attack("cosine:steps=3,steps=4")
    with pytest.raises(InvalidInputError, match="does not take these options"):
        parse_attack("linear:stepps=3").make("cpu", 0)
    assert parse_attack("dlg").make("cpu", 5).seed == 5  # type: ignore[attr-defined]


def test_public_images_reach_a_learned_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    class Learns(Refuses):
        def __init__(self, prior: str = "", public: Tensor | None = None):
            self.prior, self.public = prior, public

    monkeypatch.setitem(ATTACKS._entries, "learns", Learns)
    public = torch.rand(4, 3, 8, 8)
    made = parse_attack("learns:prior=patches:learned").make("cpu", 0, public)
    assert made.public is public  # type: ignore[attr-defined]
    assert parse_attack("learns").make("cpu", 0, public).public is None  # type: ignore[attr-defined]


def test_comparison_is_written_and_resumed(tmp_path: Path, images: Images) -> None:
    out = tmp_path / "paper"
    table = _run(out, images, "linear", "cosine:steps=3")
    assert tuple(table.columns) == PAPER.columns
    assert list(table["image"]) == ["cat", "coffee", "cat"]  # the slow attack has one image
    assert list(table["options"]) == ["", "", "steps=3"]
    assert list(table["images_together"]) == [2, 2, 1]
    assert (out / "paper.png").stat().st_size > 10_000
    with np.load(pictures_of(out, NETWORK, "linear", "")) as stored:
        assert stored["made"].shape == (2, 3, 12, 12)
    again = _run(out, images, "linear", "cosine:steps=3", "cosine:steps=4")
    assert again[: len(table)].equals(table)  # the times, too: nothing was run again
    assert len(again) == len(table) + 1
    with pytest.raises(InvalidInputError, match=r"other settings \(seed 0, now 1\); use another"):
        _run(out, images, "linear", seed=1)
    fresh = _run(out, images, "linear", seed=1, overwrite=True)
    assert len(fresh) == 2
    assert list((out / "reconstructions").iterdir()) == [pictures_of(out, NETWORK, "linear", "")]


def test_foreign_folders_are_left_alone(tmp_path: Path, images: Images) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(InvalidInputError, match="is not empty and holds no comparison"):
            _run(tmp_path, images, "linear", overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(InvalidInputError, match="cannot be used"):
        _run(mine, images, "linear")


def test_tables_agree_with_the_csv(tmp_path: Path, images: Images) -> None:
    table = _run(tmp_path / "paper", images, "linear", "cosine:steps=3")
    text = (tmp_path / "paper" / "paper.md").read_text()
    shown = {}
    for title, column, digits in (("PSNR", "psnr_db", 1), ("SSIM", "ssim", 3)):
        section = text.split(f"## {title}")[1].split("## ")[0]
        (line,) = [row for row in section.splitlines() if row.startswith(f"| {NETWORK} ")]
        cells = [c.strip() for c in line.strip("|").split("|")]
        assert cells[1] == "0"  # c(M) of a solvable network
        values = table.loc[table["attack"] == "linear", column].astype(float)
        numbers = [float(x) for x in re.findall(r"[\d.]+", cells[2])]
        assert numbers == pytest.approx([values.mean(), 2], abs=0.6 * 10**-digits, rel=1e-3)
        slow = float(table.loc[table["attack"] == "cosine", column].iloc[0])
        assert cells[3] == f"{slow:.{digits}f} (1)"
        shown[title] = cells
    assert len(shown) == 2
    same = text.split("every attack has seen")[1]
    assert "These are: cat." in same
    first = table.loc[table["attack"] == "linear", "psnr_db"].iloc[0]
    assert f"| {NETWORK} | 0 | {float(first):.1f} (1) | {shown['PSNR'][3]} |" in same


def test_means_and_intervals() -> None:
    mean, width = mean_and_width([1.0, 2.0, 3.0, 4.0])
    assert (mean, width) == pytest.approx((2.5, 3.182446 * 1.290994 / 2), rel=1e-5)
    assert math.isnan(mean_and_width([7.0])[1])
    rows = pd.DataFrame({"status": ["ok", "ok", "failed"], "psnr_db": [math.inf, 160.0, math.nan]})
    assert cell_text(rows, "psnr_db", 1) == "160.0 (2 of 3)"
    rows = pd.DataFrame({"status": ["ok"] * 4, "psnr_db": [1.0, 2.0, 3.0, 4.0]})
    assert cell_text(rows, "psnr_db", 1) == "2.5 ± 2.1 (4)"
    rows = pd.DataFrame({"status": ["failed"] * 3, "psnr_db": [math.nan] * 3})
    assert cell_text(rows[2:], "psnr_db", 1) == "failed"


def test_failures_keep_their_reason_and_the_rest_goes_on(
    tmp_path: Path, images: Images, refuses: type[Refuses]
) -> None:
    out = tmp_path / "paper"
    table = _run(out, images, "refuses", "linear")
    assert list(table["status"]) == ["ok", "failed", "ok", "ok"]
    assert list(table["reason"]) == ["", "not | this one", "", ""]
    assert list(table["images_together"]) == [1, 1, 2, 2]
    text = (out / "paper.md").read_text()
    assert f"- {NETWORK}, refuses, 1 image: not | this one" in text
    assert "(1 of 2)" in text
    assert refuses.calls == 3  # both together, then each alone
    _run(out, images, "refuses", "linear")
    assert refuses.calls == 3  # a failed cell is kept


def test_networks_may_be_factories(tmp_path: Path, images: Images) -> None:
    spec = f"{tmp_path / 'net.py'}:net"
    (tmp_path / "net.py").write_text(
        "from fedleak.models import conv_chain\n"
        "def net(input_shape, classes):\n"
        "    return conv_chain([(6, 3, 1, 0)], input_shape, classes)\n"
    )
    out = tmp_path / "paper"
    compare([spec], [parse_attack("linear")], images, 1, out, device="cpu")
    assert pd.read_csv(out / "paper.csv")["psnr_db"].min() > 100


def test_diverged_images_are_failures(images: Images) -> None:
    class Diverges(Refuses):
        def __call__(self, observations: Sequence[Observation]) -> list[Reconstruction]:
            nan = torch.full((1, 3, 12, 12), torch.nan, dtype=torch.float64)
            return [Reconstruction(nan, torch.tensor([0]), math.nan) for _ in observations]

    from fedleak.models import build_model

    model = build_model(NETWORK, (3, 12, 12), 10, 0)
    rows, made = run_cell(NETWORK, model, parse_attack("linear"), Diverges(), images, 0)
    assert [r["status"] for r in rows] == ["failed", "failed"]
    assert "diverged" in rows[0]["reason"]
    assert np.isnan(made).all()


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, photo in zip(*photographs(2, 12), strict=True):
        write_png((photo * 255).round().byte(), str(tmp_path / f"{name}.png"))
    out = tmp_path / "results"
    words = ["--images", str(tmp_path / "cat.png"), "--images", str(tmp_path / "coffee.png")]
    words += ["--network", NETWORK, "--attack", "linear", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["fedleak", "paper", *words])
    main()
    assert f"| {NETWORK} | 0 | " in capsys.readouterr().out
    assert list(pd.read_csv(out / "paper.csv")["image"]) == ["cat.png", "coffee.png"]
    command = json.loads((out / "paper.json").read_text())["command"]
    assert command.startswith("fedleak paper --images ")
    monkeypatch.setattr(sys, "argv", ["fedleak", "paper", *words, "--attack", "nope"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "unknown attack 'nope'" in capsys.readouterr().err
    public = tmp_path / "public"
    public.mkdir()
    write_png(torch.zeros(3, 6, 6, dtype=torch.uint8), str(public / "small.png"))
    monkeypatch.setattr(sys, "argv", ["fedleak", "paper", *words, "--public", str(public)])
    with pytest.raises(SystemExit):
        main()
    assert "smaller than the 12x12" in capsys.readouterr().err
