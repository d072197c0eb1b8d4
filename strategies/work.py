"""The work of attacks: within limits, in the round or in a process beside it, and visible."""

from __future__ import annotations

import math
import pickle
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from logging import INFO
from typing import Any, Literal

import torch
from flwr.common.logger import log

from fedleak import deadline, events
from fedleak.attacks import Attack, Outcome, run_attack
from fedleak.errors import InvalidInputError
from fedleak.observation import Observation
from fedleak.workers import Crash, Worker

#: Where attacks are done: ``round``, which waits for them, or ``background``.
Place = Literal["round", "background"]
PLACES = ("round", "background")
#: Seconds between two lines about how far a search is.
_PAUSE = 15.0
#: A process that does not end by itself has this much longer than it is allowed, in seconds.
_GRACE = 30.0

Nodes = tuple[int, ...]
#: What came of one observation: the round, the nodes behind it, and the outcome.
Done = tuple[int, Nodes, Outcome]
#: Observations that share one model, and what attacks them together.
Group = tuple[Attack, Mapping[Nodes, Observation]]


@dataclass(frozen=True)
class Limits:
    """What attacks may take.

    Attributes
    ----------
    seconds : float
        For each update.
    round_seconds : float
        For all updates of a round; what is over it has failed. 0 of either: no limit.
    memory_gib : float
        Beyond what is in use; 0: most of what is free.

    Raises
    ------
    InvalidInputError
        If one is negative or no number.
    """

    seconds: float = deadline.DEFAULT_SECONDS
    round_seconds: float = 10 * deadline.DEFAULT_SECONDS
    memory_gib: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise InvalidInputError(f"{name} must be a number from 0 (none), not {value!r}")

    def of_round(self, begun: float) -> float:
        """Return what is left of a round whose attacks began then, by the monotonic clock."""
        if not self.round_seconds:
            return math.inf
        return max(self.round_seconds - (time.monotonic() - begun), 1e-9)


class InRound:
    """Attacks in the round, which waits; tells how long that will be."""

    def __init__(self, limits: Limits):
        self.limits = limits

    def add(self, server_round: int, groups: Sequence[Group]) -> Iterator[Done]:
        """Attack groups; yield what came of each observation as it is done."""
        begun = time.monotonic()
        for attack, group in groups:
            rest = self.limits.of_round(begun)
            with events.heard_by(_Narrator(server_round, list(group))):
                outcomes = _attacked(attack, self.limits, rest, list(group.values()))
            for nodes, outcome in zip(group, outcomes, strict=True):
                yield server_round, nodes, outcome

    def take(self, wait: bool = False) -> Iterator[Done]:
        """Yield what has come since: nothing, for the round waited."""
        return iter(())


class InBackground:
    """Attacks in a process beside the training, one group after the other.

    The limits of a round hold here from when it was given: what has not been begun by then has
    failed, so that what waits cannot grow without end.
    """

    def __init__(self, limits: Limits, attack: Attack):
        self.limits = limits
        try:
            pickle.dumps(attack)
        except Exception as error:
            raise InvalidInputError(
                f"this attack cannot be given to another process ({error}); leave attack_in at "
                "'round'"
            ) from error
        self._function = partial(_serve, limits, torch.get_num_threads())
        self._worker: Worker[Any, Any] | None = None
        self._waiting: deque[_Job] = deque()
        self._current: _Job | None = None

    def add(self, server_round: int, groups: Sequence[Group]) -> Iterator[Done]:
        """Take groups; yield what is done meanwhile."""
        for attack, group in groups:
            content = pickle.dumps((attack, list(group.values())))
            self._waiting.append(_Job(server_round, list(group), content, time.monotonic()))
        return self.take()

    def take(self, wait: bool = False) -> Iterator[Done]:
        """Yield what has come since; with ``wait`` all, and end the process."""
        yield from self._turn(0.0)
        while wait and self._current is not None:
            yield from self._turn(0.5)
        if wait and self._worker is not None:
            self._worker.end()
            self._worker = None

    def _turn(self, patience: float) -> Iterator[Done]:
        """Take what is ready, and give what waits."""
        job = self._current
        if job is not None and self._worker is not None:
            if self._worker.pipe.poll(patience):
                found = self._worker.take()
                self._current = None
                yield from job.done(found)
            elif time.monotonic() > job.over:
                self._worker.end()
                self._worker, self._current = None, None
                yield from job.done(Crash("time: it did not end by itself, and was ended"))
        while self._current is None and self._waiting:
            job = self._waiting.popleft()
            rest = self.limits.of_round(job.given)
            if rest < 1e-6:
                yield from job.done(Crash("time: the round's was used up; not attacked"))
                continue
            if self._worker is None:
                self._worker = Worker(self._function)
            allowed = min(rest, (self.limits.seconds or math.inf) * len(job.nodes))
            job.over = time.monotonic() + 2 * allowed + _GRACE
            self._worker.give((rest, job.content))
            self._current = job


@dataclass
class _Job:
    """A group of observations on its way."""

    server_round: int
    nodes: list[Nodes]
    content: bytes
    given: float
    over: float = math.inf

    def done(self, found: bytes | Crash) -> Iterator[Done]:
        if isinstance(found, Crash):
            outcomes = [Outcome(None, found.reason, 0.0)] * len(self.nodes)
        else:
            outcomes = pickle.loads(found)
        for nodes, outcome in zip(self.nodes, outcomes, strict=True):
            yield self.server_round, nodes, outcome


def _attacked(
    attack: Attack, limits: Limits, rest: float, observations: list[Observation]
) -> list[Outcome]:
    with deadline.limit(rest):
        return run_attack(attack, observations, limits.seconds, limits.memory_gib)


def _serve(limits: Limits, threads: int, item: tuple[float, bytes]) -> bytes:
    """Attack in another process: bytes in and out, for torch would share memory by files."""
    torch.set_num_threads(threads)
    rest, content = item
    attack, observations = pickle.loads(content)
    return pickle.dumps(_attacked(attack, limits, rest, observations))


class _Narrator:
    """Logs of a search that takes more than a moment: the labels, how long, and how far."""

    def __init__(self, server_round: int, nodes: Sequence[Nodes]):
        self.server_round, self.nodes = server_round, nodes
        self.labels: list[list[int]] = []
        self.begun = self.told = time.monotonic()
        self.doing = ""

    def __call__(self, event: str, fields: Mapping[str, Any]) -> None:
        if event == "labels":
            self.labels = fields["labels"]
        elif event == "step" and 0 < fields["done"] < fields["total"]:
            self._step(**fields)

    def _step(self, doing: str, done: int, total: int, **rest: Any) -> None:
        now = time.monotonic()
        if doing != self.doing:
            self.doing, self.begun = doing, now - events.PAUSE
            self._tell_labels()
        elif now - self.told < _PAUSE:
            return
        self.told = now
        left = (now - self.begun) / done * (total - done)
        log(
            INFO, "round %s: %s, step %s of %s: %s to go%s", self.server_round, doing, done, total,
            _span(left), _ends(left, deadline.left()),
        )  # fmt: skip

    def _tell_labels(self) -> None:
        if len(self.labels) == len(self.nodes):
            for nodes, labels in zip(self.nodes, self.labels, strict=True):
                log(INFO, "round %s, nodes %s: labels %s; images are looked for",
                    self.server_round, nodes, labels)  # fmt: skip
        self.labels = []


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _ends(needed: float, allowed: float) -> str:
    if needed <= allowed:
        return ""
    return f", but it ends in {_span(allowed)} with the best by then"
