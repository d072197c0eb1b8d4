"""What a tamper is, and how tampers are found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedleak.errors import UnsupportedModelError
from fedleak.registry import Registry, make
from fedleak.spelling import parse


class Tamper(ABC):
    """Weights that a server sends instead of the honest ones, of the same architecture.

    Attributes
    ----------
    attack : str
        Name of the attack that reads the update which comes back.
    attack_options : dict
        Its options.
    needs : frozenset of str
        What of :class:`fedleak.ThreatModel` must be allowed.
    """

    attack: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"tamper"})

    @property
    def attack_options(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def prepare(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        server_round: int = 1,
        client: int = 0,
        num_images: int = 1,
    ) -> dict[str, Tensor]:
        """Return the state to send; the model is left as it is.

        Parameters
        ----------
        model : nn.Module
            With the honest weights.
        input_shape : tuple of int
            Shape (C, H, W) of one image.
        server_round, client : int
            When, and the client's place among those asked: what is drawn depends on nothing else.
        num_images : int
            Number of images behind the update.

        Returns
        -------
        dict of str to Tensor
            Every entry of ``model.state_dict()``.

        Raises
        ------
        UnsupportedModelError
            If the model does not allow it; the message says what is missing.
        """


def changed_state(model: nn.Module, changed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of a model's state with some entries in the place of its own.

    Raises
    ------
    UnsupportedModelError
        If one of them is shared with an entry that keeps other values, or the model's numbers
        do not hold the new ones.
    """
    own = model.state_dict()
    state = {k: v.detach().clone() for k, v in own.items()}
    for name, value in changed.items():
        state[name] = value.to(state[name]).contiguous()
        if bool((value.isfinite() & ~state[name].isfinite()).any()):
            raise UnsupportedModelError(
                f"{name!r} would need values that its numbers, {str(state[name].dtype)[6:]}, do "
                "not hold; use float32"
            )
    for name in changed:
        for other, value in own.items():
            tied = other != name and value.data_ptr() == own[name].data_ptr() and value.numel()
            if tied and not torch.equal(state[other], state[name]):
                raise UnsupportedModelError(
                    f"the weights of {name!r} and {other!r} are tied: one cannot be changed alone"
                )
    return state


#: Classes of tampers. Their constructor arguments are the options a user may set.
TAMPERS: Registry[type[Tamper]] = Registry("tamper", "fedleak.tampers")


def make_tamper(name: str, **options: Any) -> Tamper:
    """Make a tamper by name.

    Parameters
    ----------
    name : str
        A registered name, as ``"peel"``.
    **options
        The tamper's own.

    Raises
    ------
    UnknownNameError
        If there is no such tamper.
    InvalidInputError
        If it does not take an option or refuses its value.
    """
    made: Tamper = make(TAMPERS, name, options)
    return made


def parse_tamper(text: str) -> Tamper:
    """Make a tamper from ``NAME`` or ``NAME:KEY=VALUE,...``, as ``"peel:directions=8"``.

    Raises
    ------
    UnknownNameError, InvalidInputError
        If there is no such tamper or option, or a value is not of its kind.
    """
    return parse(TAMPERS, text)
