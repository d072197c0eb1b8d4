"""The server that is not even honest: some clients get another model than the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from logging import ERROR
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedleak.attacks import Attack, attack_for
from fedleak.capture.update import load_sent
from fedleak.errors import FedleakError, ForbiddenError, InvalidInputError
from fedleak.modules import copied
from fedleak.tampers import Tamper, make_tamper
from fedleak.threat import ThreatModel

from .delegate import DelegatingStrategy
from .malicious_server import MaliciousServer
from .sent import Sent

__all__ = ["Tampering", "TamperingServer"]


@dataclass(frozen=True)
class Tampering:
    """That a client was sent another model in a round.

    Attributes
    ----------
    server_round : int
    node : int
    change : float
        Root mean square of the change over all entries, relative to the honest weights'.
    reason : str
        Why nothing was changed after all; empty otherwise.
    """

    server_round: int
    node: int
    change: float = 0.0
    reason: str = ""


class _Sender(DelegatingStrategy):
    """Sends some clients a tampered model, and keeps their replies out of the aggregate."""

    def __init__(
        self,
        strategy: Strategy,
        tamper: Tamper,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        images: int,
        rounds: Collection[int] | None,
        clients: int,
        alike: bool,
    ):
        super().__init__(strategy)
        self.alike = alike  # a sum is over updates of one model
        self.tamper, self.model, self.input_shape, self.images = tamper, model, input_shape, images
        self.rounds, self.clients = rounds, clients
        self.tampered: list[Tampering] = []
        self.nodes: set[int] = set()
        self._honest = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.nodes, self._honest = set(), arrays
        if self.rounds is not None and server_round not in self.rounds:
            return messages
        chosen = messages[: self.clients or None]
        made: dict[int, tuple[RecordDict, float]] = {}
        for place, message in enumerate(chosen):
            node = message.metadata.dst_node_id
            key = 0 if self.alike else place
            try:
                if key not in made:
                    made[key] = self._tampered(message.content, server_round, key)
                # The record may be shared with other messages: it is replaced, never edited.
                message.content, change = made[key]
            except Exception as error:  # the training goes on, whatever happens here
                reason = str(error) if isinstance(error, FedleakError) else repr(error)
                log(ERROR, "round %s: not tampered with: %s", server_round, reason)
                self.tampered.append(Tampering(server_round, node, reason=reason))
                continue
            self.nodes.add(node)
            self.tampered.append(Tampering(server_round, node, change))
        self.sent = Sent(messages)
        return messages

    def _tampered(
        self, content: RecordDict, server_round: int, place: int
    ) -> tuple[RecordDict, float]:
        """Return a content with the tampered model, and how far that is from the honest one."""
        name, record = next(iter(content.array_records.items()))
        honest = record.to_torch_state_dict()
        model = load_sent(copied(self.model), honest)
        state = self.tamper.prepare(model, self.input_shape, server_round, place, self.images)
        change = {k: state[k].to(v.dtype) for k, v in honest.items() if k in state}
        moved = sum(float((change[k] - honest[k]).double().square().sum()) for k in change)
        size = sum(float(honest[k].double().square().sum()) for k in change)
        other = RecordDict({**content, name: ArrayRecord({**honest, **change})})
        return other, float((moved / max(size, 1e-300)) ** 0.5)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        honest = [r for r in replies if r.metadata.src_node_id not in self.nodes]
        if not honest:  # the weights stay as they are
            return self._honest, None
        return super().aggregate_train(server_round, honest)


class TamperingServer(MaliciousServer):
    """Wrap any strategy, send some clients another model, and read what comes back.

    Clients that are sent the honest model are attacked as by :class:`MaliciousServer`. The
    replies of those that are not say nothing about the honest model: they are left out of the
    aggregate, so that the training loses their data in these rounds, and nothing else. In rounds
    without tampering it is the same, bit for bit, as without this server.

    Parameters
    ----------
    strategy, model, input_shape
        As for :class:`MaliciousServer`.
    tamper : str or Tamper
        A name in :data:`fedleak.tampers.TAMPERS`, or a tamper.
    rounds : collection of int, optional
        Rounds in which it tampers; by default all.
    clients : int
        How many clients a round are tampered with, in the order they were asked; 0 for all. With
        all of them, nothing is learned in that round.
    threat : ThreatModel
        Must allow to tamper; by default an otherwise honest server that may.
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
        tamper: str | Tamper = "peel",
        *,
        rounds: Collection[int] | None = None,
        clients: int = 0,
        threat: ThreatModel | None = None,
        **options: Any,
    ):
        threat = threat or ThreatModel(tamper=True)
        made = make_tamper(tamper) if isinstance(tamper, str) else tamper
        try:
            threat.demand(made.needs, f"tamper {tamper!r}")
        except ForbiddenError as error:
            raise ForbiddenError(
                str(error).replace("choose another attack", "use MaliciousServer")
            ) from error
        if isinstance(clients, bool) or not isinstance(clients, int) or clients < 0:
            raise InvalidInputError(f"clients must be a whole number from 0, not {clients!r}")
        if rounds is not None and any(
            isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in rounds
        ):
            raise InvalidInputError(f"rounds must be whole numbers from 1, not {rounds!r}")
        sender = _Sender(
            strategy, made, nn.Module(), input_shape, 1, rounds, clients, threat.view == "sum"
        )
        super().__init__(sender, model, input_shape, threat=threat, **options)
        self._sender, self._reader = sender, attack_for(made.attack, made.attack_options)
        if callable(self.images):
            raise InvalidInputError(
                "a model is made for one number of images; name it by images, not by a function"
            )
        sender.model, sender.images = self.model, self.images
        made.prepare(self.model, input_shape, 1, 0, self.images)  # refuses a model that it cannot

    @property
    def tampered(self) -> list[Tampering]:
        """Who was sent another model, when, and how far it was changed."""
        return self._sender.tampered

    def _attack_for(self, nodes: tuple[int, ...]) -> Attack:
        tampered = self._sender.nodes.intersection(nodes)
        return self._reader if tampered else super()._attack_for(nodes)
