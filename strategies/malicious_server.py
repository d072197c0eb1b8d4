"""The honest-but-curious server: any strategy, and an attack on what it receives."""

from __future__ import annotations

import atexit
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from logging import ERROR, INFO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from fedleak.attacks import Attack, Dossier, Outcome, make_attack
from fedleak.attacks.dossier import BUDGET
from fedleak.capture import CaptureWriter, Update
from fedleak.capture.update import load_sent
from fedleak.client.loss import PLAIN
from fedleak.client.probe import probe
from fedleak.client.training import LocalTraining
from fedleak.defences import parse_defence
from fedleak.errors import FedleakError, InvalidInputError, UnknownNameError
from fedleak.modules import copied, unwrapped
from fedleak.observation import Observation
from fedleak.terms import Terms
from fedleak.threat import HONEST, ThreatModel

from .declared import Config, Declared, Defended, named, to_tensors
from .delegate import DelegatingStrategy
from .leak import Leak, log_leak
from .work import PLACES, InBackground, InRound, Limits, Place

__all__ = ["Leak", "MaliciousServer"]

#: Bytes of the updates that all clients' dossiers keep together.
_ALL_DOSSIERS = 2 * 2**30


class MaliciousServer(DelegatingStrategy):
    """Wrap any strategy and attack every update that it receives.

    The training is that of the wrapped strategy, bit for bit: replies are copied before
    the strategy sees them, random states are restored, and whatever the attack does wrong
    ends in :attr:`Leak.reason`. ``MaliciousServer(DP(FedAvg()))`` sees what clients sent;
    ``DP(MaliciousServer(FedAvg()))`` sees what the outer strategy leaves of it.

    Parameters
    ----------
    strategy : Strategy
        The strategy that trains.
    model : nn.Module or callable
        The architecture (its weights do not matter), or a function that makes it.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    attack : str, Attack or None
        A registered name, or an attack. None only captures.
    training : LocalTraining or callable, optional
        What clients do and reply: loss, optimiser, learning rate, normalisation.
        Without it they share a gradient of the mean cross-entropy. A callable says it of each
        client: ``(server_round, node_id, config) -> LocalTraining or None``, with ``config`` what
        the server's message holds beside the weights.
    num_images : int or callable
        Number of images that a client uses in one round; a callable says it of each client, as
        for ``training``. A plain
        number holds where a reply does not say its own as ``num-examples``.
    threat : ThreatModel
        What the server knows and may do. With ``view="sum"`` it sees, as under secure
        aggregation, only the sum over all clients: simulated, by adding up what was received.
    labels_of : callable, optional
        ``(server_round, node_id) -> labels``, where the threat model grants them.
    every : int
        Attack in every n-th round.
    max_clients : int
        Attack at most this many clients a round, in the order they were asked; 0 for all.
        A sum is always over all.
    defence : DefenceSpec, str or callable, optional
        What clients do to their updates, as ``"noise:0.1"``: the server knows it, as its threat
        model then says. Without it the server is unaware of any. A callable says it of each
        client, as for ``training``: :func:`strategies.clipping_told` reads it from the message.
    on_leak : callable, optional
        Called with each :class:`Leak`. By default they are logged.
    capture : path or CaptureWriter, optional
        Write every update that would be attacked into this new folder, for
        ``fedleak attack``. A model that has no importable name needs a
        :class:`CaptureWriter` of your own that says its ``spec``.
    attack_in : {"round", "background"}
        Whether a round waits for its attacks, or goes on while a process beside it attacks,
        which shares the processor. Leaks are then reported as they come, the last of them by
        :meth:`wait`. A script needs the usual ``if __name__ == "__main__":`` for it.
    seconds, round_seconds : float
        Allowed for each update, and for all of a round; 0: no limit. An attack ends there with
        the best it has by then, and its leak says so in its ``reason``; where that is nothing,
        it has failed. Hitting a limit makes results hang on the speed of the machine.
    memory_gib : float
        Memory that an attack may take beyond what is in use; 0: most of what is free.
    memory : bool
        Keep a :class:`fedleak.attacks.Dossier` of each client: a gallery of the images that its
        updates told, each leak's beside it. It is written in the round, also where attacks are
        done in the background.

    Attributes
    ----------
    dossiers : dict
        Those of ``memory``, by nodes.
    last_leaks : list of Leak
        Those of the last round attacked; in the background, those reported since it began.

    Raises
    ------
    UnsupportedModelError
        If the model is none that is attacked.
    InvalidInputError, UnknownNameError
        If the model cannot take such images, a parameter is out of range or the attack unknown.
    """

    def __init__(
        self,
        strategy: Strategy,
        model: nn.Module | Callable[[], nn.Module],
        input_shape: tuple[int, int, int],
        attack: str | Attack | None = "hybrid",
        training: LocalTraining | Callable[[int, int, Config], LocalTraining | None] | None = None,
        num_images: int | Callable[[int, int, Config], int] = 1,
        threat: ThreatModel = HONEST,
        labels_of: Callable[[int, int], Sequence[int]] | None = None,
        every: int = 1,
        max_clients: int = 0,
        defence: Defended | Callable[[int, int, Config], Defended] = None,
        on_leak: Callable[[Leak], None] | None = None,
        capture: CaptureWriter | Path | str | None = None,
        attack_in: Place = "round",
        seconds: float = Limits.seconds,
        round_seconds: float = Limits.round_seconds,
        memory_gib: float = Limits.memory_gib,
        memory: bool = False,
    ):
        super().__init__(strategy)
        if every < 1 or max_clients < 0:
            raise InvalidInputError(
                f"every ({every}) must be at least 1 and max_clients ({max_clients}) at least 0"
            )
        if attack is None and capture is None:
            raise InvalidInputError("nothing to do: name an attack, or a folder to capture into")
        self.declared = Declared(
            input_shape,
            training,
            num_images,
            threat,
            labels_of,
            parse_defence(defence) if isinstance(defence, str) else defence,
        )
        self.threat, input_shape = self.declared.threat, self.declared.input_shape
        with _preserved_random_state():  # the app may draw its first weights after this
            self.model = unwrapped(model if isinstance(model, nn.Module) else model())
            if attack is not None and not callable(training):
                loss = PLAIN if training is None else training.criterion
                probe(self.model, input_shape, loss)  # refuses what cannot be attacked
            self.attack = make_attack(attack) if isinstance(attack, str) else attack
        self.every, self.max_clients = every, max_clients
        self.on_leak = on_leak or log_leak
        if isinstance(capture, (str, Path)):
            with _preserved_random_state():
                capture = CaptureWriter(capture, model, input_shape)
        self.capture = capture
        if attack_in not in PLACES:
            raise UnknownNameError("attack_in", attack_in, PLACES)
        self.limits = Limits(seconds, round_seconds, memory_gib)
        self._work: InRound | InBackground | None = None
        if self.attack is not None:
            self._work = InRound(self.limits)
            if attack_in == "background":
                self._work = InBackground(self.limits, self.attack)
                atexit.register(self.wait)  # also where another strategy runs the rounds
        self.last_leaks: list[Leak] = []
        self._weights: dict[int, dict[str, Tensor]] = {}
        self._told_size = False
        told = isinstance(training, LocalTraining) and not callable(num_images)
        steps = training.steps(num_images) if told else 1  # type: ignore[union-attr,arg-type]
        if memory and steps > 1:
            raise InvalidInputError(
                f"memory is for clients that take one local step, not {steps}; leave memory out"
            )
        self.memory = memory
        self.dossiers: dict[tuple[int, ...], Dossier] = {}
        self._observed: dict[tuple[int, tuple[int, ...]], Observation] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = super().configure_train(server_round, arrays, config, grid)
        self._weights = {}
        return messages

    def _sent_to(self, node: int) -> dict[str, Tensor]:
        """Return the weights that a node was sent; one and the same for nodes that share them."""
        record = self.sent[node]
        if id(record) not in self._weights:
            weights = named(to_tensors(record), self.model.state_dict())
            self._weights[id(record)] = weights
        return self._weights[id(record)]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        self._collect()
        if server_round % self.every == 0 or server_round == 1:
            try:
                with _preserved_random_state():
                    self._attack(server_round, replies)
            except Exception as error:  # the training goes on, whatever happens here
                log(ERROR, "round %s: the attack broke off: %r", server_round, error)
        return super().aggregate_train(server_round, replies)

    def _attack(self, server_round: int, replies: list[Message]) -> None:
        """Observe every client that was asked, capture, attack, and report each leak."""
        by_node = {r.metadata.src_node_id: r for r in replies}
        asked = list(self.sent)
        if self.threat.view == "client":  # a sum is over all of them
            asked = asked[: self.max_clients or None]
        self.last_leaks = []
        observations: dict[tuple[int, ...], Observation] = {}
        models: dict[int, nn.Module] = {}
        for place, node in enumerate(asked):
            kept = False
            try:
                sent = self._sent_to(node)
                if id(sent) not in models:
                    models[id(sent)] = load_sent(copied(self.model), sent)
                model, config = models[id(sent)], self.sent.configs[node]
                update = self.declared.update(
                    server_round, node, by_node.get(node), config, sent, model
                )
                update = replace(update, place=place)
                self._tell_size(update)
                kept = self.threat.view == "client" and self._keep(update)
                observations[(node,)] = update.observe(model)
            except Exception as error:  # a client may send anything
                self._lose(server_round, node, error, note=not kept)
        if self.threat.view == "sum" and observations:
            nodes = tuple(node for (node,) in observations)
            try:
                observations = {nodes: Observation.sum_of(list(observations.values()))}
            except FedleakError as error:
                if self.attack is not None:
                    self._report(Leak(server_round, nodes, None, str(error)))
                return
            sent = self._sent_to(nodes[0])
            self._keep(Update.of_sum(server_round, nodes, sent, observations[nodes]))
        self._attack_groups(server_round, observations)

    def _tell_size(self, update: Update) -> None:
        """Say once that a reply names another number of images than was declared."""
        declared, said = self.declared.num_images, update.terms.num_images
        if self._told_size or callable(declared) or declared in (1, said):
            return
        self._told_size = True
        log(INFO, "round %s, nodes %s: its num-examples says %s images, num_images %s; the reply's "
            "is taken, here and from now on. If it counts batches, give num_images as a function",
            update.server_round, update.nodes, said, declared)  # fmt: skip

    def _keep(self, update: Update) -> bool:
        """Capture an update; a full disk costs the capture, not the attack or the training."""
        if self.capture is None:
            return False
        try:
            self.capture.add(update)
        except Exception as error:  # also a tensor of a type that cannot be stored
            log(ERROR, "round %s: not captured: %r", update.server_round, error)
            self._note(update.server_round, update.nodes, f"not captured: {error}")
        return True

    def _note(self, server_round: int, nodes: tuple[int, ...], reason: str) -> None:
        if self.capture is not None:
            try:
                self.capture.add_failure(server_round, nodes, reason)
            except Exception as error:
                log(ERROR, "round %s: not captured: %r", server_round, error)

    def _lose(self, server_round: int, node: int, error: Exception, note: bool) -> None:
        """Report that a client's update cannot be attacked, and note it in the capture."""
        reason = str(error)
        if not isinstance(error, FedleakError):
            reason = f"the client's reply cannot be read: {type(error).__name__}: {error}"
        if note:
            self._note(server_round, (node,), reason)
        if self.attack is not None:
            self._report(Leak(server_round, (node,), None, reason, received=False))

    def _attack_groups(
        self, server_round: int, observations: dict[tuple[int, ...], Observation]
    ) -> None:
        """Attack together what is of one model and one kind of client."""
        if self._work is None:
            return
        groups: dict[tuple[int, Terms], dict[tuple[int, ...], Observation]] = {}
        for nodes, observation in observations.items():
            if self.memory:
                self._observed[server_round, nodes] = observation
            kind = id(observation.model), replace(observation.terms, labels=None)
            groups.setdefault(kind, {})[nodes] = observation
        chosen = [(self._attack_for(next(iter(group))), group) for group in groups.values()]
        for done in self._work.add(server_round, chosen):
            self._report_done(*done)

    def _report_done(self, server_round: int, nodes: tuple[int, ...], outcome: Outcome) -> None:
        found = outcome.reconstruction
        leak = Leak(server_round, nodes, found, outcome.reason, outcome.seconds)
        observation = self._observed.pop((server_round, nodes), None)
        if observation is not None:
            leak = self._remembered(leak, observation)
        self._report(leak)

    def _remembered(self, leak: Leak, observation: Observation) -> Leak:
        """Add a leak to the dossier of its client."""
        if leak.nodes not in self.dossiers:
            assert self.attack is not None
            self.dossiers[leak.nodes] = Dossier(self.attack)
            for one in self.dossiers.values():
                one.budget = min(BUDGET, _ALL_DOSSIERS // len(self.dossiers))
        dossier = self.dossiers[leak.nodes]
        if leak.reconstruction is None:
            return replace(leak, dossier=dossier)
        try:
            made = dossier.add(leak.server_round, observation, leak.reconstruction)
        except Exception as error:  # the training goes on, whatever happens here
            log(ERROR, "round %s, nodes %s: not remembered: %r", leak.server_round, leak.nodes,
                error)  # fmt: skip
            return replace(leak, dossier=dossier)
        return replace(leak, together=made, dossier=dossier)

    def _collect(self, wait: bool = False) -> None:
        """Report what came from the background."""
        if self._work is not None:
            try:
                for done in self._work.take(wait):
                    self._report_done(*done)
            except Exception as error:  # the training goes on, whatever happens there
                log(ERROR, "attacks in the background broke off: %r", error)

    def wait(self) -> None:
        """Wait for attacks in the background and report them; :meth:`start` ends with it."""
        self._collect(wait=True)

    def start(self, *args: Any, **kwargs: Any) -> Result:
        result = super().start(*args, **kwargs)
        self.wait()
        return result

    def _attack_for(self, nodes: tuple[int, ...]) -> Attack:
        """Return the attack on the update of these clients."""
        assert self.attack is not None
        return self.attack

    def _report(self, leak: Leak) -> None:
        self.last_leaks.append(leak)
        try:
            self.on_leak(leak)
        except Exception as error:  # a full disk must not end the training
            log(ERROR, "round %s: a leak could not be recorded: %r", leak.server_round, error)


@contextmanager
def _preserved_random_state() -> Iterator[None]:
    """Leave the random generators as they were: an attack must not shift the training."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
