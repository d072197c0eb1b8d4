"""Results that somebody else may have written: what no run has written is none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedleak.files import read_json
from fedleak.report.page import write_report
from fedleak.results.reading import read_table
from fedleak.results.runs import read_runs
from fedleak.untrusted import finite


def test_numbers_that_no_run_has_written(tmp_path: Path) -> None:
    path = tmp_path / "leakage.csv"
    path.write_text(
        "round,client,image,accuracy,psnr_db,ssim,status,reason\n"
        "inf,0,0,1e308,inf,1e300,ok,\n1.5,1+2,-1,nan,-inf,0.5,failed,=1\x1b[31m\n"
        "2,3,4,0.5,20,0.9,ok,x\n3,1,1,1,1,1,ok,x,y,too long\n99999999999999999999,0,0,1,1,1,ok\n"
    )
    found = read_table(path)
    assert found["round"].dropna().tolist() == [2]
    assert found["accuracy"].dropna().tolist() == [0.5, 1]
    assert found["psnr_db"].tolist()[:3:2] == [math.inf, 20]
    assert math.isnan(found["psnr_db"][1])
    assert found["ssim"].dropna().tolist() == [0.5, 0.9, 1]
    assert found["client"].tolist() == ["0", "1+2", "3", "0"]
    assert found["reason"][1] == "'=1\N{REPLACEMENT CHARACTER}[31m"


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_what_is_no_table(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match="No columns"):
        read_table(tmp_path / "a.csv")


def test_numbers_and_depth_of_json(tmp_path: Path) -> None:
    assert [finite(v) for v in (1, 10**400, math.inf, "1", True)] == [1, None, None, None, None]
    path = tmp_path / "a.json"
    for text in ("[" * 65 + "]" * 65, "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="too deep"):
            read_json(path)


@pytest.mark.parametrize("value", ["inf", "1e308", "1.5", "x", ""])
def test_a_damaged_number_ends_neither_report_nor_comparison(value: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"scenario": {"federation": 3}, "arms": 1.5}')
    rows = [["1", "20", "ok", "0.5", "30"] for _ in range(6)]
    for column in range(5):
        rows[column][column] = value
    (tmp_path / "leakage.csv").write_text(
        "round,psnr_db,status,ssim,predicted_psnr_db\n" + "\n".join(map(",".join, rows)) + "\n"
    )
    (tmp_path / "rounds.csv").write_text(
        f"round,accuracy,c_metric\n1,0.5,0\n{value},{value},{value}\n"
    )
    write_report(tmp_path)
    assert "<svg" in (tmp_path / "report.html").read_text()
    (run,) = read_runs([tmp_path])
    assert set(run.leakage["round"]) == {1}
    assert len(run.leakage) == 4  # without the round and the status that are none
