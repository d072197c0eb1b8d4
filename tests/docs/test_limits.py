"""The page of limits says the defaults that the code has."""

from __future__ import annotations

from pathlib import Path

from fedleak import deadline, files, images, memory, wording
from fedleak.attacks import certainty, determined
from fedleak.capture import manifest, run
from simulations import prediction, sections
from simulations.evaluation.sweep import Sweep
from strategies import declared, reject_invalid, work

PAGE = Path(__file__).parents[2] / "docs" / "limits.md"


def test_the_page_says_the_defaults() -> None:
    attack, limits = sections.Attack(), work.Limits()
    assert attack.seconds == run.SECONDS
    assert declared._MANY == manifest.MANY
    expected = {
        "each update: `simulate`": f"{attack.seconds:g} s",
        "each update: `fedleak attack`": f"{run.SECONDS:g} s",
        "round: `MaliciousServer`": f"{limits.seconds:g} s, {limits.round_seconds:g} s",
        "each update: `run_attack`": f"{deadline.DEFAULT_SECONDS:g} s, none",
        "memory that an attack": f"{100 * memory.SHARE:g} % of what is free; "
        f"{memory.RESERVE:g} GiB",
        "cells of a sweep": f"{Sweep.model_fields['max_cells'].default}",
        "bytes of a file of tensors": f"{files.tensors() >> 30} GiB",
        "bytes of a file of settings": f"{files.TEXT >> 20} MiB; {files.TABLE >> 20} MiB; "
        f"{files.IMAGE >> 20} MiB",
        "depth of JSON": f"{files._DEEP}",
        "pixels of one image": f"{images.MAX_PIXELS:,}; {images.MAX_TOGETHER:,}",
        "images of an update": f"{manifest.MANY:,}",
        "local steps": f"{manifest.STEPS:,}",
        "examples that a reply": f"{reject_invalid._MOST_EXAMPLES:,}",
        "letters of a reason": f"{wording.LONGEST_REASON}; {wording.LONGEST_MESSAGE}",
        "unknowns of a batch": f"{determined.MOST}",
        "expected PSNR is computed": f"{certainty._UNKNOWNS}; {certainty._MOST}",
        "predicts for every client": f"{prediction.EVERY_CLIENT}",
    }
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    for words, default in expected.items():
        (row,) = [r for r in rows if words in r]
        assert row.split(" | ")[1] == default, row
