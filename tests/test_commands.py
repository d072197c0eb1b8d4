"""Every command and every Python block of the documents runs, in order, in one folder for each.

What takes minutes as written is shortened: :mod:`tests.documents.table` says what and why.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.documents import folder, table
from tests.documents.reading import ROOT, Step, cut, documents, spans, split, steps
from tests.documents.walk import Walk, check_module, check_options, recipe

STEPS = [step for document in documents() for step in steps(document)]
COMMANDS = [step for step in STEPS if step.language == "sh"]


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Walk]:
    """Return ``document -> Walk``: one folder for each document."""
    return cache(lambda document: Walk(document, tmp_path_factory.mktemp("reader")))


@pytest.mark.slow
@pytest.mark.parametrize("step", [s for s in STEPS if not table.own_test(s.document)], ids=str)
def test_what_the_documents_say_works(step: Step, walk: Callable[[str], Walk]) -> None:
    walk(step.document).do(step)


@pytest.mark.parametrize("document", filter(table.own_test, documents()))
def test_a_document_with_a_test_of_its_own_is_in_it(document: str) -> None:
    own = table.own_test(document)
    assert own is not None
    assert Path(document).name in (ROOT / own).read_text()


@pytest.mark.parametrize("step", COMMANDS, ids=str)
def test_a_command_is_known_and_has_its_options(step: Step) -> None:
    other = table.elsewhere(step.text)
    if other is not None:
        assert other.words in (ROOT / other.file).read_text(), f"{other.file} does not run it"
        words = split(step.text)
        if words[0] == "make":
            recipe(words[1])
        gone = [w for w in words if w.startswith("tests/") and not (ROOT / w).exists()]
        assert not gone, f"{gone} are no tests"
        return
    if table.own_test(step.document) is not None and "fedleak" not in step.text:
        return
    unknown = folder.placeholders(step.text) - set(folder.PLACEHOLDERS)
    assert not unknown, f"{unknown}: say in tests/documents/folder.py what it stands for"
    words, _ = cut(split(table.shortened(step.text)))
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    if Path(words[0]).name == "fedleak":
        check_options(words[1:])
    elif words[1:2] == ["-m"] and words[2].startswith("tests."):
        check_module(words[2], words[3:])


SPANS = [(document, span) for document in documents() for span in spans(document)]


@pytest.mark.parametrize(("document", "span"), SPANS, ids=lambda v: v)
def test_a_command_within_a_sentence_has_its_options(document: str, span: str) -> None:
    words = split(span)
    given = {w.split("=")[0] for w in words if w.startswith("--")}
    name = words[1] if len(words) > 1 else ""
    if name.isupper():
        return
    whole = words[1:] if len(words) > 2 and not given & {words[-1]} else None
    if whole is None or "reconstruct" in whole:  # a command that is only named
        known = _options(name)
        assert given <= known, f"fedleak {name} has no {given - known}"
    else:
        check_options(whole)


def _options(name: str) -> set[str]:
    from typer.main import get_command

    from fedleak.commands.app import app

    command = get_command(app)
    if not name.startswith("-"):
        command = command.commands[name]  # type: ignore[attr-defined]
    return {o for p in command.params for o in p.opts} | {"--help"}


def test_the_table_has_no_dead_rules() -> None:
    """What shortens nothing hides that a document has changed."""
    texts = [s.text for s in COMMANDS] + [c for t in ("demo",) for c in recipe(t)]
    dead = []
    for rule in table.SHORTER:
        seen = False
        for text in texts:
            for other in table.SHORTER:
                seen |= other is rule and re.search(rule.pattern, text) is not None
                text = (
                    re.sub(other.pattern, other.replace, text)
                    if other.replace is not None
                    else text
                )
        if not seen:
            dead.append(rule.pattern)
    assert not dead


@pytest.mark.parametrize(
    ("command", "before", "after"),
    [
        ("fedleak list 2> 'a b'", ["fedleak", "list"], ["2>", "a b"]),
        ("fedleak list 2>a", ["fedleak", "list"], ["2>", "a"]),
        ("fedleak list >> a 2>&1", ["fedleak", "list"], [">>", "a", "2>&1"]),
        ("fedleak list --json|head -n 2", ["fedleak", "list", "--json"], ["|", "head", "-n", "2"]),
        ("fedleak audit --seed 2 > a", ["fedleak", "audit", "--seed", "2"], [">", "a"]),
    ],
)
def test_where_output_goes_is_no_option(command: str, before: list[str], after: list[str]) -> None:
    assert cut(split(command)) == (before, after)


def test_each_stream_goes_where_the_line_says(tmp_path: Path) -> None:
    walk = Walk("README.md", tmp_path)
    with walk._inside():
        walk.run("fedleak --log-json list priors > out 2> events.jsonl")
    assert "gaussian" in (tmp_path / "out").read_text()
    assert '"event": "start"' in (tmp_path / "events.jsonl").read_text()


def test_a_command_that_nobody_knows_fails(tmp_path: Path) -> None:
    walk = Walk("README.md", tmp_path)
    with pytest.raises(AssertionError, match="neither run nor in the table"):
        walk.run("curl example")
    with pytest.raises(AssertionError, match="no command"):
        check_options(shlex.split("recover --fast"))
    with pytest.raises(Exception, match="No such option"):
        check_options(shlex.split("audit --model cnn2-v2 --fast"))
    with pytest.raises(AssertionError, match="has no"):
        check_module("tests.benchmarks.pairs", ["--fast"])
