"""The terms of an update: what holds for it beside its numbers, said once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from fedleak.client.training import LocalTraining
from fedleak.defences import DefenceSpec
from fedleak.errors import InvalidInputError
from fedleak.threat import HONEST, ThreatModel

Shared = Literal["gradient", "weights"]


def needs_gradients(defence: DefenceSpec | None) -> None:
    """Raise InvalidInputError for a defence that clients who share weights cannot apply."""
    if defence is not None and defence.examples:
        raise InvalidInputError(
            f"defence {defence.label!r} clips the gradients of single images, and is known for "
            "shared gradients only, not for weights; leave examples out, or the defence, which "
            "then attacks as if it were unknown"
        )


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is known of an update before its numbers are looked at.

    What a server received, what an attacker sees of it, its record in a capture, and what an
    attack gathers carry this one value.

    Attributes
    ----------
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    num_images : int
        Number of images behind the update, of all its clients.
    labels : tuple of int or None
        The labels, where the threat model says that the server knows them.
    threat : ThreatModel
        What the attacker knows and may do.
    training : LocalTraining or None
        What clients do; of an observation, as far as the attacker knows it. None where that is
        the gradient of the mean cross-entropy, or is not known beyond it.
    shared : {"gradient", "weights"}
        What the clients sent.
    clients : int
        Number of clients that the update is the mean of: above 1 under secure aggregation.
    defence : DefenceSpec or None
        The clients' defence, where the threat model says that the server knows it.

    Raises
    ------
    InvalidInputError
        If they contradict each other.
    """

    input_shape: tuple[int, int, int]
    num_images: int = 1
    labels: tuple[int, ...] | None = None
    threat: ThreatModel = HONEST
    training: LocalTraining | None = None
    shared: Shared = "gradient"
    clients: int = 1
    defence: DefenceSpec | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and not self.threat.labels:
            raise InvalidInputError(
                f"labels {self.labels} are given, but the threat model does not let the attacker "
                "know them; pass threat=ThreatModel(labels=True)"
            )
        if self.defence is not None and not self.threat.defence:
            raise InvalidInputError(
                f"defence {self.defence.label!r} is given, but the threat model does not let the "
                "attacker know it; pass threat=ThreatModel(defence=True)"
            )
        if self.shared == "weights":
            needs_gradients(self.defence)
        for name in ("num_images", "clients"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"{name} must be a whole number from 1, not {value!r}")
        if self.num_images % self.clients:
            raise InvalidInputError(
                f"{self.num_images} images cannot be those of {self.clients} clients alike"
            )
        if self.clients > 1 and self.threat.view != "sum":
            raise InvalidInputError(
                f"an update of {self.clients} clients is a sum; pass ThreatModel(view='sum')"
            )

    @property
    def own(self) -> int:
        """Number of images of each client."""
        return self.num_images // self.clients

    def signs(self, errors: bool) -> bool:
        """Whether only signs of the update mean anything; ``errors``: entries have known errors."""
        if self.defence is not None and self.defence.signs:
            return True
        return self.training is not None and self.training.update_rule.signs and not errors

    @property
    def trained(self) -> LocalTraining | None:
        """How clients stepped before they replied; None where they did not, or it is not known."""
        return self.training if self.training is not None and self.training.trains else None

    @property
    def steps(self) -> int:
        """Number of local steps of each client, as far as is known."""
        return 1 if self.training is None else self.training.steps(self.own)


_T = TypeVar("_T", bound="WithTerms")


class WithTerms:
    """A dataclass with a field ``terms``, whose facts can be read from itself, too."""

    terms: Terms

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image."""
        return self.terms.input_shape

    @property
    def num_images(self) -> int:
        """Number of images behind the update, of all its clients."""
        return self.terms.num_images

    @property
    def labels(self) -> tuple[int, ...] | None:
        """The labels, where the threat model says that the server knows them."""
        return self.terms.labels

    @property
    def threat(self) -> ThreatModel:
        """What the attacker knows and may do."""
        return self.terms.threat

    @property
    def training(self) -> LocalTraining | None:
        """How the clients trained, as far as that is known."""
        return self.terms.training

    @property
    def shared(self) -> Shared:
        """What the clients sent."""
        return self.terms.shared

    @property
    def clients(self) -> int:
        """Number of clients that the update is the mean of."""
        return self.terms.clients

    @property
    def defence(self) -> DefenceSpec | None:
        """The clients' defence, where the threat model says that the server knows it."""
        return self.terms.defence

    def with_terms(self: _T, **changes: Any) -> _T:
        """Return the same under other terms, as ``with_terms(num_images=4)``."""
        return replace(self, terms=replace(self.terms, **changes))  # type: ignore[type-var]
