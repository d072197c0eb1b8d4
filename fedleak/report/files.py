"""Reading what a folder holds: damaged, older and incomplete files are noted, and never trusted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedleak import files, untrusted
from fedleak.errors import InvalidInputError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    InvalidInputError
        If there is none, or it is damaged.
    """
    try:
        found = files.read_json(path)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{str(path)!r} cannot be read as JSON ({error}); repeat the run that wrote it, or "
            "take the file from a copy"
        ) from error
    if not isinstance(found, dict):
        raise InvalidInputError(f"{str(path)!r} holds no JSON object; it was not made by fedleak")
    return found


def try_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read a JSON object; an empty one, and a note, where that fails."""
    if not path.is_file():
        notes.append(f"{path.name} is missing: what it says of scenario and versions is unknown.")
        return {}
    try:
        return read_json(path)
    except InvalidInputError as error:
        notes.append(f"{path.name} was left out: {_bare(error, path)}")
        return {}


def _bare(error: Exception, path: Path) -> str:
    """Return a message without the folder: the report is sent to others."""
    return str(error).replace(str(path), path.name)


def read_table(path: Path, columns: Sequence[str], notes: list[str]) -> pd.DataFrame:
    """Read a CSV file as numbers and text; what is missing or damaged becomes NaN and a note.

    Parameters
    ----------
    path : Path
    columns : sequence of str
        Those that the report uses. Ones that the file lacks are NaN, or empty text.
    notes : list of str
        What to tell the reader is added here.

    Returns
    -------
    DataFrame
        With all of ``columns``; empty where there is no such file.
    """
    where = f"{path.parent.name}/{path.name}"
    kinds = {c: object if c in untrusted.TEXT else float for c in columns}
    empty = pd.DataFrame({c: pd.Series(dtype=kind) for c, kind in kinds.items()})
    if not path.exists():
        notes.append(f"{where} is missing.")
        return empty
    try:
        found = untrusted.read_table(path)
    except (OSError, ValueError) as error:
        notes.append(f"{where} cannot be read and was left out: {_bare(error, path)}")
        return empty
    missing = [c for c in columns if c not in found]
    if missing and len(found):
        notes.append(f"{where} has no {', '.join(missing)}: an earlier version wrote it.")
    found = found.reindex(columns=list(columns))
    return found.assign(**{c: untrusted.as_column(found[c], c) for c in missing})


def to_toml(table: dict[str, Any]) -> str:
    """Write nested settings as TOML with dotted keys; what is None or empty is left out."""
    lines: list[str] = []

    def walk(prefix: str, inner: dict[str, Any]) -> None:
        for key, value in inner.items():
            name = f"{prefix}{_key(str(key))}"
            if isinstance(value, dict):
                walk(f"{name}.", value)
            elif value is not None and value not in ([], ()):
                lines.append(f"{name} = {_value(value)}")

    walk("", table)
    return "\n".join(lines)


def _key(key: str) -> str:
    bare = key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else _quoted(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value if v is not None) + "]"
    if isinstance(value, dict):
        pairs = (f"{_key(str(k))} = {_value(v)}" for k, v in value.items() if v is not None)
        return "{" + ", ".join(pairs) + "}"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
