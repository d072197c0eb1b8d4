"""``fedleak list``: what there is by name, with the packages that added to it."""

from __future__ import annotations

import functools
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from fedleak.commands.console import PlainConsole
from fedleak.errors import UnknownNameError
from fedleak.registry import Registry

_console = PlainConsole()
#: The package that a name comes from, where it is not another one.
_OURS = "fedleak"


@dataclass(frozen=True)
class Entry:
    """One name.

    Attributes
    ----------
    name : str
    summary : str
        One line; of a broken entry point empty.
    unit : str
        What a defence's strength is; else empty.
    package : str
        That adds the name.
    broken : str
        Why it cannot be used; empty where it can.
    """

    name: str
    summary: str
    unit: str = ""
    package: str = _OURS
    broken: str = ""


def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="attacks, defences, losses, optimisers, models, datasets, priors, tampers, "
            "scenarios or sweeps [default: all]"
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """List what there is by name, with one line each; also what other packages add."""
    if kind is not None and kind not in KINDS:
        raise UnknownNameError("kind of thing to list", kind, KINDS)
    found = {k: entries(k) for k in ([kind] if kind else KINDS)}
    if json_:
        plain = {k: [asdict(e) for e in listed] for k, listed in found.items()}
        print(json.dumps(plain, indent=2))  # noqa: T201
        return
    for name, listed in found.items():
        _console.print(_table(name, listed))


def entries(kind: str) -> list[Entry]:
    """Return all names of a kind, in the order of the alphabet.

    Parameters
    ----------
    kind : str
        ``attacks``, ``defences``, ``losses``, ``optimisers``, ``models``, ``datasets``,
        ``priors``, ``scenarios``, ``sweeps``.

    Raises
    ------
    UnknownNameError
        If there is no such kind. Never because an entry point cannot be loaded.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of thing to list", kind, KINDS)
    return list(KINDS[kind]())


def summary(item: Any) -> str:
    """Return what a thing is in a line: its ``summary``, or its docstring's first sentence."""
    explicit = getattr(item, "summary", None)
    if isinstance(explicit, str):
        return explicit
    item = item.func if isinstance(item, functools.partial) else item
    # Its own: a class without a docstring would inherit that of its base.
    own = item.__dict__.get("__doc__") if inspect.isclass(item) else getattr(item, "__doc__", None)
    text = inspect.cleandoc(own or "").split("\n\n")[0]
    if not text or text.startswith(f"{getattr(item, '__name__', '')}("):  # made by dataclass
        return "(not described)"
    sentence = re.split(r"\.(?=\s+[A-Z]|$)", " ".join(text.split()))[0]
    return re.sub(r":\w+:`~?([^`]*)`|``([^`]*)``", r"\1\2", sentence)


def _registered(registry: Registry[Any]) -> Iterator[Entry]:
    for name in registry:
        package = registry.package_of(name) or _OURS
        try:
            item = registry[name]
            unit = getattr(item, "unit", "")
            yield Entry(name, summary(item), unit if isinstance(unit, str) else "", package)
        except (Exception, SystemExit) as error:  # another's code may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            yield Entry(name, "", "", package, reason)


def _attacks() -> Iterator[Entry]:
    from fedleak.attacks import ATTACKS

    yield from _registered(ATTACKS)


def _defences() -> Iterator[Entry]:
    from fedleak.defences import DEFENCES

    yield Entry("none", "The update is sent as it is")
    yield from _registered(DEFENCES)


def _losses() -> Iterator[Entry]:
    from fedleak.client import LOSSES

    yield from _registered(LOSSES)


def _optimisers() -> Iterator[Entry]:
    from fedleak.client import OPTIMISERS

    yield from _registered(OPTIMISERS)


def _models() -> Iterator[Entry]:
    from fedleak.models import MODELS

    yield from _registered(MODELS)
    yield Entry("FILE.py:FACTORY", "A function, or class, in a file that makes a torch model")
    yield Entry("module:FACTORY", "The same in an installed module", "", "any")


def _datasets() -> Iterator[Entry]:
    from fedleak.data import DATASETS, torchvision_names

    yield from _registered(DATASETS)
    for name in sorted(torchvision_names()):
        yield Entry(name, "As torchvision.datasets has it", "", "torchvision")


def _priors() -> Iterator[Entry]:
    from fedleak.priors import PRIORS

    yield from _registered(PRIORS)


def _tampers() -> Iterator[Entry]:
    from fedleak.tampers import TAMPERS

    yield Entry("none", "The honest model is sent")
    yield from _registered(TAMPERS)


def _scenarios() -> Iterator[Entry]:
    from simulations.tables import SHIPPED

    yield from _files(SHIPPED)


def _sweeps() -> Iterator[Entry]:
    from simulations.evaluation.sweep import SHIPPED

    yield from _files(SHIPPED)


def _files(folder: Path) -> Iterator[Entry]:
    """Read the comment above each file's tables."""
    for path in sorted(folder.glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        above = re.match(r"(?:#.*\n)*", text)
        words = " ".join((above.group() if above else "").replace("#", " ").split())
        name = tomllib.loads(text).get("name", path.stem)
        yield Entry(str(name), re.split(r"\.(?=\s+[A-Z]|$)", words)[0])


#: What can be listed, and how.
KINDS: dict[str, Callable[[], Iterator[Entry]]] = {
    "attacks": _attacks,
    "defences": _defences,
    "losses": _losses,
    "optimisers": _optimisers,
    "models": _models,
    "datasets": _datasets,
    "priors": _priors,
    "tampers": _tampers,
    "scenarios": _scenarios,
    "sweeps": _sweeps,
}


def _table(kind: str, listed: list[Entry]) -> Table:
    table = Table(
        title=kind, box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0), show_edge=False,
        title_style="bold",
    )  # fmt: skip
    several, units = any(e.package != _OURS for e in listed), any(e.unit for e in listed)
    table.add_column("name", no_wrap=True)
    table.add_column("")
    for shown, column in ((units, "strength"), (several, "from")):
        if shown:
            table.add_column(column)
    # Sixty data sets of one package are one line for a person; --json has all of them.
    many = [e.name for e in listed if e.package == "torchvision"]
    for e in listed:
        if e.package != "torchvision":
            text = f"broken: {e.broken}" if e.broken else e.summary
            cells = [e.name, text, *([e.unit] if units else []), *([e.package] if several else [])]
            table.add_row(*cells, style="red" if e.broken else "")
    if many:
        table.add_row("(torchvision)", ", ".join(many), "torchvision")
    return table
