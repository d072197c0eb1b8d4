"""What the house's own files promise: imports, links, forms, hooks, citation."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.documents.reading import ROOT

ALLOWED = {
    "fedleak": {"fedleak"},
    "strategies": {"fedleak", "strategies", "flwr"},
    "simulations": {"fedleak", "strategies", "simulations", "flwr", "ray", "flwr_datasets"},
}
#: They give the packages beside fedleak its name; `import fedleak` does not import them.
ALIASES = {"fedleak/strategies.py", "fedleak/simulations.py"}
WATCHED = set().union(*ALLOWED.values())
#: The roof: the one room of the library that may reach for the federation.
COMMANDS = ROOT / "fedleak" / "commands"


def imports(file: Path, everywhere: bool) -> set[str]:
    """Return the top-level packages that a file imports; in its functions too, or not."""
    tree = ast.parse(file.read_text())
    inner = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)) or _type_checking(outer)
        for node in ast.walk(outer)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if not everywhere and id(node) in inner:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_nothing_of_the_library_imports_commands() -> None:
    for file in (ROOT / "fedleak").rglob("*.py"):
        if file.parent != COMMANDS and file.name != "__main__.py":
            assert "fedleak.commands" not in file.read_text(), file


@pytest.mark.parametrize(
    ("room", "above"),
    [
        ("attacks", ["metric", "capture", "report", "paper"]),
        ("systems", ["attacks", "metric", "capture", "defences", "priors"]),
        ("metric", ["attacks", "capture", "report", "paper"]),
        ("solvers", ["systems", "priors", "attacks", "metric"]),
    ],
)
def test_no_room_imports_what_stands_on_it(room: str, above: list[str]) -> None:
    for file in (ROOT / "fedleak" / room).rglob("*.py"):
        for name in above:
            assert not re.search(rf"\b(from|import) fedleak\.{name}\b", file.read_text()), file


def _room(module: str) -> str:
    """Return the folder, or the single file, that a module of ours lies in."""
    parts = module.split(".")
    if parts[0] != "fedleak" or len(parts) == 1:
        return parts[0]
    return ".".join(parts[:2])


def test_no_circle_of_rooms() -> None:
    """Each room can be read, tested and thrown away with what stands on it alone."""
    rooms: dict[str, set[str]] = {}
    for file in (f for package in ALLOWED for f in (ROOT / package).rglob("*.py")):
        if str(file.relative_to(ROOT)) in ALIASES:
            continue
        own = _room(".".join(file.relative_to(ROOT).with_suffix("").parts))
        tree = ast.parse(file.read_text())
        typing = {id(n) for t in ast.walk(tree) if _type_checking(t) for n in ast.walk(t)}
        for node in (n for n in ast.walk(tree) if id(n) not in typing):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ALLOWED:
                inside = [f"{node.module}.{a.name}" for a in node.names]
                named = node.module.count(".") or not (ROOT / node.module / "__init__.py").is_file()
                rooms.setdefault(own, set()).update(
                    {_room(node.module)} if named else {_room(m) for m in inside}
                )
    for own, below in rooms.items():
        below.discard(own)
        below.discard("fedleak")  # names that the front door gives to users
    list(graphlib.TopologicalSorter(rooms).static_order())  # CycleError names the circle


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    wrong = {}
    for file in (ROOT / package).rglob("*.py"):
        name = str(file.relative_to(ROOT))
        if name in ALIASES:
            continue
        found = imports(file, everywhere=False) & WATCHED
        # Commands import the federation when they are called, and Ray is imported where it is
        # asked for; nothing else of the library reaches for them, early or late.
        if file.parent != COMMANDS:
            found |= imports(file, everywhere=True) & (WATCHED - {"ray"})
        if found - ALLOWED[package]:
            wrong[name] = found - ALLOWED[package]
    assert not wrong


def markdown() -> list[str]:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/**/*.md")]
    return sorted(str(f.relative_to(ROOT)) for f in files if "runs" not in f.parts)


@pytest.mark.parametrize("document", markdown())
def test_links_lead_somewhere(document: str) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", (ROOT / document).read_text(), flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert file.exists(), f"{target} is not there"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}: known are {sorted(anchors(file))}"


def anchors(file: Path) -> set[str]:
    """Return the anchors of a file's headings, as the sites that show it make them."""
    heads = re.findall(r"^#+ +(.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


def test_the_citation_is_one() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)  # all that 1.2.0 demands
    assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
    assert cited["license"] == "Apache-2.0"
    for work in (cited, *cited["references"]):
        assert work["title"]
        assert all(
            "name" in a or {"given-names", "family-names"} <= set(a) for a in work["authors"]
        )
    assert all("type" in r for r in cited["references"])


@pytest.mark.parametrize("name", ["bug.yml", "number.yml", "method.yml"])
def test_issue_forms(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    assert {"name", "description", "body"} <= set(form)
    asked = [item for item in form["body"] if item["type"] != "markdown"]
    assert len({item["id"] for item in asked}) == len(asked) > 0
    for item in asked:
        assert item["type"] in ("input", "textarea", "dropdown", "checkboxes")
        assert item["attributes"]["label"]


def test_the_hooks_of_pre_commit_are_those_of_make_lint(tmp_path: Path) -> None:
    file = ROOT / ".pre-commit-config.yaml"
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(file)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=60)
    (repository,) = yaml.safe_load(file.read_text())["repos"]
    assert repository["repo"] == "local"  # pre-commit downloads nothing
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    makefile = (ROOT / "Makefile").read_text()
    for hook in repository["hooks"]:
        tool = hook["entry"].removesuffix(" --force-exclude").removeprefix(".venv/bin/")
        assert f"$(BIN)/{tool}" in makefile, f"make lint does not run {tool}"
