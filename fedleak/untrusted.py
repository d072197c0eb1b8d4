"""Results that somebody else may have written, or damaged: what of them can be used.

A number that no run has written (an infinite round, an accuracy of 1e308) is none.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedleak import files
from fedleak.wording import LONGEST_REASON, clean, clean_reason

#: Columns that are text; all others are numbers.
TEXT = {
    "attack", "data", "defence", "kind", "model", "name", "reason", "scenario", "status",
    "strength", "exact", "client", "tamper",
}  # fmt: skip
#: Of columns whose name starts so, what can be true; of all others, the last.
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("round", 0, 1e9), ("seed", 0, 2**31), ("image", 0, 1e12), ("accuracy", 0, 1),
    ("identified", 0, 1), ("label_accuracy", 0, 1), ("psnr_db", -1e4, math.inf),
    ("psnr_fitted_db", -1e4, math.inf),
    ("predicted_psnr_db", -1e4, math.inf), ("ssim", -2, 2), ("label_", -1, 2**31),
    ("", -1e15, 1e15),
)  # fmt: skip
#: Of these only whole numbers.
_WHOLE = ("round", "seed", "image", "label_true", "label_inferred")


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
    low, high = next((low, high) for start, low, high in _RANGES if name.startswith(start))
    good = (numbers >= low) & (numbers <= high)
    if name in _WHOLE:
        good &= numbers == numbers.round()
    return numbers.where(good)


def dig(table: Any, *keys: str, default: Any = None) -> Any:
    """Return a nested value of untrusted JSON; ``default`` where there is none."""
    for key in keys:
        if not isinstance(table, dict) or key not in table:
            return default
        table = table[key]
    return default if table is None else table


def finite(value: Any) -> float | None:
    """Return a finite number of untrusted JSON, or None."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if good and np.isfinite(float(value)) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def rows(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a list of untrusted JSON."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def within(folder: Path, names: Iterable[Any]) -> list[Path]:
    """Return the subfolders with these names that exist; names that lead elsewhere are left out."""
    found = [folder / name for name in map(str, names) if name == Path(name).name and name]
    return [path for path in found if path.name != ".." and path.is_dir()]
