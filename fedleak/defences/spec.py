"""Defences by name, one or several in order, and how they are applied."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from fedleak.defences.base import DEFENCES, Defence, Tensors, make_defence
from fedleak.defences.clipping import DP
from fedleak.errors import InvalidInputError


@dataclass(frozen=True)
class DefenceSpec:
    """Defences by name with their strengths; ``none`` is no defence.

    Attributes
    ----------
    name : str
        One name, or several in the order they are applied: ``"clip+noise"``.
    strength : float or str
        In the defence's own unit. A string where it is more than a number, as
        ``"clip=1,noise=1.1"``, and for several: ``"1+0.1"``.
    """

    name: str = "none"
    strength: float | str = 0.0

    def __post_init__(self) -> None:
        strength = self.strength
        if isinstance(strength, str):
            strength = strength.replace(" ", "")
            with suppress(ValueError):
                strength = float(strength or 0)
        else:
            strength = float(strength)
        object.__setattr__(self, "strength", strength)
        if self.name == "none":
            if self.strength:
                raise InvalidInputError(
                    f"defence 'none' has no strength, but {self.strength} was given; "
                    "name a defence or leave the strength out"
                )
            return
        _check_order(self._named())

    def _named(self) -> list[tuple[str, Defence]]:
        """Return every defence with its name, also those of strength 0."""
        names, given = self.name.split("+"), self.strength
        if len(names) == 1:
            return [(self.name, make_defence(self.name, given))]
        strengths: Sequence[str] = [""] * len(names)
        if given != 0.0:
            strengths = re.split(r"\+", str(given))
        if "none" in names:
            raise InvalidInputError(f"defence {self.name!r}: 'none' cannot be combined")
        if len(strengths) != len(names):
            raise InvalidInputError(
                f"defence {self.name!r} needs {len(names)} strengths, not {given!r}; write "
                "NAME:STRENGTH+NAME:STRENGTH, as clip:1+noise:0.1"
            )
        return [(n, make_defence(n, s)) for n, s in zip(names, strengths, strict=True)]

    @cached_property
    def parts(self) -> tuple[Defence, ...]:
        """The defences in their order; empty for none and where all strengths are 0."""
        named = [] if self.name == "none" else self._named()
        return tuple(d for _, d in named if d.strength)

    def __str__(self) -> str:
        """Return what :func:`parse_defence` reads."""
        if self.name == "none":
            return self.name
        names = self.name.split("+")
        given = [repr(self.strength)] if len(names) == 1 else str(self.strength).split("+")
        if len(names) == 1 and isinstance(self.strength, str):
            given = [self.strength]
        given += ["0"] * (len(names) - len(given))
        return "+".join(f"{n}:{s}" for n, s in zip(names, given, strict=True))

    @property
    def examples(self) -> int:
        """How many images' own gradients the defence works on; 0 for the update as a whole."""
        first = self.parts[0] if self.parts else None
        return first.examples if isinstance(first, DP) else 0

    @property
    def example_norm(self) -> float:
        """The bound on the norm of every single image's gradient; 0: none."""
        first = self.parts[0] if self.parts else None
        return first.clip if isinstance(first, DP) and first.examples else 0.0

    @property
    def label(self) -> str:
        """The defence as one word, for file names and legends: ``noise-0.1``."""
        if self.name == "none":
            return self.name
        strengths = [_short(s) for s in str(self.strength).split("+")]
        names = self.name.split("+")
        strengths += ["0"] * (len(names) - len(strengths))
        label = "+".join(f"{n}-{s}" for n, s in zip(names, strengths, strict=True))
        return re.sub(r"[^A-Za-z0-9._+-]+", "-", label)

    @property
    def rescales(self) -> Literal["", "update", "tensor"]:
        """What is multiplied by a factor that the receiver is not told."""
        found = {part.rescales for part in self.parts}
        return "tensor" if "tensor" in found else "update" if "update" in found else ""

    @property
    def signs(self) -> bool:
        """Whether only the sign of each entry is sent."""
        return any(part.signs for part in self.parts)

    def check(self, names: Sequence[str]) -> None:
        """Raise InvalidInputError if the defence does not fit updates with these names."""
        for part in self.parts:
            part.check(names)

    def errors(self, received: Tensors) -> Tensors:
        """Return what an informed attacker knows: how far each entry may be from the true one.

        A function of the received update and the strength alone. Of several defences the
        variances add up, as of independent errors.

        Parameters
        ----------
        received : dict of str to Tensor
            An update as :func:`defend` returns it. Integer entries are left out.

        Returns
        -------
        dict of str to Tensor, float64
            Standard deviations in the unit of the entry, broadcastable to each tensor; 0 for
            an exact entry (also: exact but for a common factor, see :attr:`rescales`) and
            infinite for one that says nothing.
        """
        floats = {k: v.double() for k, v in received.items() if v.is_floating_point()}
        total = {k: v.new_zeros(()) for k, v in floats.items()}
        for part in self.parts:
            for name, error in part.errors(floats).items():
                total[name] = torch.hypot(*torch.broadcast_tensors(total[name], error))
        return total


def _short(strength: str) -> str:
    try:
        return f"{float(strength or 0):g}"
    except ValueError:
        return strength


def _check_order(named: Sequence[tuple[str, Defence]]) -> None:
    """Refuse an order that contradicts itself."""
    before: list[Defence] = []
    for name, defence in named:
        if defence.strength:
            reason = defence.contradiction(before)
            if reason:
                raise InvalidInputError(
                    f"defence {'+'.join(n for n, _ in named)!r}: {name!r} {reason}"
                )
            before.append(defence)


def parse_defence(text: str) -> DefenceSpec:
    """Read a defence as the command line has it.

    Parameters
    ----------
    text : str
        ``"none"``, ``"name:strength"``, or several: ``"clip:1+noise:0.1"``.

    Returns
    -------
    DefenceSpec

    Raises
    ------
    InvalidInputError
        If a strength is no number or out of range, a name unknown, or the composition
        contradicts itself.
    """
    parts = [p.partition(":") for p in re.split(r"\+(?=\s*[A-Za-z])", text)]
    names = [name.strip() for name, _, _ in parts]
    # 1e+3 is 1e3: a plus stands between defences only.
    strengths = [re.sub(r"(?<=[0-9.])[eE]\+", "e", strength.strip()) for *_, strength in parts]
    for name, strength in zip(names, strengths, strict=True):
        if not strength and name != "none" and (len(parts) > 1 or name in DEFENCES):
            raise InvalidInputError(
                f"defence {text!r}: {name!r} has no strength; write {name}:STRENGTH (0 is none)"
            )
    if len(parts) == 1:
        return DefenceSpec(names[0], strengths[0])
    return DefenceSpec("+".join(names), "+".join(s or "0" for s in strengths))


def defend_examples(examples: Tensors, spec: DefenceSpec, seed: int) -> Tensors:
    """Return the mean of per-example gradients as the defence leaves it.

    Parameters
    ----------
    examples : dict of str to Tensor, shape (B, *parameter)
        The gradient of each image of a batch.
    spec, seed
        As for :func:`defend`. What works on the update is given the mean.

    Returns
    -------
    dict of str to Tensor, shape (*parameter)

    Raises
    ------
    InvalidInputError
        If the defence counts on another number of examples.
    """
    first = spec.parts[0] if spec.parts else None
    if not isinstance(first, DP) or not spec.examples:
        return defend({k: v.mean(0) for k, v in examples.items()}, spec, seed)
    spec.check(list(examples))
    generator = torch.Generator().manual_seed(seed)
    changed = first.mean_of(examples, generator)
    for part in spec.parts[1:]:
        changed = {**changed, **part(changed, generator)}
    return {k: changed[k].to(v.dtype) for k, v in examples.items()}


def defend(update: Tensors, spec: DefenceSpec, seed: int) -> Tensors:
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

    Raises
    ------
    InvalidInputError
        If the defence names a layer that the update does not have.
    """
    changed = {k: v for k, v in update.items() if v.is_floating_point()}
    spec.check(list(changed))
    generator = torch.Generator().manual_seed(seed)
    for part in spec.parts:
        changed = {**changed, **part(changed, generator)}
    return {k: changed[k].to(v.dtype) if k in changed else v for k, v in update.items()}
