"""What a defence is: a pure function of an update, and what an informed attacker knows of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from fedleak.errors import InvalidInputError, UnknownNameError
from fedleak.registry import Registry

#: An update as a defence is given it, by name of its parameters.
Tensors = dict[str, Tensor]


class Defence(ABC):
    """A frozen dataclass of parameters, and two pure functions.

    The first field is the strength: ``NAME:0.1`` sets it, ``NAME:0.1,other=2`` or
    ``NAME:strength=0.1,other=2`` others too. 0, or nothing, is no defence. Fields are of type
    float, int, a ``Literal`` of strings, or ``tuple[str, ...]`` (names, with commas between).

    Attributes
    ----------
    unit : str
        What the strength is, with its unit.
    rescales : {"", "update", "tensor"}
        What is multiplied by a factor that the receiver is not told: nothing, the update as a
        whole, or every tensor by one of its own.
    signs : bool
        Whether only the sign of each entry is sent.
    """

    unit: ClassVar[str]
    signs: ClassVar[bool] = False

    @property
    def rescales(self) -> Literal["", "update", "tensor"]:
        return ""

    @abstractmethod
    def __call__(self, update: Tensors, generator: torch.Generator) -> Tensors:
        """Return the defended update; floating point, and ``update`` is not changed."""

    @abstractmethod
    def errors(self, received: Tensors) -> Tensors:
        """Return how far each received entry may be from the true one.

        Parameters
        ----------
        received : dict of str to Tensor
            What the defence, and perhaps others after it, made of an update.

        Returns
        -------
        dict of str to Tensor, float64
            Standard deviations, in the unit of the entry, broadcastable to each tensor:
            0 for an exact entry, infinite for one that says nothing.
        """

    def contradiction(self, before: Sequence[Defence]) -> str:
        """Return why this makes no sense after the defences ``before``; empty where it does."""
        return ""

    def check(self, names: Sequence[str]) -> None:
        """Raise InvalidInputError if the defence does not fit updates with these names."""
        return

    @property
    def noise_multiplier(self) -> float | None:
        """Standard deviation of Gaussian noise in clips; None where nothing is guaranteed."""
        return None

    @property
    def strength(self) -> Any:
        """The first field; false where this is no defence."""
        return getattr(self, fields(self)[0].name)  # type: ignore[arg-type]

    def demand(self, key: str, maximum: float = math.inf, included: bool = False) -> None:
        """Raise InvalidInputError unless the field ``key`` is in [0, maximum)."""
        value = getattr(self, key)
        below = value <= maximum if included else value < maximum
        if not (value >= 0 and below):
            first = fields(self)[0].name  # type: ignore[arg-type]
            what, unit = ("strength", f" ({self.unit})") if key == first else (key, "")
            raise InvalidInputError(
                f"defence {DEFENCES.name_of(type(self))!r}: {what} {value} is not in "
                f"[0, {maximum}{']' if included else ')'}{unit}"
            )


#: Classes of defences.
DEFENCES: Registry[type[Defence]] = Registry("defence", "fedleak.defences")


def make_defence(name: str, strength: float | str) -> Defence:
    """Make a defence by name.

    Parameters
    ----------
    name : str
    strength : float or str
        A number, or what follows ``NAME:``.

    Raises
    ------
    UnknownNameError
        If there is no such defence or parameter.
    InvalidInputError
        If a value is no number, out of range, or contradicts another.
    """
    if name not in DEFENCES:
        raise UnknownNameError("defence", name, ["none", *DEFENCES])
    kind = DEFENCES[name]
    types = get_type_hints(kind)
    keys = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    named: dict[str, str] = {}
    if isinstance(strength, str):
        for item in filter(None, (part.strip() for part in strength.split(","))):
            key, equals, value = item.partition("=")
            if not equals:  # a bare value, or one more name
                value, key = item, next(reversed(named), keys[0])
                value = f"{named[key]},{value}" if key in named else value
            elif key not in keys:
                raise UnknownNameError(f"parameter of defence {name!r}", key, keys)
            named[key] = value
    else:
        named[keys[0]] = f"{strength:.17g}"
    return kind(**{key: _value(name, types[key], value) for key, value in named.items()})


def _value(defence: str, kind: Any, text: str) -> Any:
    """Read one parameter."""
    if get_origin(kind) is tuple:
        return () if text == "0" else tuple(filter(None, text.split(",")))
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise UnknownNameError(f"value for defence {defence!r}", text, get_args(kind))
        return text
    if kind is str:
        return text
    try:
        number = float(text)
    except ValueError as error:
        raise InvalidInputError(
            f"defence {defence!r}: {text!r} is not a number; write NAME:STRENGTH, as noise:0.1"
        ) from error
    if kind is int and number != int(number if math.isfinite(number) else 0):
        raise InvalidInputError(f"defence {defence!r}: {text} is not a whole number")
    return int(number) if kind is int else number


def rms(value: Tensor) -> Tensor:
    """Return the root mean square, float64; 0 of an empty tensor."""
    return value.double().square().mean().sqrt() if value.numel() else value.double().sum()
