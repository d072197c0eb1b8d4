"""The Flower client: trains on its own images and sends an update."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedleak.defences import DefenceSpec
from fedleak.strategies import choosing_defence_mod
from fedleak.terms import Shared
from fedleak.threads import threads
from simulations.privacy import privacy_mod
from simulations.scenario import Scenario, from_run_config
from simulations.tampering import guard_mod
from simulations.task import local_gradient, local_training, make_model

ScenarioOf = Callable[[Context], Scenario]


def build_client_app(scenario_of: ScenarioOf) -> ClientApp:
    """Return the client of the scenario that ``scenario_of`` finds for a context."""

    def choose(context: Context) -> tuple[DefenceSpec, Shared, int]:
        scenario = scenario_of(context)
        spec = scenario.defence.spec
        # What works on single images has been done before the update is a mean.
        left = DefenceSpec() if spec.examples else spec
        return left, scenario.training.share, scenario.seed

    app = ClientApp()
    template = _Template()

    # The guard stands at the door: it sees what arrives, and has the last word on what leaves.
    # Flower's clipping is the last of what the client does to its update.
    mods = [guard_mod(scenario_of), privacy_mod(scenario_of), choosing_defence_mod(choose)]

    @app.train(mods=mods)
    def train(message: Message, context: Context) -> Message:
        scenario = scenario_of(context)
        client = int(context.node_config["partition-id"])
        config = next(iter(message.content.config_records.values()))
        server_round = int(config["server-round"])  # type: ignore[arg-type]
        (arrays,) = message.content.array_records.values()
        model = template.model(scenario)
        model.load_state_dict(arrays.to_torch_state_dict())
        # A client rounds alike on every engine.
        with threads(scenario.training.threads), torch.random.fork_rng(devices=[]):
            # What a client draws (dropout) is the same on every engine. It is a processor's:
            # torch.manual_seed would queue a seed for every GPU, which takes longer than a step.
            torch.default_generator.manual_seed(
                zlib.crc32(f"{scenario.seed}/{client}/{server_round}".encode())
            )
            if scenario.training.share == "gradient":
                shared, loss = local_gradient(model, scenario, client, server_round)
            else:
                loss = local_training(model, scenario, client, server_round)
                shared = model.state_dict()
        metrics = MetricRecord({"num-examples": scenario.training.images, "train_loss": loss})
        content = RecordDict({"arrays": ArrayRecord(shared), "metrics": metrics})
        return Message(content=content, reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        """Say which partition this node holds, for scoring and for a fixed order."""
        record = ConfigRecord({"partition-id": int(context.node_config["partition-id"])})
        return Message(content=RecordDict({"node": record}), reply_to=message)

    return app


class ScenarioApp(ClientApp):
    """The clients of one scenario, which travel as its text and are built once in each process.

    Flower hands its app to Ray with every message: an app as such is 3 ms each time, and the
    model that its clients share would be made anew.

    Parameters
    ----------
    scenario : str
        As JSON, :meth:`Scenario.model_dump_json`.
    """

    def __init__(self, scenario: str):
        super().__init__()
        self._text = scenario

    def __call__(self, message: Message, context: Context) -> Message:
        return _app_of(self._text)(message, context)

    def __reduce__(self) -> tuple[Any, ...]:
        return ScenarioApp, (self._text,)


@lru_cache(maxsize=2)
def _app_of(text: str) -> ClientApp:
    scenario = Scenario.model_validate_json(text)
    return build_client_app(lambda context: scenario)


class _Template:
    """A process's model, which is as good as one with first weights that are drawn anew.

    Clients overwrite all of its state, one after the other. A model that may hold more state than
    it names, a stranger's, is not used itself: each client has a copy.
    """

    def __init__(self) -> None:
        self._made: tuple[Scenario, nn.Module] | None = None

    def model(self, scenario: Scenario) -> nn.Module:
        if self._made is None or self._made[0] != scenario:
            self._made = scenario, make_model(scenario)
        made = self._made[1]
        if all(_stateless(module) for module in made.modules()):
            return made
        try:
            return copy.deepcopy(made)
        except Exception:  # a stranger's model may hold what cannot be copied
            return make_model(scenario)


def _stateless(module: nn.Module) -> bool:
    """Return whether a module has no state but what ``state_dict`` names."""
    torchs = type(module).__module__.startswith("torch.nn.modules.")
    return torchs and not module._non_persistent_buffers_set and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


app = build_client_app(lambda context: from_run_config(context.run_config))
