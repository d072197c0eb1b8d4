"""What several commands share: reading options, showing numbers."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedleak.errors import InvalidInputError


def read_options(
    pairs: Sequence[str], prior: str | None = None, public: Path | None = None
) -> dict[str, Any]:
    """Read KEY=VALUE; values are Python literals where they can be.

    ``prior`` and ``public`` have flags of their own, and are added where they are given.

    Raises
    ------
    InvalidInputError
        If one is not KEY=VALUE.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InvalidInputError(f"--option {pair!r} is not KEY=VALUE, as steps=300")
        try:
            out[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    flags = {"prior": prior, "public": public}
    return out | {key: value for key, value in flags.items() if value is not None}


def number(value: float | None) -> str:
    """Return a PSNR in dB; ``exact`` where it is infinite."""
    if value is None:
        return "-"
    return "exact" if value == float("inf") else f"{value:.1f}"


def near(path: Path) -> Path:
    """Return a path as seen from here, where it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
