"""Grids and the app that many clients share."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict

import simulations.grid
from simulations.client_app import ScenarioApp, build_client_app
from simulations.grid import InlineGrid, WindowGrid
from simulations.scenario import Scenario
from simulations.task import make_model


class Slow(InlineGrid):
    """Hands out replies in any order, some of them at a time; ``silent`` nodes never reply."""

    most = 0
    silent: tuple[int, ...] = ()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        for lost in [i for i in ids if self._replies[i].metadata.src_node_id in self.silent]:
            del self._replies[lost]
        self.most = max(self.most, len(self._replies))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = sorted(set(message_ids) & set(self._replies))
        return super().pull_messages(random.Random(len(ids)).sample(ids, min(3, len(ids))))


def _app(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


@pytest.mark.parametrize("nodes", [1, 5, 20])
def test_few_messages_are_under_way_and_every_reply_comes(
    nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulations.grid, "_WINDOW", 5)
    monkeypatch.setattr(simulations.grid, "_PAUSE", 0.001)
    slow = Slow(_app, nodes)  # type: ignore[arg-type]
    asked = [Message(RecordDict(), n, MessageType.QUERY) for n in slow.get_node_ids()]
    replies = list(WindowGrid(slow).send_and_receive(iter(asked)))
    assert sorted(reply.metadata.src_node_id for reply in replies) == slow.get_node_ids()
    assert slow.most <= 5
    assert list(WindowGrid(slow).send_and_receive([])) == []


def test_a_node_that_never_replies_is_waited_for_as_long_as_asked() -> None:
    slow = Slow(_app, 1)  # type: ignore[arg-type]
    slow.silent = tuple(slow.get_node_ids())
    asked = [Message(RecordDict(), n, MessageType.QUERY) for n in slow.silent]
    assert list(WindowGrid(slow).send_and_receive(asked, timeout=0.01)) == []


def test_an_app_that_travels_replies_as_one_that_does_not() -> None:
    scenario = Scenario.model_validate({"federation": {"clients": 3}, "model": {"name": "cnn2-v1"}})
    arrays = ArrayRecord(make_model(scenario).state_dict())

    def reply(app: Any) -> dict[str, bytes]:
        content = {"arrays": arrays, "config": ConfigRecord({"server-round": 1})}
        message = Message(RecordDict(content), 3, MessageType.TRAIN)  # type: ignore[arg-type]
        (answer,) = InlineGrid(app, 3).send_and_receive([message])
        assert not answer.has_error(), answer.error
        (record,) = answer.content.array_records.values()
        return {name: array.numpy().tobytes() for name, array in record.items()}

    app = ScenarioApp(scenario.model_dump_json())
    sent = pickle.dumps(app)
    expected = reply(build_client_app(lambda context: scenario))
    assert reply(app) == reply(pickle.loads(sent)) == expected
    assert len(sent) < 5000
