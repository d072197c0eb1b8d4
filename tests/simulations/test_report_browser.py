"""The report in a real browser: it loads, sorts, slides, fits, and lets nothing in or out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedleak.report.page import write_report
from tests.fedleak.test_report import EVIL, LEAK, make_arms, make_pictures, make_run, write_csv

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), ""
)
pytest.importorskip("playwright")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed on this machine")
WIDTHS = (1400, 768, 400)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox"] if root else []
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report of tables written by hand: two defences, one unknown number, two rounds."""
    folder = make_arms(tmp_path_factory.mktemp("drawn"))
    about = json.loads((folder / "run.json").read_text())
    about["arms"] += ["prune-0.9", "clip-1"]
    (folder / "run.json").write_text(json.dumps(about))
    make_run(folder / "prune-0.9", (9.0, 110.0), "prune", 0.9)
    make_run(folder / "clip-1", ("", ""), "clip", 1)
    for arm in ("none", "noise-0.3"):
        make_pictures(folder / arm, 2)
    return write_report(folder)[0]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of a small federation under three defences."""
    from simulations.engines import quiet_flower, simulate
    from simulations.scenario import load_scenario

    out = tmp_path_factory.mktemp("simulated") / "run"
    quiet_flower()
    small = ["federation.clients=4", "federation.rounds=3", "data.max_test_images=50"]
    simulate(load_scenario("demo", small), out)
    return write_report(out)[0]


class Seen:
    """A page, and what it asked for and complained of."""

    def __init__(self, browser: Any, path: Path, width: int = 1400, **options: Any):
        options = {"viewport": {"width": width, "height": 900}, **options}
        self.page = browser.new_page(**options)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()

    def is_clean(self) -> None:
        assert self.complaints == []
        asked = [url for url in self.requests if not url.startswith("data:")]
        assert len(asked) == 1, asked
        assert asked[0].startswith("file://")

    def all_images_are_there(self, least: int) -> None:
        widths = self.page.evaluate("[...document.images].map(i => i.naturalWidth)")
        assert len(widths) >= least
        assert all(widths)


OPEN = "document.querySelectorAll('details').forEach(d => { d.open = true; })"
#: Elements whose text or box sticks out of the page, and are in nothing that scrolls.
STICKING_OUT = """() => [...document.querySelectorAll('body *')].filter(e => {
    const box = e.getBoundingClientRect();
    if (!box.width || e.closest('.scroll *') || e.closest('svg *')) return false;
    return box.right > document.documentElement.clientWidth + 1 || box.left < -1;
}).map(e => e.tagName + '.' + e.className)"""
#: Pairs of texts that lie on each other.
OVERLAPPING = """() => {
    const names = 'h1, h2, h3, p, dt, dd, td, th, figcaption, li, summary, .top > *, .bar *';
    const texts = [...document.querySelectorAll(names)].filter(e => e.checkVisibility()
        && !e.closest('svg') && !e.closest('details:not([open])'));
    const out = [];
    const range = document.createRange();
    const box = e => { range.selectNodeContents(e); return range.getBoundingClientRect(); };
    const boxes = texts.map(box);
    const say = e => e.textContent.slice(0, 30);
    for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < texts.length; j++) {
        if (texts[i].contains(texts[j]) || texts[j].contains(texts[i])) continue;
        const a = boxes[i], b = boxes[j];
        const scroll = texts[i].closest('.scroll') || texts[j].closest('.scroll');
        if (scroll && texts[i].closest('.scroll') !== texts[j].closest('.scroll')) continue;
        const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (w > 2 && h > 4) out.push(say(texts[i]) + ' | ' + say(texts[j]));
    }
    return out;
}"""
#: Texts with less contrast than WCAG AA asks for.
FAINT = """() => {
    const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
    const lum = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const c = parse(getComputedStyle(e).backgroundColor);
            if (c.length === 3 || c[3] === 1) return c;
        }
        return [255, 255, 255];
    };
    const out = [];
    for (const e of document.querySelectorAll('body *')) {
        const svg = e.tagName === 'text';
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || !e.checkVisibility() || e.closest('title, script, style')) continue;
        const style = getComputedStyle(e);
        const both = [parse(svg ? style.fill : style.color), behind(e)].map(lum);
        const contrast = (Math.max(...both) + .05) / (Math.min(...both) + .05);
        if (contrast < 4.5) out.push(e.tagName + ' ' + e.textContent.trim().slice(0, 30));
    }
    return out;
}"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(browser: Any, drawn: Path, width: int, scheme: str) -> None:
    with Seen(browser, drawn, width, color_scheme=scheme) as seen:
        seen.is_clean()
        seen.all_images_are_there(15)
        assert seen.page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        seen.page.evaluate(OPEN)
        assert seen.page.evaluate(STICKING_OUT) == []
        assert seen.page.evaluate(OVERLAPPING) == []
        assert seen.page.evaluate(FAINT) == []
        paper = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        one = "[...document.querySelectorAll('.chart')].filter(c => c.checkVisibility())"
        shown = seen.page.evaluate(one + ".map(c => c.classList.contains('narrow'))")
        assert shown
        assert all(narrow == (width == 400) for narrow in shown)


def test_the_verdict_and_a_picture_are_on_the_first_screen(browser: Any, drawn: Path) -> None:
    for width in WIDTHS:
        with Seen(browser, drawn, width) as seen:
            for what in ("h1", ".hero img", ".badge"):
                box = seen.page.locator(what).first.bounding_box()
                assert box is not None
                assert box["y"] + box["height"] < 900


def _column(page: Any, place: int) -> list[str]:
    cells = page.locator(f"table.arms tbody tr td:nth-child({place})").all_inner_texts()
    return [cell.replace("\xa0", " ").strip() for cell in cells]


def test_tables_sort_as_numbers_and_by_keyboard(browser: Any, drawn: Path) -> None:
    with Seen(browser, drawn) as seen:
        page = seen.page
        heads = page.locator("table.arms th").all_inner_texts()
        place = next(n for n, head in enumerate(heads, 1) if "median" in head)
        button = page.locator(f"table.arms th:nth-child({place}) button")
        assert _column(page, place) == ["145.0", "21.5", "59.5", "–"]
        button.click()
        assert _column(page, place) == ["145.0", "59.5", "21.5", "–"]
        button.press("Enter")
        assert _column(page, place) == ["21.5", "59.5", "145.0", "–"]
        head = page.locator(f"table.arms th:nth-child({place})")
        assert head.get_attribute("aria-sort") == "ascending"
        page.locator("table.arms th:nth-child(1) button").press("Space")
        assert _column(page, 1) == ["clip 1", "no defence", "noise 0.3", "prune 0.9"]
        assert head.get_attribute("aria-sort") is None
        seen.is_clean()


def test_the_slider_changes_the_pictures(browser: Any, drawn: Path) -> None:
    with Seen(browser, drawn) as seen:
        page = seen.page
        slider, panels = page.locator(".slider input"), page.locator(".panel:visible")
        assert panels.count() == 1
        before = (
            panels.get_attribute("data-round"),
            panels.locator("img").first.get_attribute("src"),
        )
        slider.press("Home" if before[0] == "2" else "End")
        after = (
            panels.get_attribute("data-round"),
            panels.locator("img").first.get_attribute("src"),
        )
        assert {before[0], after[0]} == {"1", "2"}
        assert before[1] != after[1]
        assert page.locator(".slider output").inner_text() == f"round {after[0]}"
        assert slider.get_attribute("aria-valuetext") == f"round {after[0]}"
        slider.press("ArrowLeft")
        slider.press("ArrowRight")
        assert panels.get_attribute("data-round") == "2"


def test_it_can_be_read_without_javascript(browser: Any, drawn: Path) -> None:
    with Seen(browser, drawn, java_script_enabled=False) as seen:
        page = seen.page
        assert page.locator(".panel:visible").count() == 1
        assert not page.locator(".slider").is_visible()
        assert page.locator("h1").is_visible()
        assert page.locator("table.arms tbody tr").count() == 4
        assert "With JavaScript, a slider shows the other 1 rounds" in page.inner_text("body")
        page.locator("summary").first.click()
        page.locator("details[open] table").first.wait_for()  # visible, or a timeout


def test_points_have_titles(browser: Any, drawn: Path) -> None:
    with Seen(browser, drawn) as seen:
        titles = seen.page.locator("svg.wide use title").all_text_contents()
        assert any("no defence, round 1: median 145.0" in t for t in titles)
        assert any("noise 0.3: accuracy 60.0 %" in t for t in titles)


@pytest.mark.slow
def test_hostile_strings_do_nothing(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, defence=EVIL, reason=EVIL, status=EVIL, versions={EVIL: EVIL})
    rows = [(r, EVIL, n, EVIL, EVIL, EVIL, 30.0, 31.0, 0.9, 1, 1, "ok", EVIL)
            for n in range(3) for r in (1, 2)]  # fmt: skip
    write_csv(tmp_path / "leakage.csv", LEAK, rows)
    make_pictures(tmp_path)
    for width in WIDTHS:
        with Seen(browser, write_report(tmp_path)[0], width) as seen:
            seen.page.wait_for_timeout(100)
            seen.is_clean()
            seen.all_images_are_there(8)
            assert seen.page.evaluate(STICKING_OUT) == []
            assert EVIL in seen.page.inner_text("body")


def test_without_pictures_the_verdict_is_as_wide(browser: Any, tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path))[0]
    for width in WIDTHS:
        with Seen(browser, path, width) as seen:
            for what in ("h1", ".told"):
                assert seen.page.locator(what).bounding_box()["width"] > min(0.5 * width, 800)
            assert seen.page.evaluate(OVERLAPPING) == []


def test_print_shows_everything(browser: Any, drawn: Path) -> None:
    with Seen(browser, drawn, 690) as seen:
        seen.page.emulate_media(media="print", color_scheme="dark")
        assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )
        assert seen.page.evaluate(STICKING_OUT) == []
        assert not seen.page.locator(".slider").is_visible()
        pdf = seen.page.pdf(format="A4", prefer_css_page_size=True)
        assert pdf.startswith(b"%PDF")
        assert seen.page.locator("details:not([open])").count() > 0  # closed again


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_a_real_run(browser: Any, simulated: Path, width: int) -> None:
    for scheme in ("light", "dark"):
        with Seen(browser, simulated, width, color_scheme=scheme) as seen:
            seen.is_clean()
            seen.all_images_are_there(3 * 4 * 4)
            seen.page.evaluate(OPEN)
            for check in (STICKING_OUT, OVERLAPPING, FAINT):
                assert seen.page.evaluate(check) == []
            words = seen.page.inner_text("body")
            assert "recovered all 12 attacked images so well that nobody can tell" in words
            assert "Simulated clients · one seed" in words
    assert simulated.stat().st_size < 1_000_000


@pytest.mark.slow
def test_a_real_evaluation(browser: Any, tmp_path: Path) -> None:
    from simulations.evaluation.run import evaluate
    from simulations.evaluation.sweep import Sweep

    sweep = Sweep(
        defences=("none",), strengths={"prune": [0.7, 0.99]}, seeds=(0, 1),
        set={"federation": {"clients": 3, "rounds": 3}, "attack": {"every": 3},
             "data": {"max_test_images": 50}},
    )  # fmt: skip
    evaluate(sweep, tmp_path / "out")
    path = write_report(tmp_path / "out")[0]
    for width in WIDTHS:
        with Seen(browser, path, width) as seen:
            seen.is_clean()
            seen.all_images_are_there(6)
            seen.page.evaluate(OPEN)
            for check in (STICKING_OUT, OVERLAPPING, FAINT):
                assert seen.page.evaluate(check) == []
            words = seen.page.inner_text("body").replace("\xa0", " ")
            assert "mean of 2 seeds" in words
            assert "Beware of tests by an attacker who does not know the defence" in words
            assert "predicted without an attack" in words
