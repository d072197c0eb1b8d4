"""The server that is not even honest: some clients get another model than the others."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from flwr.app import Message
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedleak.attacks import Attack, attack_for
from fedleak.errors import InvalidInputError
from fedleak.tampers import Tamper, parse_tamper
from fedleak.threat import ThreatModel

from .leak import Leak
from .malicious_server import MaliciousServer
from .restoring import restored
from .tamper_sender import Tampering, TamperSender

__all__ = ["TamperingServer"]


class TamperingServer(MaliciousServer):
    """Wrap any strategy, send some clients another model, and read what comes back.

    Clients that are sent the honest model are attacked as by :class:`MaliciousServer`. The
    replies of those that are not say nothing about the honest model: they are left out of the
    aggregate. Where most of a batch was read off one, the server computes on these images what
    the client would have replied, and trains on that; else the training loses the client's data
    in these rounds, and nothing else. In rounds without tampering it is the same, bit for bit,
    as without this server.

    Parameters
    ----------
    strategy, model, input_shape
        As for :class:`MaliciousServer`.
    tamper : str, Tamper or TamperSender
        As ``"peel"`` or ``"peel:directions=8"``, of :data:`fedleak.tampers.TAMPERS`, or a
        tamper. A sender is that of another such server inside ``strategy``, whose updates
        this one reads as well.
    rounds : collection of int, optional
        Rounds in which it tampers; by default all.
    clients : int
        How many clients a round are tampered with, in the order they were asked; 0 for all.
    restore : bool
        Train on recovered images in the place of a tampered client; else with all clients
        tampered with, nothing is learned in that round.
    threat : ThreatModel
        Must allow to tamper; by default an otherwise honest server that may.
    device : str, optional
        Where the tamper's own attack computes.
    **options
        As for :class:`MaliciousServer`. ``attack`` is the one on clients that are not tampered
        with; the others' is the tamper's own.

    Attributes
    ----------
    tampered : list of Tampering
        Who was sent another model, when, and how far it was changed.

    Raises
    ------
    ForbiddenError
        If the threat model does not allow to tamper.
    UnsupportedModelError
        If the tamper does not suit the model; the message says what is missing.
    """

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module | Callable[[], nn.Module],
        input_shape: tuple[int, int, int],
        tamper: str | Tamper | TamperSender = "peel",
        *,
        rounds: Collection[int] | None = None,
        clients: int = 0,
        restore: bool = True,
        threat: ThreatModel | None = None,
        device: str | None = None,
        **options: Any,
    ):
        threat = threat or ThreatModel(tamper=True)
        ready = isinstance(tamper, TamperSender)
        if isinstance(tamper, TamperSender):
            sender = tamper
        else:
            made = parse_tamper(tamper) if isinstance(tamper, str) else tamper
            threat.demand(made.needs, f"tamper {tamper!r}", "use MaliciousServer")
            strategy = sender = TamperSender(
                strategy, made, input_shape, rounds, clients, threat.view == "sum"
            )
        super().__init__(strategy, model, input_shape, threat=threat, **options)
        self._sender, self.restore = sender, restore
        own = sender.tamper
        self._reader = attack_for(own.attack, own.attack_options, device)
        if not ready:
            if callable(self.declared.num_images):
                raise InvalidInputError(
                    "a model is made for one number of images; name it by num_images, not by a "
                    "function"
                )
            sender.prepare_for(
                self.model, self.declared.num_images
            )  # refuses a model that it cannot

    @property
    def tampered(self) -> list[Tampering]:
        """Who was sent another model, when, and how far it was changed."""
        return self._sender.tampered

    def _attack(self, server_round: int, replies: list[Message]) -> None:
        super()._attack(server_round, replies)
        if self.restore and self._sender.nodes:
            for leak in self.last_leaks:
                self._sender.restore(leak.nodes, self._restored(leak, replies))

    def _restored(self, leak: Leak, replies: list[Message]) -> tuple[Message, int] | None:
        """Return what a tampered client would have replied on the honest model, if known."""
        if leak.reconstruction is None or len(leak.nodes) != 1:
            return None
        (node,) = leak.nodes
        reply = next((r for r in replies if r.metadata.src_node_id == node), None)
        if node not in self._sender.nodes or reply is None or reply.has_error():
            return None
        training, images, _ = self.declared.of(leak.server_round, node, self.sent.configs[node])
        return restored(
            reply, self.model, self._sender.honest, leak.reconstruction, training, images
        )

    def _attack_for(self, nodes: tuple[int, ...]) -> Attack:
        tampered = self._sender.nodes.intersection(nodes)
        return self._reader if tampered else super()._attack_for(nodes)
