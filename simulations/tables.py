"""Nested tables: read from TOML, overridden by ``section.key=value``, and explained when wrong."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fedleak.errors import FedleakError, InvalidInputError, nearest
from fedleak.files import read_text
from fedleak.wording import clean
from simulations.sections import Defence, Guard, Tamper

#: Sections that a text may stand for, as ``defence = "noise:0.1"``.
SHORT: dict[str, type[BaseModel]] = {"defence": Defence, "guard": Guard, "tamper": Tamper}
SHIPPED = Path(__file__).parent / "scenarios"


def read_table(
    source: str | Path, folder: Path = SHIPPED, kind: str = "scenario"
) -> dict[str, Any]:
    """Read a TOML file, or one that is shipped in ``folder``, by its name; unchecked.

    Raises
    ------
    InvalidInputError
        If it is missing or no TOML.
    """
    path = Path(source)
    if not path.suffix and (folder / f"{source}.toml").is_file():
        path = folder / f"{source}.toml"
    if not path.is_file():
        shipped = sorted(p.stem for p in folder.glob("*.toml"))
        raise InvalidInputError(
            f"there is no {kind} {str(source)!r}{nearest(str(source), shipped)}"
        )
    try:
        table = tomllib.loads(read_text(path))
    except RecursionError:
        raise InvalidInputError(f"{kind} {str(path)!r} is nested too deep") from None
    except (OSError, ValueError) as error:  # of TOML and of UTF-8, too
        raise InvalidInputError(f"{kind} {str(path)!r} is not valid TOML: {error}") from error
    table.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "run")
    return table


def override(table: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Put each ``"section.key=value"`` into a nested table, and return it."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InvalidInputError(f"--set {text!r}: write section.key=value")
        put(table, key.strip(), _value(value.strip()))
    return table


def put(table: dict[str, Any], dotted: str, value: Any) -> None:
    """Put a value into a nested table under ``"section.key"``."""
    *sections, key = dotted.split(".")
    for section in sections:
        inner = table.setdefault(section, {})
        if isinstance(inner, str) and section in SHORT:
            inner = table[section] = SHORT[section].model_validate(inner).model_dump()
        if not isinstance(inner, dict):
            raise InvalidInputError(f"{dotted!r}: {section!r} is a value, not a section")
        table = inner
    table[key] = value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except RecursionError:
        raise InvalidInputError(f"--set {clean(text)!r} is nested too deep") from None
    except tomllib.TOMLDecodeError:
        return text  # a bare word: --set data.name=CIFAR10


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Return what is wrong with a table, in one line."""
    return "; ".join(_explain(e, root) for e in error.errors())


def _explain(error: Any, root: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = root
        for part in error["loc"][:-1]:
            place = getattr(section, "model_fields", {}).get(part)
            section = place.annotation if place is not None else Defence  # in `compare`
        known = getattr(section, "model_fields", Defence.model_fields)
        return f"unknown key {where!r}{nearest(str(error['loc'][-1]), known)}"
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, FedleakError):
        return f"{where}: {cause}" if where else str(cause)
    return f"{where} = {error['input']!r}: {error['msg']}"
