"""What the attacker knows and may do: stated, never assumed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from fedleak.client.training import LocalTraining as LocalTraining  # its name until 0.6
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

    def demand(
        self, needs: Iterable[str], who: str, instead: str = "choose another attack"
    ) -> None:
        """Refuse what needs more than is allowed.

        Parameters
        ----------
        needs : iterable of str
            Names of attributes that must be true.
        who : str
            Who needs them, for the message.
        instead : str
            What else can be done, for the message.

        Raises
        ------
        ForbiddenError
            If one of them is not allowed.
        """
        for name in needs:
            if not getattr(self, name):
                raise ForbiddenError(
                    f"{who} needs {_WHY[name]}, which the threat model does not allow; allow it "
                    f"({name} = true) or {instead}"
                )

    def __str__(self) -> str:
        sees = "the sum over clients" if self.view == "sum" else "each client's update"
        knows = [f.name for f in fields(self) if f.name not in ("view", "tamper")]
        known = ", ".join(n.replace("_", " ") for n in knows if getattr(self, n)) or "nothing else"
        tampers = "may tamper with the model" if self.tamper else "changes nothing"
        return f"sees {sees}; knows {known}; {tampers}"


#: The honest-but-curious server.
HONEST = ThreatModel()
