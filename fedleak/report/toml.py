"""Settings as TOML, to repeat what a folder holds."""

from __future__ import annotations

import json
from typing import Any


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
