"""What a defence is, how it is named, and how it is applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.registry import Registry

Update = dict[str, Tensor]
#: ``defence(update, strength, generator) -> update``; must not change its argument.
Function = Callable[[Update, float, torch.Generator], Update]


@dataclass(frozen=True)
class Defence:
    """A defence and what its strength means.

    Attributes
    ----------
    function : callable
        ``(update, strength, generator) -> update``.
    unit : str
        What the strength is, with its unit.
    maximum : float
        The largest strength allowed; the smallest is 0, which leaves the update alone.
    maximum_included : bool
        Whether the maximum itself is allowed.
    """

    function: Function
    unit: str
    maximum: float = float("inf")
    maximum_included: bool = False

    def check(self, name: str, strength: float) -> None:
        """Raise InvalidInputError if the strength is out of range."""
        below = strength <= self.maximum if self.maximum_included else strength < self.maximum
        if not (strength >= 0 and below):
            closing = "]" if self.maximum_included else ")"
            raise InvalidInputError(
                f"defence {name!r}: strength {strength} is not in [0, {self.maximum}{closing} "
                f"({self.unit})"
            )


DEFENCES: Registry[Defence] = Registry("defence", "fedleak.defences")


@dataclass(frozen=True)
class DefenceSpec:
    """A defence by name with its strength; ``none`` is no defence."""

    name: str = "none"
    strength: float = 0.0

    def __post_init__(self) -> None:
        if self.name == "none":
            if self.strength:
                raise InvalidInputError(
                    f"defence 'none' has no strength, but {self.strength} was given; "
                    "name a defence or leave the strength out"
                )
            return
        if self.name not in DEFENCES:
            from fedleak.errors import UnknownNameError

            raise UnknownNameError("defence", self.name, ["none", *DEFENCES])
        DEFENCES[self.name].check(self.name, self.strength)

    @property
    def label(self) -> str:
        """The defence as one word, for file names and legends: ``noise-0.1``."""
        return self.name if self.name == "none" else f"{self.name}-{self.strength:g}"


def parse_defence(text: str) -> DefenceSpec:
    """Read ``"name"`` or ``"name:strength"``.

    Raises
    ------
    InvalidInputError
        If the strength is no number or out of range, or the name unknown.
    """
    name, _, strength = text.partition(":")
    try:
        return DefenceSpec(name.strip(), float(strength) if strength else 0.0)
    except ValueError as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(
            f"defence {text!r}: {strength!r} is not a number; write NAME:STRENGTH, as noise:0.1"
        ) from error


def defend(update: Update, spec: DefenceSpec, seed: int) -> Update:
    """Return the update as the defence leaves it.

    Parameters
    ----------
    update : dict of str to Tensor
        A gradient, or a change of weights; any float dtype. Integer entries (counters in
        buffers) pass through.
    spec : DefenceSpec
    seed : int
        Draws the defence's noise.

    Returns
    -------
    dict of str to Tensor
        Same names, shapes and dtypes. Strength 0 returns the same values, bit for bit.
    """
    if spec.name == "none" or spec.strength == 0:
        return dict(update)
    floats = {k: v for k, v in update.items() if v.is_floating_point()}
    generator = torch.Generator().manual_seed(seed)
    changed = DEFENCES[spec.name].function(floats, spec.strength, generator)
    return {k: changed[k].to(v.dtype) if k in changed else v for k, v in update.items()}
