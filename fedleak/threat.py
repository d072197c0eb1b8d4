"""What the attacker knows and may do, and how the clients train: both are stated, never assumed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from fedleak.errors import ForbiddenError, InvalidInputError

View = Literal["client", "sum"]
_WHY = {
    "labels": "the labels of the images",
    "batch_size": "how many images are behind an update, and how they are batched",
    "learning_rate": "the clients' learning rate",
    "local_steps": "how many steps or epochs the clients take",
    "public_images": "public images to learn a prior from",
    "buffers": "the statistics of batch normalisation in the update",
    "defence": "which defence the clients use, and how strong",
    "tamper": "to change the model that it sends",
}


@dataclass(frozen=True)
class ThreatModel:
    """What the attacker knows beside model and update, and what it may do.

    The default is the honest-but-curious server of federated learning: it wrote the
    protocol, sees the update of each client, and changes nothing.

    Attributes
    ----------
    labels : bool
        Whether it knows the labels.
    batch_size : bool
        Whether it knows how many images are behind an update.
    learning_rate, local_steps : bool
        Whether it knows them. They matter where clients share weights.
    public_images : bool
        Whether it may learn a prior from images that are not the clients'.
    buffers : bool
        Whether it uses batch-normalisation statistics that clients send along.
    defence : bool
        Whether it knows the clients' defence and its strength, as the protocol states it: an
        informed attacker. Else it takes what it receives for what it seems to be.
    tamper : bool
        Whether it may change the model that it sends.
    view : {"client", "sum"}
        Whether it sees each client's update, or, as under secure aggregation, only the sum
        over the round's clients.
    """

    labels: bool = False
    batch_size: bool = True
    learning_rate: bool = True
    local_steps: bool = True
    public_images: bool = True
    buffers: bool = False
    defence: bool = False
    tamper: bool = False
    view: View = "client"

    def __post_init__(self) -> None:
        if self.view not in ("client", "sum"):
            raise InvalidInputError(f"view must be 'client' or 'sum', not {self.view!r}")
        for name in _WHY:
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(
                    f"{name} must be true or false, not {getattr(self, name)!r}"
                )

    def demand(self, needs: Iterable[str], who: str) -> None:
        """Refuse what needs more than is allowed.

        Parameters
        ----------
        needs : iterable of str
            Names of attributes that must be true.
        who : str
            Who needs them, for the message.

        Raises
        ------
        ForbiddenError
            If one of them is not allowed.
        """
        for name in needs:
            if not getattr(self, name):
                raise ForbiddenError(
                    f"{who} needs {_WHY[name]}, which the threat model does not allow; allow it "
                    f"({name} = true) or choose another attack"
                )

    def __str__(self) -> str:
        sees = "the sum over clients" if self.view == "sum" else "each client's update"
        knows = [f.name for f in fields(self) if f.name not in ("view", "tamper")]
        known = ", ".join(n.replace("_", " ") for n in knows if getattr(self, n)) or "nothing else"
        tampers = "may tamper with the model" if self.tamper else "changes nothing"
        return f"sees {sees}; knows {known}; {tampers}"


#: The honest-but-curious server.
HONEST = ThreatModel()


@dataclass(frozen=True)
class LocalTraining:
    """What a client does before it shares weights: minibatch SGD, as the protocol says.

    Each epoch draws a new order of the client's images and cuts it into batches; the last
    one may be smaller.

    Attributes
    ----------
    learning_rate : float
    batch_size : int
    epochs : int
        Passes over the client's images.
    momentum, weight_decay : float
        As in ``torch.optim.SGD``.
    """

    learning_rate: float
    batch_size: int = 1
    epochs: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("epochs", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInputError(
                    f"{name} must be a whole number from {least}, not {value!r}"
                )
        for name in ("learning_rate", "momentum", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidInputError(f"{name} must be a number, not {value!r}")
        rates = (self.learning_rate, self.momentum, self.weight_decay)
        if not all(math.isfinite(r) and r >= 0 for r in rates) or self.learning_rate == 0:
            raise InvalidInputError(
                f"learning_rate ({self.learning_rate}) must be above 0, momentum "
                f"({self.momentum}) and weight_decay ({self.weight_decay}) at least 0"
            )
        if self.momentum >= 1:
            raise InvalidInputError(f"momentum must be below 1, not {self.momentum}")

    def steps(self, images: int) -> int:
        """Return how many steps a client with ``images`` images takes."""
        return self.epochs * math.ceil(images / self.batch_size)

    def gain(self, images: int) -> float:
        """Return by how much the weights move for a constant gradient, in learning rates.

        The number of steps; more with momentum: step ``s`` moves by
        ``1 + momentum + ... + momentum^(s - 1)``.
        """
        steps, m = self.steps(images), self.momentum
        return sum((1 - m**s) / (1 - m) for s in range(1, steps + 1))
