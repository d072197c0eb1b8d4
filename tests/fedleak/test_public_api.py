"""What other people's code may rely on: names, signatures, and that they are documented.

After a change that is meant, write the list anew, and say so in CHANGELOG.md::

    python -m tests.fedleak.test_public_api
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODULES = (
    "fedleak", "fedleak.metric", "fedleak.attacks", "fedleak.client", "fedleak.defences",
    "fedleak.priors", "fedleak.systems", "fedleak.capture", "fedleak.laboratory", "strategies",
    "simulations",
)  # fmt: skip
SNAPSHOT = Path(__file__).with_name("public_api.txt")


def names() -> list[tuple[str, str, Any]]:
    """Return (module, name, object) of all that is public."""
    found = []
    for place in MODULES:
        module = importlib.import_module(place)
        found += [(place, name, getattr(module, name)) for name in module.__all__]
    return found


def described() -> str:
    """Return the public names with their signatures, one a line."""
    return "".join(
        f"{line}\n" for place, name, item in names() for line in _lines(place, name, item)
    )


def _lines(place: str, name: str, item: Any) -> Iterator[str]:
    if not inspect.isclass(item):
        shown = _signature(item) if inspect.isfunction(item) else f": {type(item).__name__}"
        yield f"{place}.{name}{shown}" if name != "__version__" else f"{place}.{name}: str"
        return
    yield f"{place}.{name}{_signature(item)}"
    for member, value in sorted(_members(item)):
        yield f"{place}.{name}.{member}{_signature(value) if callable(value) else ''}"


def _members(item: type) -> list[tuple[str, Any]]:
    """Return the public methods and properties that this project's classes define."""
    found: dict[str, Any] = {}
    for base in reversed(item.__mro__):
        if base.__module__.split(".")[0] in ("fedleak", "strategies", "simulations"):
            found |= {n: v for n, v in vars(base).items() if not n.startswith("_")}
    kinds = (property, staticmethod, classmethod)
    return [
        (n, getattr(item, n) if isinstance(v, (staticmethod, classmethod)) else v)
        for n, v in found.items()
        if inspect.isfunction(v) or isinstance(v, kinds)
    ]


def _signature(item: Any) -> str:
    if inspect.isclass(item) and issubclass(item, Exception):
        return "(Exception)"
    try:
        text = str(inspect.signature(item))
    except (TypeError, ValueError):
        return ""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    # Annotations print with their modules, which is where things lie, not what they are.
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text).replace("'", "")


def test_the_public_names_and_signatures_are_those_written_down() -> None:
    assert described() == SNAPSHOT.read_text(), (
        "the public interface has changed; if that is meant: "
        "python -m tests.fedleak.test_public_api, and a line in CHANGELOG.md"
    )


CALLABLES = [
    pytest.param(item, id=f"{place}.{name}")
    for place, name, item in names()
    if inspect.isclass(item) or inspect.isfunction(item)
]


@pytest.mark.parametrize("item", CALLABLES)
def test_public_names_are_documented(item: Any) -> None:
    """A summary; every parameter (or attribute) by its name; Returns where there is something."""
    doc = inspect.getdoc(item) or ""
    assert re.match(r"\S[^\n]*(\n[^\n]+)?[.:](\n\n|$)", doc), "no summary"
    assert not missing(item, doc), f"not in Parameters or Attributes: {missing(item, doc)}"
    if inspect.isfunction(item) and inspect.signature(item).return_annotation not in (None, "None"):
        assert re.search(r"^(Returns|Yields)\n-{6,7}$", doc, re.MULTILINE), "no Returns"


def missing(item: Any, doc: str) -> set[str]:
    """Return the parameters that a docstring does not list."""
    if inspect.isclass(item) and (issubclass(item, Exception) or getattr(item, "_is_protocol", 0)):
        return set()
    parameters = inspect.signature(item).parameters.values()
    if any(hasattr(base, "model_fields") for base in getattr(item, "__mro__", ())):
        return set()  # pydantic's fields carry their descriptions
    listed: set[str] = set()
    for section in re.findall(r"^(?:Parameters|Attributes)\n-+\n(.*?)(?=^\w+\n-+$|\Z)", doc,
                              re.DOTALL | re.MULTILINE):  # fmt: skip
        heads = re.findall(r"^[*\w][^\n:]*", section, re.MULTILINE)
        listed |= {name.strip().lstrip("*") for head in heads for name in head.split(",")}
    return {p.name for p in parameters if not p.name.startswith("_")} - listed


def test_what_is_not_documented_is_found() -> None:
    def sample(a: int, b: int, *rest: int) -> int:
        """Add.

        Parameters
        ----------
        a, rest : int

        Returns
        -------
        int
        """
        return a + b

    assert missing(sample, inspect.getdoc(sample) or "") == {"b"}


def test_importing_the_library_is_light() -> None:
    """No federation, and nothing that draws or tabulates: each costs seconds."""
    code = (
        "import sys, fedleak; print([m for m in "
        "('flwr', 'ray', 'matplotlib', 'seaborn', 'pandas', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["fedleak", "strategies", "simulations"])
def test_types_are_shipped(package: str) -> None:
    file = importlib.import_module(package).__file__
    assert file is not None
    assert Path(file).with_name("py.typed").is_file()


def test_simulations_has_the_names_that_it_lists() -> None:
    import simulations

    assert set(simulations.__all__) == set(simulations._PLACES)
    with pytest.raises(AttributeError, match="no attribute 'run_everything'"):
        _ = simulations.run_everything


if __name__ == "__main__":
    SNAPSHOT.write_text(described())
