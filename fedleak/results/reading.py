"""Reading what a folder holds: damaged, older and incomplete files are noted, and never trusted."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pandas as pd

from fedleak import files
from fedleak.errors import InvalidInputError
from fedleak.results.format import RANGES, TEXT, WHOLE, Table
from fedleak.wording import LONGEST_REASON, clean, clean_reason


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
    """Return a message without the folder: reports are sent to others."""
    return str(error).replace(str(path), path.name)


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file as numbers and text; what cannot be is NaN, or an empty text.

    Raises
    ------
    OSError, ValueError
        If it is missing, no file, too large, empty, or no table.
    """
    # Row by row as text: a killed run may have left half a row.
    content = files.read_bytes(path, files.TABLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)  # of rows that are too long
        found = pd.read_csv(
            io.BytesIO(content), dtype=str, keep_default_na=False, na_values=[""],
            encoding_errors="replace", on_bad_lines="skip", index_col=False,
        )  # fmt: skip
    found = found.loc[:, ~found.columns.duplicated()]
    return found.assign(**{str(c): as_column(found[c], str(c)) for c in found})


def as_column(values: pd.Series, name: str) -> pd.Series:
    """Return a column as text, or as numbers that can be true."""
    if name in TEXT:
        tidy = clean_reason if name == "reason" else lambda value: clean(value, LONGEST_REASON)
        return values.fillna("").astype(str).map(tidy).astype(object)
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    low, high = next((low, high) for start, low, high in RANGES if name.startswith(start))
    good = (numbers >= low) & (numbers <= high)
    if name in WHOLE:
        good &= numbers == numbers.round()
    return numbers.where(good)


def try_table(folder: Path, table: Table, notes: list[str]) -> pd.DataFrame:
    """Read a table of a folder; what is missing or damaged becomes NaN and a note.

    Returns
    -------
    DataFrame
        With all columns of ``table``; empty where there is no such file.
    """
    where = f"{folder.name}/{table.file}"
    path = folder / table.file
    if not path.exists():
        notes.append(f"{where} is missing.")
        return nothing(table)
    try:
        found = read_table(path)
    except (OSError, ValueError) as error:
        notes.append(f"{where} cannot be read and was left out: {_bare(error, path)}")
        return nothing(table)
    missing = [c for c in table.columns if c not in found and c not in table.quiet]
    if missing and len(found):
        notes.append(f"{where} has no {', '.join(missing)}: an earlier version wrote it.")
    return _complete(found, table)


def nothing(table: Table) -> pd.DataFrame:
    """Return a table without rows."""
    kinds = {c: object if c in TEXT else float for c in table.columns}
    return pd.DataFrame({c: pd.Series(dtype=kind) for c, kind in kinds.items()})


def _complete(found: pd.DataFrame, table: Table) -> pd.DataFrame:
    missing = [c for c in table.columns if c not in found]
    found = found.reindex(columns=list(table.columns))
    return found.assign(**{c: as_column(found[c], c) for c in missing})


def demand_table(folder: Path, table: Table) -> tuple[pd.DataFrame, list[str]]:
    """Read a table of a run without which nothing can be said, and name what it lacks.

    Returns
    -------
    DataFrame
        Rows of which a killed run wrote half are left out.
    list of str
        Columns of later versions that it does not have.

    Raises
    ------
    InvalidInputError
        If it is missing, damaged, or lacks a column that is needed.
    """
    path = folder / table.file
    try:
        found = read_table(path)
    except FileNotFoundError as error:
        raise InvalidInputError(
            f"{str(path)!r} is missing; run the scenario again with --overwrite"
        ) from error
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise InvalidInputError(
            f"{str(path)!r} cannot be read ({error}); remove what is not of fedleak in it, or "
            "run the scenario again with --overwrite"
        ) from error
    lacking = [c for c in table.needed if c not in found]
    if lacking:
        raise InvalidInputError(
            f"{str(path)!r} has no column {lacking[0]!r}; it is not of a run, or of a version "
            "too old: run the scenario again"
        )
    late = [c for c in table.late if c not in found]
    whole = _complete(found, table).dropna(subset=["round"])
    return whole.astype({"round": int}), late
