"""Grids: one that runs clients in this process, one that keeps their order fixed."""

from __future__ import annotations

import copy
import math
import random
import time
import traceback
from collections.abc import Iterable
from itertools import islice
from logging import WARNING
from typing import Any

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import Grid

_SERVER_NODE = 1
_RUN = 1
# Flower's ErrorCode.CLIENT_APP_RAISED_EXCEPTION.
_CLIENT_RAISED = 2
#: Seconds to wait for all clients.
_PATIENCE = 120.0
#: Messages under way at a time in a simulation, and seconds between looks for replies.
_WINDOW, _PAUSE = 64, 0.05


class _Messages(Grid):
    """Makes messages as Flower's own grids do, for strategies that ask a grid for them."""

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)


class InlineGrid(_Messages):
    """Run every client in this process, one after the other.

    Starts at once, and a debugger steps from the strategy into the client. Each client
    keeps its own state between rounds; an exception in one becomes an error reply, as on
    Flower's other engines.

    Parameters
    ----------
    client_app : ClientApp
    num_nodes : int
        Number of clients; node ``i`` holds partition ``i``.
    """

    def __init__(self, client_app: ClientApp, num_nodes: int):
        self._client_app = client_app
        self._contexts = {
            _SERVER_NODE + 1 + i: Context(
                run_id=_RUN,
                node_id=_SERVER_NODE + 1 + i,
                node_config={"partition-id": i, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config={},
            )
            for i in range(num_nodes)
        }
        self._replies: dict[str, Message] = {}
        self._count = 0
        _set_identity()

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        raise NotImplementedError("the inline engine has no SuperLink and so no Run")

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        for message in messages:
            self._count += 1
            identity = str(self._count)
            message.metadata.__dict__["_message_id"] = identity
            self._replies[identity] = self._answer(message)
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            # As over a network: what one side changes in place, the other does not see.
            reply = self._client_app(copy.deepcopy(message), context)
            return copy.deepcopy(reply)
        except Exception as error:
            log(WARNING, "client %s failed:\n%s", context.node_config, traceback.format_exc())
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(code=_CLIENT_RAISED, reason=reason), reply_to=message)


def _set_identity() -> None:
    """Give messages made in this process a sender; a private detail of Flower 1.41."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:  # a Flower that does not need it
        return
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN, _SERVER_NODE, 1


class _Delegating(_Messages):
    """Another grid's, but for what is changed."""

    def __init__(self, grid: Grid):
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)


class WindowGrid(_Delegating):
    """Flower's grid of a simulation, with few messages under way at a time.

    Flower looks through all that are under way for each node, over and over: with one for every
    node that is the square of their number, and takes longer than the clients.
    """

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        end = math.inf if timeout is None else time.monotonic() + timeout
        left, replies = iter(messages), []
        under_way: set[str] = set()
        while time.monotonic() < end:
            more = list(islice(left, _WINDOW - len(under_way)))
            under_way |= set(self._grid.push_messages(more))
            if not (more or under_way):
                break
            came = list(self._grid.pull_messages(under_way))
            replies += came
            under_way -= {reply.metadata.reply_to_message_id for reply in came}
            if under_way and not came:
                time.sleep(_PAUSE)
        return replies


class OrderedGrid(_Delegating):
    """Any grid, with clients in the order of their partitions.

    Node ids are random for each run and replies arrive in any order; both would change
    which clients are sampled and how sums round. Here the same seed asks the same
    clients, and replies come in a fixed order, on every engine.

    Parameters
    ----------
    grid : Grid
    clients : int
        Number of clients to wait for.
    seed : int
    """

    def __init__(self, grid: Grid, clients: int, seed: int):
        super().__init__(grid)
        self._clients, self._seed = clients, seed
        self._partitions: dict[int, int] = {}
        self._asked = 0

    @property
    def partitions(self) -> dict[int, int]:
        """Partition of each node, by node id; waits until all clients are there."""
        deadline = time.monotonic() + _PATIENCE
        while len(self._partitions) < self._clients:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"only {len(self._partitions)} of {self._clients} clients came; give Flower as "
                    "many num-supernodes as federation.clients"
                )
            nodes = [n for n in self._grid.get_node_ids() if n not in self._partitions]
            asks = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
            for reply in self._grid.send_and_receive(asks, timeout=60) if asks else []:
                if reply.has_error():
                    raise RuntimeError(f"a client cannot start: {reply.error.reason}")
                record = next(iter(reply.content.config_records.values()))
                partition = int(record["partition-id"])  # type: ignore[arg-type]
                if partition < self._clients:  # a grid may have more nodes than clients
                    self._partitions[reply.metadata.src_node_id] = partition
            if len(self._partitions) < self._clients:
                time.sleep(0.5)
        return self._partitions

    def get_node_ids(self) -> Iterable[int]:
        # Strategies sample from what this returns, with Python's generator, right away.
        self._asked += 1
        random.seed(self._seed * 1_000_003 + self._asked)
        known = self.partitions
        return sorted(known, key=lambda node: known[node])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        return sorted(replies, key=lambda r: self._partitions.get(r.metadata.src_node_id, -1))
