"""Galleries of a capture: the same after a stop, and done once."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fedleak.capture import CaptureWriter, Update
from fedleak.capture.run import attack_capture
from fedleak.terms import Terms
from tests.fedleak.test_rounds import DIGITS, observed


def captured(folder: Path, batches: list[list[int]]) -> Path:
    """Write rounds of two clients who have the same images."""
    writer = None
    for n, seen in enumerate(observed(batches, model="cnn2-v1"), 1):
        writer = writer or CaptureWriter(folder, seen.model, DIGITS.shape, "cnn2-v1", 10)
        sent = {k: v.clone() for k, v in seen.model.state_dict().items()}
        for place, node in enumerate((11, 12)):
            terms = Terms(input_shape=DIGITS.shape, num_images=seen.num_images)
            writer.add(Update(n, (node,), sent, dict(seen.gradient), terms, place=place))
    return folder


def test_a_stop_changes_no_gallery(tmp_path: Path) -> None:
    capture = captured(tmp_path / "captures", [[0, 1], [1, 2], [0, 2]])
    whole = attack_capture(capture, "linear", out=tmp_path / "whole", memory=True).gallery
    assert whole is not None
    assert whole["client"].tolist() == [11] * 3 + [12] * 3
    assert whole["seen"].tolist() == [2] * 6
    first = attack_capture(capture, "linear", out=tmp_path / "cut", limit=3)
    assert first.gallery is None
    attack_capture(capture, "linear", out=tmp_path / "cut", limit=3, memory=True)
    # Killed before one client was written.
    for file in sorted((tmp_path / "cut" / "gallery").glob("*.json"))[:1]:
        file.unlink()
    rest = attack_capture(capture, "linear", out=tmp_path / "cut", memory=True)
    pd.testing.assert_frame_equal(rest.gallery, whole)


def test_a_client_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    capture = captured(tmp_path / "captures", [[0], [0]])
    attack_capture(capture, "linear", out=tmp_path / "out", memory=True)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out/gallery").glob("*.safetensors")}
    attack_capture(capture, "linear", out=tmp_path / "out", memory=True)
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert len(before) == 2
