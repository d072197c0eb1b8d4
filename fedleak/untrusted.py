"""What somebody else may have written, or damaged: what of it can be used.

A number that no run has written (an infinite round, an accuracy of 1e308) is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


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
