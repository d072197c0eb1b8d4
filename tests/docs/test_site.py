"""The site: it builds without a warning, and needs no network to be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedleak
import fedleak.attacks
import fedleak.capture
import fedleak.defences
import fedleak.metric
import fedleak.priors
import strategies

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_needs_no_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=250, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30
    loaded = re.compile(r"""<(?:script|img|iframe)[^>]*\ssrc="?(https?:)?//|<link[^>]*(?:stylesheet|
        preconnect|preload)[^>]*href="?(https?:)?//""", re.VERBOSE)  # fmt: skip
    for page in pages:
        assert not loaded.search(page.read_text()), page
    assert (tmp_path / "results" / "demo" / "reconstructions.png").is_file()


def test_pictures_are_small_and_used() -> None:
    pages = "".join(p.read_text() for p in (ROOT / "docs").rglob("*.md"))
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert picture.stat().st_size < 150_000, picture
        assert f"pictures/{picture.name})" in pages, picture


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(p.read_text() for p in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: .*?(\w+)$", pages, re.MULTILINE))
    shown |= {"Quality", "score", "FedleakError"}  # in modules that are shown as a whole
    of = (fedleak, fedleak.attacks, fedleak.capture, fedleak.defences, fedleak.metric,
          fedleak.priors, strategies)  # fmt: skip
    public = {n for m in of for n in m.__all__ if callable(getattr(m, n))}
    assert public - shown == set()
