"""What leaves the server: another model for some clients, and what becomes of their replies."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from logging import ERROR

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedleak.capture.update import load_sent
from fedleak.errors import FedleakError, InvalidInputError
from fedleak.modules import copied
from fedleak.tampers import Tamper

from .delegate import DelegatingStrategy
from .sent import Sent

__all__ = ["TamperSender", "Tampering"]


@dataclass(frozen=True)
class Tampering:
    """That a client was sent another model in a round.

    Attributes
    ----------
    server_round : int
    node : int
    change : float
        Root mean square of the change over all entries, relative to the honest weights'.
    restored : int
        Images on which the server computed what the client would have replied on the honest
        model; 0 where its data are missing in the training.
    reason : str
        Why nothing was changed after all; empty otherwise.
    """

    server_round: int
    node: int
    change: float = 0.0
    restored: int = 0
    reason: str = ""


class TamperSender(DelegatingStrategy):
    """Sends some clients a tampered model, and keeps their replies out of the aggregate.

    Parameters
    ----------
    strategy : Strategy
    tamper : Tamper
    input_shape : tuple of int
    rounds : collection of int, optional
        By default all.
    clients : int
        How many a round; 0 for all.
    alike : bool
        Whether all of a round get the same model: a sum is over updates of one.

    Attributes
    ----------
    tampered : list of Tampering
    nodes : set of int
        Those of this round that were sent a tampered model.
    honest : ArrayRecord
        What the strategy wanted to send in this round.
    withheld : int
        Replies that were kept out of the aggregate in this round.
    """

    def __init__(
        self,
        strategy: Strategy,
        tamper: Tamper,
        input_shape: tuple[int, int, int],
        rounds: Collection[int] | None = None,
        clients: int = 0,
        alike: bool = False,
    ):
        super().__init__(strategy)
        if isinstance(clients, bool) or not isinstance(clients, int) or clients < 0:
            raise InvalidInputError(f"clients must be a whole number from 0, not {clients!r}")
        if rounds is not None and any(
            isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in rounds
        ):
            raise InvalidInputError(f"rounds must be whole numbers from 1, not {rounds!r}")
        if alike and clients:
            raise InvalidInputError(
                f"clients is {clients}, but under view='sum' the server gets one sum over updates "
                "of one model; tamper with all of them (0)"
            )
        self.tamper, self.input_shape = tamper, (input_shape[0], input_shape[1], input_shape[2])
        self.rounds, self.clients, self.alike = rounds, clients, alike
        self.tampered: list[Tampering] = []
        self.nodes: set[int] = set()
        self.honest = ArrayRecord()
        self.withheld = 0
        self._model, self._images = nn.Module(), 1
        self._replaced: dict[int, Message] = {}

    def prepare_for(self, model: nn.Module, num_images: int) -> None:
        """Take the architecture, and the number of images behind an update.

        Raises
        ------
        UnsupportedModelError
            If the tamper does not suit the model.
        """
        self._model, self._images = model, num_images
        self.tamper.prepare(model, self.input_shape, 1, 0, num_images)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.nodes, self.honest, self._replaced = set(), arrays, {}
        if self.rounds is not None and server_round not in self.rounds:
            return messages
        made: dict[int, tuple[RecordDict, float]] = {}
        for place, message in enumerate(messages[: self.clients or None]):
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
        model = load_sent(copied(self._model), honest)
        state = self.tamper.prepare(model, self.input_shape, server_round, place, self._images)
        change = {k: state[k].to(v.dtype) for k, v in honest.items() if k in state}
        moved = sum(float((change[k] - honest[k]).double().square().sum()) for k in change)
        size = sum(float(honest[k].double().square().sum()) for k in change)
        other = RecordDict({**content, name: ArrayRecord({**honest, **change})})
        return other, float((moved / max(size, 1e-300)) ** 0.5)

    def restore(self, nodes: tuple[int, ...], made: tuple[Message, int] | None) -> None:
        """Take a reply, and from how many images it is, in the place of a tampered client's."""
        if made is None:
            return
        (node,), (reply, count) = nodes, made
        self._replaced[node] = reply
        last = max(n for n, t in enumerate(self.tampered) if t.node == node)
        self.tampered[last] = replace(self.tampered[last], restored=count)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        kept: list[Message] = []
        self.withheld = 0
        for reply in replies:
            node = reply.metadata.src_node_id
            if node in self.nodes and node in self._replaced:
                kept.append(self._replaced[node])
            elif node not in self.nodes or reply.has_error():
                kept.append(reply)
            else:
                self.withheld += 1
        if all(reply.has_error() for reply in kept):  # the weights stay as they are
            return self.honest, None
        return super().aggregate_train(server_round, kept)
