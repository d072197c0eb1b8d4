"""A federated run, described and validated."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedleak.attacks import ATTACKS, make_attack
from fedleak.client.training import LocalTraining
from fedleak.data import check_name
from fedleak.defences import DefenceSpec, parse_defence
from fedleak.errors import FedleakError, InvalidInputError, UnknownNameError, nearest
from fedleak.files import read_text
from fedleak.models import MODELS, load_factory
from fedleak.priors import make_prior
from fedleak.threat import ThreatModel, View
from fedleak.wording import clean

SHIPPED = Path(__file__).parent / "scenarios"

#: Strategies by name: FedSGD is ours, the others are Flower's.
GRADIENT_STRATEGIES = ("FedSGD",)
WEIGHT_STRATEGIES = (
    "FedAvg",
    "FedProx",
    "FedAdam",
    "FedAdagrad",
    "FedYogi",
    "FedAvgM",
    "FedMedian",
    "FedTrimmedAvg",
    "Krum",
    "MultiKrum",
    "Bulyan",
    "QFedAvg",
)


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class Data(_Section):
    """Where the images come from."""

    name: str = Field("digits", description="digits, folder, or a torchvision data set")
    root: str = Field("data", description="folder of the data set")
    download: bool = Field(False, description="let torchvision download it")
    size: int = Field(0, ge=0, le=4096, description="resize to this height and width; 0: leave")
    max_images: int = Field(0, ge=0, description="training images used; 0: all")
    max_test_images: int = Field(2000, ge=1, description="test images used")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        check_name(name)
        return name


class Partition(_Section):
    """How the images are spread over the clients."""

    kind: Literal["iid", "dirichlet"] = "iid"
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; small: few classes each")


class Federation(_Section):
    """Who takes part, and for how long."""

    clients: int = Field(10, ge=1)
    fraction: float = Field(1.0, gt=0, le=1, description="share of clients asked each round")
    rounds: int = Field(5, ge=1)


def _numbers(text: float | str) -> tuple[float, ...]:
    """Return the numbers of ``"0.5/0.5"``."""
    if not isinstance(text, str):
        return (float(text),)
    try:
        return tuple(float(part) for part in text.split("/") if part.strip())
    except ValueError as error:
        raise InvalidInputError(
            f"{text!r} is no number, and no list of them as 0.1/0.05"
        ) from error


class Training(_Section):
    """What a client does with the model it receives."""

    share: Literal["gradient", "weights"] = "gradient"
    local_steps: int = Field(1, ge=1, description="batches of a round")
    batch_size: int = Field(1, ge=1)
    epochs: int = Field(1, ge=1, description="passes over the round's batches")
    learning_rate: float | str = Field(
        0.1, description="a number; or one for each round, 0.1/0.05, the last one from then on"
    )
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    loss: str = Field("cross-entropy", description="NAME or NAME:KEY=VALUE,...")
    optimiser: str = Field(
        "", description="NAME or NAME:KEY=VALUE,...; empty: SGD with momentum and weight_decay"
    )
    mean: str = Field("", description="clients normalise images: (x - mean) / std, as 0.5/0.5/0.5")
    std: str = Field("", description="of each channel or of all; empty: images in [0, 1]")
    norm: Literal["", "train", "eval"] = Field(
        "", description="statistics of normalisation layers: of the batch, or running; empty: train"
    )
    max_norm: float = Field(
        0.0, ge=0, description="norm that the gradient of each step is cut to; 0: none"
    )
    threads: int = Field(
        1, ge=1, le=1024, description="CPU threads of one client; fixed for repeatability"
    )

    @property
    def images(self) -> int:
        """Images that a client uses in one round."""
        return self.local_steps * self.batch_size

    @property
    def first_rate(self) -> float:
        """The learning rate of the first round."""
        return _numbers(self.learning_rate)[0]

    @property
    def local(self) -> LocalTraining | None:
        """The same, as the library takes it; None for the gradient of the mean cross-entropy."""
        plain = self.share == "gradient"
        rates = _numbers(self.learning_rate)
        declared = LocalTraining(
            1.0 if plain else rates[0] if len(rates) == 1 else rates,
            1 if plain else self.batch_size,
            self.epochs,
            self.momentum,
            self.weight_decay,
            optimiser=self.optimiser or None,
            loss=self.loss,
            reply="gradient" if plain else "weights",
            mean=_numbers(self.mean),
            std=_numbers(self.std),
            norm=self.norm,
            max_norm=self.max_norm,
        )
        return declared.as_gradient() if plain else declared

    @field_validator("learning_rate", "mean", "std", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Take a list of numbers for its text."""
        return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else value

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _alone(cls, value: Any) -> Any:
        """Take one number for its text."""
        one = isinstance(value, (int, float)) and not isinstance(value, bool)
        return str(value) if one else value

    @field_validator("learning_rate")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        rates = _numbers(value)
        if not rates or not all(rate > 0 for rate in rates):
            raise ValueError("a learning rate must be above 0")
        return rates[0] if len(rates) == 1 else value

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        self.local  # noqa: B018  # refuses what the library does not take
        if len(_numbers(self.learning_rate)) > 1 and self.share == "gradient":
            raise InvalidInputError(
                f"learning_rate {self.learning_rate!r} is one for each round, but clients that "
                "share a gradient take no step; give one number"
            )
        return self


class Threat(_Section):
    """What the server knows beside model and update, and what it may do."""

    labels: bool = False
    batch_size: bool = True
    learning_rate: bool = True
    local_steps: bool = True
    public_images: bool = True
    buffers: bool = False
    defence: bool = Field(False, description="an informed attacker knows the clients' defence")
    tamper: bool = False
    view: View = Field("client", description="client, or sum: only that over all clients")

    @property
    def model(self) -> ThreatModel:
        """The same, as the library takes it."""
        return ThreatModel(**self.model_dump())


class Model(_Section):
    """The network, by name or factory, and its first weights."""

    name: str = Field("cnn2-v2", description="a registered name, FILE.py:FACTORY or module:FACTORY")
    weights: str = Field("", description="checkpoint to start from: safetensors or state dict")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if ":" in name:
            load_factory(name)
        elif name not in MODELS:
            raise UnknownNameError("model", name, MODELS)
        return name


class Strategy(_Section):
    """How the server aggregates."""

    name: str = Field("FedSGD", description="FedSGD, or a strategy of Flower")
    options: dict[str, Any] = Field(default_factory=dict, description="its other arguments")

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in (*GRADIENT_STRATEGIES, *WEIGHT_STRATEGIES):
            raise UnknownNameError("strategy", name, (*GRADIENT_STRATEGIES, *WEIGHT_STRATEGIES))
        return name


class Attack(_Section):
    """What the server does with what it receives."""

    name: str = Field("hybrid", description="an attack; none: updates are captured only")
    every: int = Field(1, ge=1, description="attack in every n-th round (and the first)")
    clients: int = Field(0, ge=0, description="clients attacked each round; 0, or in a sum: all")
    device: str = Field("auto", description="auto, cpu or cuda")
    seconds: float = Field(600.0, ge=0, description="allowed for each update; 0: no limit")
    round_seconds: float = Field(0.0, ge=0, description="allowed for a round; 0: no limit")
    memory_gib: float = Field(0.0, ge=0, description="allowed at once; 0: most of what is free")
    options: dict[str, Any] = Field(default_factory=dict, description="the attack's own settings")

    @model_validator(mode="after")
    def _known(self) -> Attack:
        if self.none:
            return self
        if self.name not in ATTACKS:
            raise UnknownNameError("attack", self.name, ("none", *ATTACKS))
        if "device" in self.options:
            raise InvalidInputError("set attack.device, not attack.options.device")
        make_attack(self.name, **self.options)
        return self

    @property
    def none(self) -> bool:
        """Whether nothing is attacked while the clients train."""
        return self.name == "none"


class Defence(_Section):
    """What a client does to its update before it sends it."""

    name: str = Field("none", description="a name, or several in order: clip+noise")
    strength: float | str = Field(0.0, description="in its own unit; of several: 1+0.1")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Take ``"clip:1+noise:0.1"`` for the section, or for its name."""
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, dict) and ":" in str(value.get("name", "")):
            spec = parse_defence(value["name"])
            return {"strength": spec.strength, **value, "name": spec.name}
        return value

    @model_validator(mode="after")
    def _known(self) -> Defence:
        DefenceSpec(self.name, self.strength)
        return self

    @property
    def spec(self) -> DefenceSpec:
        """The same, as the library takes it."""
        return DefenceSpec(self.name, self.strength)


class Metric(_Section):
    """The predicted PSNR of the clients' updates, beside what the attack makes of them."""

    predict: Literal["auto", "all", "none"] = Field(
        "auto", description="auto: all clients where images are small, else one a round"
    )
    prior_options: dict[str, Any] = Field(
        default_factory=dict, description="the Gaussian prior of the images; else the attack's"
    )

    @model_validator(mode="after")
    def _known(self) -> Metric:
        make_prior("gaussian", (3, 8, 8), **self.prior_options)
        return self


class Scenario(_Section):
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
        labels = [d.spec.label for d in self.arms()]
        if len(set(labels)) != len(labels):
            raise InvalidInputError(f"a defence is listed twice: {', '.join(labels)}")
        return self

    def arms(self) -> tuple[Defence, ...]:
        """Return the defences to run: the scenario's own first, then those to compare."""
        return (self.defence, *self.compare)

    def arm(self, defence: Defence) -> Scenario:
        """Return this scenario under one defence alone."""
        return self.model_copy(update={"defence": defence, "compare": ()})


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


def read_table(
    source: str | Path, folder: Path = SHIPPED, kind: str = "scenario"
) -> dict[str, Any]:
    """Read a TOML file, or one that is shipped in ``folder``, by its name; unchecked.

    Raises
    ------
    InvalidInputError
        If it is missing or no TOML.
    """
    path = Path(source)
    if not path.suffix and (folder / f"{source}.toml").is_file():
        path = folder / f"{source}.toml"
    if not path.is_file():
        shipped = sorted(p.stem for p in folder.glob("*.toml"))
        raise InvalidInputError(
            f"there is no {kind} {str(source)!r}{nearest(str(source), shipped)}"
        )
    try:
        table = tomllib.loads(read_text(path))
    except RecursionError:
        raise InvalidInputError(f"{kind} {str(path)!r} is nested too deep") from None
    except (OSError, ValueError) as error:  # of TOML and of UTF-8, too
        raise InvalidInputError(f"{kind} {str(path)!r} is not valid TOML: {error}") from error
    table.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "run")
    return table


def override(table: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Put each ``"section.key=value"`` into a nested table, and return it."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InvalidInputError(f"--set {text!r}: write section.key=value")
        _put(table, key.strip(), _value(value.strip()))
    return table


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
            _put(table, key, value)
    return make_scenario(table)


def _put(table: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    if sections == [] and key == "defence" and isinstance(value, str):
        table[key] = value
        return
    for section in sections:
        inner = table.setdefault(section, {})
        if isinstance(inner, str) and section == "defence":
            inner = table[section] = Defence.model_validate(inner).model_dump()
        if not isinstance(inner, dict):
            raise InvalidInputError(f"{dotted!r}: {section!r} is a value, not a section")
        table = inner
    table[key] = value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except RecursionError:
        raise InvalidInputError(f"--set {clean(text)!r} is nested too deep") from None
    except tomllib.TOMLDecodeError:
        return text  # a bare word: --set data.name=CIFAR10


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Return what is wrong with a table, in one line."""
    return "; ".join(_explain(e, root) for e in error.errors())


def _explain(error: Any, root: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = root
        for part in error["loc"][:-1]:
            place = getattr(section, "model_fields", {}).get(part)
            section = place.annotation if place is not None else Defence  # in `compare`
        known = getattr(section, "model_fields", Defence.model_fields)
        return f"unknown key {where!r}{nearest(str(error['loc'][-1]), known)}"
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, FedleakError):
        return f"{where}: {cause}" if where else str(cause)
    return f"{where} = {error['input']!r}: {error['msg']}"
