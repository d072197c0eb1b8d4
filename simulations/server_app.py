"""The Flower server: trains with a strategy, attacks, scores and records."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from logging import WARNING
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as flower
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch import nn

from fedleak.attacks import attack_for, resolve_device
from fedleak.errors import FedleakError, InvalidInputError
from fedleak.lock import only_writer
from fedleak.metric import SecurityMetric, security_metric
from fedleak.stopping import terminable
from fedleak.strategies import (
    DelegatingStrategy,
    FedSGD,
    MaliciousServer,
    RejectInvalid,
    TamperingServer,
    TamperSender,
)
from simulations.grid import OrderedGrid
from simulations.partition import partitions, training_data
from simulations.prediction import UpdatePrediction
from simulations.privacy import known_defence, private, seeded
from simulations.recorder import Recorder, RoundScores, TruthfulCapture, prepare_folder
from simulations.scenario import Scenario, from_run_config
from simulations.tampering import GuardNotes, TamperBook, check_tamper, tampering_sender, wanted
from simulations.task import evaluate, make_model, test_data
from simulations.traffic import Traffic


@dataclass(frozen=True)
class Progress:
    """What a display may show after each round."""

    server_round: int
    rounds: int
    accuracy: float
    loss: float
    scores: RoundScores


OnProgress = Callable[[Progress], None]


def make_strategy(scenario: Scenario) -> Strategy:
    """Return the scenario's aggregation strategy.

    Raises
    ------
    InvalidInputError
        If the strategy does not take an option.
    """
    clients = scenario.federation.clients
    fixed: dict[str, Any] = {
        "fraction_train": scenario.federation.fraction,
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 0,
        "min_available_nodes": clients,
    }
    name = scenario.strategy.name
    if name == "FedSGD":
        fixed["learning_rate"] = scenario.training.first_rate
    if name == "QFedAvg":
        fixed["client_learning_rate"] = scenario.training.first_rate
    kind = FedSGD if name == "FedSGD" else getattr(flower, name)
    options = scenario.strategy.options
    for key, value in options.items():
        if key in fixed:
            raise InvalidInputError(
                f"strategy.options.{key} is set by the scenario (federation and training)"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidInputError(f"strategy.options.{key} must be a number, not {value!r}")
    try:
        return kind(**{**fixed, **options})
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"strategy {name!r} does not take strategy.options {options}: {error}"
        ) from error


class _RoundClock(DelegatingStrategy):
    """Notes what clients were sent, how long they took, and how much they sent back."""

    def __init__(self, strategy: Strategy, scenario: Scenario, checked: RejectInvalid):
        super().__init__(strategy)
        self._checked = checked
        self.asked = 0
        self.traffic = Traffic(scenario)
        self.seconds_train = 0.0
        self._begin = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.asked, self._begin = len(messages), time.perf_counter()
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.seconds_train = time.perf_counter() - self._begin
        replies = list(replies)
        self.traffic.measure(self.sent, replies)
        self._checked.accepted = 0  # where all replies are kept out, nothing is checked
        return super().aggregate_train(server_round, replies)


def serve(
    grid: Grid,
    scenario: Scenario,
    recorder: Recorder,
    on_progress: OnProgress | None = None,
    capture: bool = False,
    informed: Recorder | None = None,
) -> None:
    """Run all rounds of a scenario on a grid, and record what leaks, or capture it.

    With ``informed`` a second attacker, who knows the defence, is given the same updates, and
    its leaks go to that recorder.
    """
    model = make_model(scenario)
    ordered = OrderedGrid(grid, scenario.federation.clients, scenario.seed)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    shares_gradient = scenario.training.share == "gradient"
    trained = private(make_strategy(scenario), scenario)
    checked = RejectInvalid(trained, names if shares_gradient else None)
    sender = tampering_sender(checked, scenario)
    attacked: Strategy = checked
    if sender is not None:
        sender.prepare_for(model, scenario.training.images)
        attacked = sender
    if informed is not None:
        attacked = _attacker(attacked, informed, model, sender=sender)
    attacked = _attacker(attacked, recorder, model, capture, sender, restore=True)
    notes = GuardNotes(attacked)
    clock = _RoundClock(notes, scenario, checked)

    def sent_to(client: int) -> ArrayRecord:
        return next(clock.sent[n] for n, p in ordered.partitions.items() if p == client)

    recorder.predict = UpdatePrediction(scenario, sent_to)
    recorders = [r for r in (recorder, informed) if r is not None]
    if wanted(scenario):
        for one in recorders:
            one.book = TamperBook(scenario, sender, notes)
    images = test_data(scenario)

    def after_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 0:
            for one in recorders:
                one.partitions = ordered.partitions
            return None
        metric = None
        if clock.sent.usual is not None:
            model.load_state_dict(clock.sent.usual.to_torch_state_dict())
            metric = _metric(model, training_data(scenario).shape, scenario.seed)
        model.load_state_dict(arrays.to_torch_state_dict())
        accuracy, loss = evaluate(model, images, scenario.local)
        row = {
            "accuracy": accuracy,
            "loss": loss,
            "clients": clock.asked,
            "failures": clock.asked - checked.accepted - (sender.withheld if sender else 0),
            "bytes_sent": clock.traffic.bytes_sent,
            "seconds_train": f"{clock.seconds_train:.4f}",
        }
        scores, *_ = [one.round(server_round, row, metric, clock.sent) for one in recorders]
        if on_progress is not None:
            rounds = scenario.federation.rounds
            on_progress(Progress(server_round, rounds, accuracy, loss, scores))
        return MetricRecord({"accuracy": accuracy, "loss": loss})

    with seeded(scenario):
        clock.start(
            grid=ordered,
            initial_arrays=ArrayRecord(model.state_dict()),
            num_rounds=scenario.federation.rounds,
            evaluate_fn=after_round,
        )


def _attacker(
    strategy: Strategy,
    recorder: Recorder,
    model: nn.Module,
    capture: bool = False,
    sender: TamperSender | None = None,
    restore: bool = False,
) -> MaliciousServer:
    """Wrap a strategy by the attacker of a recorder's scenario."""
    scenario = recorder.scenario
    named = scenario.attack
    kind: Callable[..., MaliciousServer] = MaliciousServer
    if sender is not None:
        restore = restore and scenario.tamper.restore
        kind = partial(TamperingServer, tamper=sender, restore=restore, device=named.device)
    attack = None
    if not named.none:
        attack = attack_for(named.name, named.options, named.device, scenario.seed)
    return kind(
        strategy,
        model,
        training_data(scenario).shape,
        attack=attack,
        training=scenario.local,
        num_images=scenario.training.images,
        threat=scenario.threat.model,
        labels_of=recorder.labels_of,
        defence=known_defence(scenario) if scenario.threat.defence else None,
        every=named.every,
        max_clients=named.clients,
        on_leak=recorder.leak,
        capture=TruthfulCapture(recorder, model) if capture else None,
        seconds=scenario.attack.seconds,
        round_seconds=scenario.attack.round_seconds,
        memory_gib=scenario.attack.memory_gib,
        memory=scenario.attack.memory,
    )


def _metric(model: nn.Module, shape: tuple[int, int, int], seed: int) -> SecurityMetric | None:
    """Return c(M) of the weights that were sent; None where it is not defined."""
    try:
        return security_metric(model, shape, seed=seed)
    except FedleakError:
        return None
    except Exception as error:  # a measurement must not end the training
        log(WARNING, "the security metric failed: %r", error)
        return None


def build_server_app(
    scenario: Scenario,
    recorder: Recorder,
    on_progress: OnProgress | None = None,
    capture: bool = False,
    informed: Recorder | None = None,
) -> ServerApp:
    """Return a server that runs one scenario; see :func:`serve`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, scenario, recorder, on_progress, capture, informed)

    return app


def check(scenario: Scenario, capture: bool = False) -> None:
    """Find what validation alone cannot: missing data, misfits, too few images.

    Raises
    ------
    FedleakError
        With what to change.
    """
    if scenario.attack.none and not capture:
        raise InvalidInputError(
            "attack.name is 'none', so nothing would be attacked or kept; capture the updates "
            "(--capture), or name an attack"
        )
    resolve_device(scenario.attack.device)
    partitions(scenario)
    private(make_strategy(scenario), scenario)
    model, images = make_model(scenario), training_data(scenario)
    check_tamper(scenario, model)
    for arm in scenario.arms():
        arm.spec.check([n for n, p in model.named_parameters() if p.requires_grad])
    try:
        logits = model.eval()(images.batch([0])[0])
        fits = tuple(logits.shape)[:1] == (1,) and logits.dim() == 2
        shape = f"{tuple(logits.shape)}"
    except Exception as error:  # a stranger's forward pass may raise anything
        raise InvalidInputError(
            f"model {scenario.model.name!r} cannot take an image of shape {images.shape}: {error}"
        ) from error
    if not fits or logits.shape[1] < images.classes:
        raise InvalidInputError(
            f"model {scenario.model.name!r} returns {shape} for one image; wanted is (1, "
            f"{images.classes}), a logit for each class"
        )


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario of ``flwr run``'s configuration, ``[tool.flwr.app.config]``."""
    from fedleak.plots import plot_run

    config = dict(context.run_config)
    scenario, capture = from_run_config(config), bool(config.get("capture", False))
    check(scenario, capture)
    out = Path(str(config.get("out") or Path("results/runs") / scenario.name)).absolute()
    with only_writer(out), terminable():
        prepare_folder(out, overwrite=bool(config.get("overwrite", False)))
        recorder = Recorder(out, scenario, "flwr run")
        try:
            serve(grid, scenario, recorder, capture=capture)
        except BaseException as error:
            recorder.finish(error)
            raise
        recorder.finish()
        plot_run(out)
