"""A federated run, described and validated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from fedleak.client.training import LocalTraining
from fedleak.errors import InvalidInputError
from simulations.sections import (
    GRADIENT_STRATEGIES,
    Attack,
    Data,
    Defence,
    Federation,
    Guard,
    Metric,
    Model,
    Partition,
    Section,
    Strategy,
    Tamper,
    Threat,
    Training,
)
from simulations.tables import explain, override, put, read_table


class Scenario(Section):
    """One federated run: data, clients, training, attack and defence."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, lt=2**31)
    data: Data = Data()
    partition: Partition = Partition()
    federation: Federation = Federation()
    training: Training = Training()
    model: Model = Model()
    strategy: Strategy = Strategy()
    threat: Threat = Threat()
    attack: Attack = Attack()
    defence: Defence = Defence()
    metric: Metric = Metric()
    tamper: Tamper = Tamper()
    guard: Guard = Guard()
    compare: Annotated[
        tuple[Defence, ...], Field(description="defences to run beside, NAME:STRENGTH each")
    ] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        needs = "gradient" if self.strategy.name in GRADIENT_STRATEGIES else "weights"
        if self.training.share != needs:
            other = "FedSGD" if self.training.share == "gradient" else "FedAvg"
            raise InvalidInputError(
                f"strategy {self.strategy.name!r} aggregates {needs}, but training.share is "
                f"{self.training.share!r}; set training.share={needs} or strategy.name={other}"
            )
        if self.strategy.privacy and self.training.share == "gradient":
            raise InvalidInputError(
                f"strategy.privacy={self.strategy.privacy!r} is of Flower and clips weights; set "
                "training.share=weights and strategy.name=FedAvg"
            )
        if self.training.share == "gradient":
            for key, least in (("local_steps", 1), ("epochs", 1), ("momentum", 0),
                               ("weight_decay", 0)):  # fmt: skip
                if (value := getattr(self.training, key)) != least:
                    raise InvalidInputError(
                        f"training.{key} is {value}, but a client that shares a gradient takes "
                        "one plain step; set training.share=weights"
                    )
        for arm in self.arms():
            examples, training = arm.spec.examples, self.training
            if examples and (training.share, training.batch_size) != ("gradient", examples):
                raise InvalidInputError(
                    f"defence {arm.spec.label!r} works on the gradients of {examples} images; set "
                    f"training.share=gradient and training.batch_size={examples}, or leave "
                    "examples out"
                )
        if (made := self.tamper.made) is not None:
            self.threat.model.demand(
                made.needs, f"tamper {self.tamper.name!r}", "set tamper.name=none"
            )
            if self.threat.view == "sum" and self.tamper.clients:
                raise InvalidInputError(
                    f"tamper.clients is {self.tamper.clients}, but with threat.view=sum the server "
                    "gets one sum over updates of one model; set tamper.clients=0"
                )
        if self.attack.memory and self.threat.view == "sum":
            raise InvalidInputError(
                "attack.memory keeps a gallery of each client, and with threat.view=sum the server "
                "sees no client alone; set attack.memory=false"
            )
        for asked, what, off in (
            (self.guard.leakage, "guard.leakage is predicted for", "guard.leakage=0"),
            (self.attack.memory, "attack.memory is for clients that take", "attack.memory=false"),
        ):
            if asked and self.training.local_steps * self.training.epochs > 1:
                raise InvalidInputError(
                    f"{what} one local step; set training.local_steps=1 and training.epochs=1, or "
                    f"{off}"
                )
        labels = [d.spec.label for d in self.arms()]
        if len(set(labels)) != len(labels):
            raise InvalidInputError(f"a defence is listed twice: {', '.join(labels)}")
        return self

    @property
    def local(self) -> LocalTraining | None:
        """What clients do, FedProx's term with it; None for a gradient of the cross-entropy."""
        local, mu = self.training.local, self.strategy.options.get("proximal_mu", 0.0)
        if local is None or self.strategy.name != "FedProx":
            return local
        return replace(local, proximal_mu=mu)

    def arms(self) -> tuple[Defence, ...]:
        """Return the defences to run: the scenario's own first, then those to compare."""
        return (self.defence, *self.compare)

    def arm(self, defence: Defence, tamper: Tamper | None = None) -> Scenario:
        """Return this scenario under one defence alone, and by default with its tamper."""
        own = {"defence": defence, "compare": (), "tamper": tamper or self.tamper}
        return self.model_copy(update=own)

    def variants(self) -> tuple[Scenario, ...]:
        """Return what is run: each defence alone; with a tamper, the honest server first."""
        tampers = (Tamper(),) if self.tamper.made is None else (Tamper(), self.tamper)
        return tuple(self.arm(d, t) for d in self.arms() for t in tampers)

    @property
    def label(self) -> str:
        """Name of this variant, as one word: its defence, and its tamper if it has one."""
        tamper = "" if self.tamper.made is None else f"_{self.tamper.label}"
        return f"{self.defence.spec.label}{tamper}"


def load_scenario(
    source: str | Path | None = None,
    overrides: Iterable[str] = (),
    seed: int | None = None,
) -> Scenario:
    """Read a scenario file and apply overrides.

    Parameters
    ----------
    source : path or str, optional
        A TOML file, or the name of a shipped scenario (``"demo"``); by default the
        defaults alone.
    overrides : iterable of str
        ``"section.key=value"``, the value in TOML or a bare word.
    seed : int, optional
        Replaces the scenario's seed.

    Returns
    -------
    Scenario

    Raises
    ------
    InvalidInputError
        If the file is missing or no TOML, a key unknown, or a value not allowed; the
        message names the key and, for names, the nearest known one.
    """
    table = override({} if source is None else read_table(source), overrides)
    if seed is not None:
        table["seed"] = seed
    return make_scenario(table)


def make_scenario(table: Mapping[str, Any]) -> Scenario:
    """Validate a nested table.

    Parameters
    ----------
    table : mapping of str to object
        Sections and keys as in a TOML file.

    Returns
    -------
    Scenario

    Raises
    ------
    InvalidInputError
        One line for each problem.
    """
    try:
        return Scenario.model_validate(dict(table))
    except ValidationError as error:
        raise InvalidInputError("invalid scenario: " + explain(error, Scenario)) from error


def flatten(scenario: Scenario) -> dict[str, str | int | float | bool]:
    """Return ``{"section.key": value}`` with the values that a Flower run config can hold."""
    flat: dict[str, str | int | float | bool] = {}

    def walk(prefix: str, table: Mapping[str, Any]) -> None:
        for key, value in table.items():
            if isinstance(value, Mapping):
                walk(f"{prefix}{key}.", value)
            elif isinstance(value, (str, int, float, bool)):
                flat[prefix + key] = value

    walk("", scenario.model_dump(mode="json"))
    return flat


def from_run_config(config: Mapping[str, Any]) -> Scenario:
    """Build a scenario from a Flower run config, with its dotted keys."""
    table: dict[str, Any] = {}
    for key, value in config.items():
        if key not in ("out", "overwrite", "capture"):  # about the output, not the scenario
            put(table, key, value)
    return make_scenario(table)
