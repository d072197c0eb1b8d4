"""What a server made of one update."""

from __future__ import annotations

from dataclasses import dataclass, field
from logging import INFO

from flwr.common.logger import log

from fedleak.attacks import Dossier, Reconstruction
from fedleak.status import Status
from fedleak.wording import clean_reason, fit_words


@dataclass(frozen=True, eq=False)
class Leak:
    """What the server made of one client's update, or of their sum, in one round.

    Attributes
    ----------
    server_round : int
    nodes : tuple of int
        The client's node; where the server sees a sum, those of all clients in it.
    reconstruction : Reconstruction or None
        None if the attack failed or there was nothing to attack.
    reason : str
        Why there is none, or why it is doubtful; empty otherwise.
    seconds : float
        Time of the attack, shared evenly among clients attacked together.
    received : bool
        Whether there was an update to attack; False where it is missing or cannot be read.
    together : Reconstruction or None
        What the server makes of the same images with all rounds before; None without ``memory``.
    dossier : Dossier or None
        With ``memory``: what it knows of the client by then.
    """

    server_round: int
    nodes: tuple[int, ...]
    reconstruction: Reconstruction | None
    reason: str = ""
    seconds: float = 0.0
    received: bool = True
    together: Reconstruction | None = None
    dossier: Dossier | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # A client's names end in it, and it ends in tables.
        object.__setattr__(self, "reason", clean_reason(self.reason))

    @property
    def status(self) -> Status:
        """``ok``, ``doubtful`` or ``failed``, see :mod:`fedleak.status`."""
        return "failed" if self.reconstruction is None else self.reconstruction.status


def log_leak(leak: Leak) -> None:
    """Log a leak in words that its fit and its doubts bear out."""
    who = f"round {leak.server_round}, nodes {leak.nodes}"
    found = leak.reconstruction
    if found is None:
        log(INFO, "%s: %s", who, leak.reason)
        return
    labels = f"classes {found.labels.tolist()}"
    reason = f"; {leak.reason}" if leak.reason else ""
    words = fit_words(found.fit, leak.status == "doubtful").format(labels)
    log(INFO, "%s: %s (fit %.1e)%s", who, words, found.fit, reason)
