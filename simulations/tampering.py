"""Both sides of tampering in one federation: the server's, the clients' guard, and the record.

What a client's guard saw is known to the record alone: it is taken out of the replies before
strategy and attack are given them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fedleak.strategies.tamper_guard import TAMPERED  # type: ignore[import-not-found]
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from fedleak.attacks import attack_for
from fedleak.client.compute import gradient
from fedleak.metric.prediction import leakage_db
from fedleak.strategies import (
    DelegatingStrategy,
    TamperGuard,
    Tampering,
    TamperSender,
)
from simulations.partition import client_batches, training_data
from simulations.scenario import Scenario

#: Record of a reply that holds what the client's guard saw.
_NOTE = "guard"
#: PSNR from which an image counts as recovered.
EXACT_DB = 60.0
#: What is counted of the images of each client.
_COUNTS = ("images", "recovered", "certified", "certified_wrong")


def wanted(scenario: Scenario) -> bool:
    """Whether there is anything to record: a server that tampers, or clients that look."""
    return scenario.tamper.made is not None or scenario.guard.looks


def guard_mod(scenario_of: Any) -> Mod:
    """Return the clients' guard as a mod, which notes for the record what it saw."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        scenario: Scenario = scenario_of(context)
        if not scenario.guard.looks:
            return call_next(message, context)
        seen: list[str] = []
        guard = TamperGuard(
            scenario.guard.action,  # type: ignore[arg-type]
            scenario.training.share,
            _norms(scenario, message) if scenario.guard.disparity else None,
            lambda _, signs: seen.extend(map(str, signs)),
            scenario.guard.disparity or TamperGuard.limit,
            scenario.seed,
            _leakage(scenario, message) if scenario.guard.leakage else None,
            scenario.guard.leakage or TamperGuard.most_db,
        )
        reply = guard(message, context, call_next)
        if seen and not reply.has_error():
            reply.content[_NOTE] = ConfigRecord({"signs": "; ".join(seen)})
        return reply

    return mod


def _norms(scenario: Scenario, message: Message) -> Any:
    """Return a function of the norms of a client's images' gradients, as the guard takes it."""

    def norms(arrays: Mapping[str, Tensor], context: Context) -> Tensor:
        return image_norms(*_received(scenario, message, arrays, context), scenario)

    return norms


def _leakage(scenario: Scenario, message: Message) -> Any:
    """Return a function of what is predicted for a client's images, as the guard takes it."""

    def leakage(arrays: Mapping[str, Tensor], context: Context) -> Tensor:
        given = _received(scenario, message, arrays, context)
        return leakage_db(*given, scenario.local, scenario.defence.spec)

    return leakage


def _received(
    scenario: Scenario, message: Message, arrays: Mapping[str, Tensor], context: Context
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the model that a client received, and its images and labels of this round."""
    from simulations.task import make_model

    config = next(iter(message.content.config_records.values()))
    client, number = int(context.node_config["partition-id"]), int(str(config["server-round"]))
    images, labels = training_data(scenario).batch(
        [i for batch in client_batches(scenario, client, number) for i in batch]
    )
    model = make_model(scenario)
    model.load_state_dict(dict(arrays))
    model.train()
    return model, images, labels


def image_norms(model: nn.Module, images: Tensor, labels: Tensor, scenario: Scenario) -> Tensor:
    """Return the norms of each image's gradient, (tensors, B), without keeping the gradients."""
    each = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        found, _ = gradient(model, image, label, scenario.local)
        each.append(torch.stack([g.double().norm() for g in found.values()]))
    return torch.stack(each, 1)


class GuardNotes(DelegatingStrategy):
    """Takes what guards saw out of the replies, before anything else reads them.

    Attributes
    ----------
    signs : dict of int to str
        Of the nodes that suspect something in this round.
    """

    def __init__(self, strategy: Strategy):
        super().__init__(strategy)
        self.signs: dict[int, str] = {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.signs, replies = {}, list(replies)
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                if reply.error.code == TAMPERED:
                    self.signs[node] = str(reply.error.reason)
            elif _NOTE in reply.content:
                note = reply.content.pop(_NOTE)
                self.signs[node] = str(note["signs"])
        return super().aggregate_train(server_round, replies)


def tampering_sender(strategy: Strategy, scenario: Scenario) -> TamperSender | None:
    """Return a strategy that tampers as a scenario says; None of an honest server."""
    made = scenario.tamper.made
    if made is None:
        return None
    shape, alike = training_data(scenario).shape, scenario.threat.view == "sum"
    tamper = scenario.tamper
    return TamperSender(strategy, made, shape, tamper.when, tamper.clients, alike)


@dataclass
class TamperBook:
    """What one round's tampering gave, and who noticed, for the record of a run.

    Parameters
    ----------
    scenario : Scenario
    sender : TamperSender or None
    notes : GuardNotes
    """

    scenario: Scenario
    sender: TamperSender | None
    notes: GuardNotes
    _scores: dict[int, dict[str, int]] = field(default_factory=dict)

    def attack_on(self, nodes: Sequence[int]) -> str:
        """Return the name of the attack on these nodes."""
        if self.sender is not None and self.sender.nodes.intersection(nodes):
            return self.sender.tamper.attack
        return self.scenario.attack.name

    def score(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count, by client, what was recovered and certified; each row is that of an image."""
        for row in rows:
            own = self._scores.setdefault(int(row["client"]), dict.fromkeys(_COUNTS, 0))
            exact = row["status"] != "failed" and row.get("psnr_db", 0.0) >= EXACT_DB
            sure = bool(row.get("certified"))
            own["images"] += 1
            own["recovered"] += exact
            own["certified"] += sure and exact
            own["certified_wrong"] += sure and not exact

    def rows(
        self, number: int, partitions: Mapping[int, int], asked: Iterable[int]
    ) -> list[dict[str, Any]]:
        """Return the rows of a round, and forget it."""
        tampered: dict[int, Tampering] = {}
        if self.sender is not None:
            tampered = {t.node: t for t in self.sender.tampered if t.server_round == number}
        out: list[dict[str, Any]] = []
        for node in sorted(asked, key=lambda n: partitions.get(n, n)):
            one, client = tampered.get(node), partitions.get(node, node)
            row = {
                "round": number,
                "client": client,
                **self._scores.get(client, {}),
                "suspected": int(node in self.notes.signs) if self.scenario.guard.looks else "",
                "signs": self.notes.signs.get(node, ""),
            }
            if one is not None:
                row |= {"tamper": "" if one.reason else self.scenario.tamper.name,
                        "change": f"{one.change:.6g}", "restored": one.restored,
                        "reason": one.reason}  # fmt: skip
            out.append(row)
        self._scores = {}
        return out


def check_tamper(scenario: Scenario, model: nn.Module) -> None:
    """Refuse a tamper that the model does not allow, before anything runs.

    Raises
    ------
    UnsupportedModelError
        The message says what is missing.
    """
    made = scenario.tamper.made
    if made is not None:
        shape = training_data(scenario).shape
        made.prepare(model, shape, 1, 0, scenario.training.images)
        attack_for(made.attack, made.attack_options, scenario.attack.device)
