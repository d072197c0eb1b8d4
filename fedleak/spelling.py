"""What has options, as text: ``NAME`` or ``NAME:KEY=VALUE,...``, the same words everywhere."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fedleak.errors import InvalidInputError, UnknownNameError
from fedleak.registry import Registry

T = TypeVar("T")


def parse(registry: Registry[type[T]], text: str) -> T:
    """Make what a text names, as ``cross-entropy:label_smoothing=0.1``.

    Parameters
    ----------
    registry : Registry
        Of dataclasses.
    text : str
        Values of several numbers are separated by ``/``, as in ``weight=1/1/5``.

    Raises
    ------
    UnknownNameError, InvalidInputError
        If there is no such name or key, or a value is not of its kind.
    """
    name, _, rest = text.strip().partition(":")
    kind = registry[name]
    types = get_type_hints(kind)
    keys = [f.name for f in fields(kind) if f.init] if is_dataclass(kind) else []
    where = f"{registry.kind} {text!r}"
    options: dict[str, Any] = {}
    for key, value in pairs(rest.split(","), where, f"{name}:KEY=VALUE").items():
        if key not in keys:
            raise UnknownNameError(f"option of {registry.kind} {name!r}", key, keys)
        options[key] = _value(where, types[key], value)
    try:
        return kind(**options)
    except TypeError as error:  # an option without a default
        raise InvalidInputError(f"{registry.kind} {text!r}: {error}") from error


def pairs(parts: Iterable[str], where: str, form: str) -> dict[str, str]:
    """Read ``KEY=VALUE`` of each part; empty parts are passed over.

    Parameters
    ----------
    parts : iterable of str
    where, form : str
        Where they stand, and what to write there, for the message.

    Raises
    ------
    InvalidInputError
        If one is of another form, or a key comes twice.
    """
    found: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in parts)):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not (key.isidentifier() and equals and value):
            raise InvalidInputError(f"{where}: write {form}, not {part!r}")
        if key in found:
            raise InvalidInputError(f"{where}: {key!r} is given twice")
        found[key] = value
    return found


def literal(text: str) -> Any:
    """Return the Python literal that a text is, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def spell(registry: Registry[type[T]], item: T) -> str:
    """Return the text that :func:`parse` makes an equal of; options at their default are left out.

    Raises
    ------
    InvalidInputError
        If its class is not in the registry, or is no dataclass.
    """
    name = registry.name_of(type(item))
    if name is None or not hasattr(item, "__dataclass_fields__"):
        raise InvalidInputError(
            f"{registry.kind} {type(item).__name__} has no name: register it (group "
            f"{registry.group}) and make it a dataclass, so that files can name it"
        )
    told = []
    for field in fields(item):  # type: ignore[arg-type]
        value = getattr(item, field.name)
        if field.default is MISSING or value != field.default:
            told.append(f"{field.name}={_text(value)}")
    return f"{name}:{','.join(told)}" if told else name


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_text, value))
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _value(where: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is tuple:
        return tuple(_value(where, get_args(kind)[0], part) for part in text.split("/") if part)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InvalidInputError(f"{where}: {text!r} is not true or false")
        return text.lower() == "true"
    if kind not in (int, float):
        return text
    try:
        number = float(text)
    except ValueError as error:
        raise InvalidInputError(f"{where}: {text!r} is not a number") from error
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise InvalidInputError(
            f"{where}: {text} is not a {'whole' if kind is int else 'finite'} number"
        )
    return kind(number)
