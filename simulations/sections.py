"""The sections of a scenario, each validated."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedleak.attacks import ATTACKS, make_attack
from fedleak.client.training import LocalTraining
from fedleak.data import check_name
from fedleak.defences import DefenceSpec, parse_defence
from fedleak.errors import InvalidInputError, UnknownNameError
from fedleak.models import MODELS, load_factory
from fedleak.priors import make_prior
from fedleak.tampers import Tamper as SentModel
from fedleak.tampers import parse_tamper
from fedleak.threat import ThreatModel, View

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


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class Data(Section):
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


class Partition(Section):
    """How the images are spread over the clients."""

    kind: Literal["iid", "dirichlet"] = "iid"
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; small: few classes each")


class Federation(Section):
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


class Training(Section):
    """What a client does with the model it receives."""

    share: Literal["gradient", "weights"] = "gradient"
    local_steps: int = Field(1, ge=1, description="batches of a round")
    batch_size: int = Field(1, ge=1)
    draw: Literal["turn", "anew"] = Field(
        "turn", description="turn: every image once before any twice; anew: at random each round"
    )
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


class Threat(Section):
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


class Model(Section):
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


class Strategy(Section):
    """How the server aggregates."""

    name: str = Field("FedSGD", description="FedSGD, or a strategy of Flower")
    options: dict[str, Any] = Field(default_factory=dict, description="its other arguments")
    privacy: str = Field(
        "", description="Flower's DifferentialPrivacy... around it: NAME:KEY=VALUE,..."
    )

    @property
    def clients_clip(self) -> bool:
        """Whether Flower's mods cut the clients' updates to a norm that the server sends."""
        return "ClientSide" in self.privacy.partition(":")[0]

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in (*GRADIENT_STRATEGIES, *WEIGHT_STRATEGIES):
            raise UnknownNameError("strategy", name, (*GRADIENT_STRATEGIES, *WEIGHT_STRATEGIES))
        return name


class Attack(Section):
    """What the server does with what it receives."""

    name: str = Field("hybrid", description="an attack; none: updates are captured only")
    every: int = Field(1, ge=1, description="attack in every n-th round (and the first)")
    clients: int = Field(0, ge=0, description="clients attacked each round; 0, or in a sum: all")
    device: str = Field("auto", description="auto, cpu or cuda")
    seconds: float = Field(600.0, ge=0, description="allowed for each update; 0: no limit")
    round_seconds: float = Field(0.0, ge=0, description="allowed for a round; 0: no limit")
    memory: bool = Field(False, description="keep a gallery of each client over all rounds")
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


class Defence(Section):
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


class Metric(Section):
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


class Tamper(Section):
    """The model that the server sends instead of the honest one."""

    name: str = Field("none", description="a tamper, NAME or NAME:KEY=VALUE,...; none: honest")
    rounds: str = Field("", description="rounds in which it is sent, as 1/3/5; empty: all")
    clients: int = Field(0, ge=0, description="clients that are sent it each round; 0: all")
    restore: bool = Field(
        True, description="train on the images recovered of a client, in its place"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Take ``"peel"`` for the section."""
        return {"name": value} if isinstance(value, str) else value

    @field_validator("rounds", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Take a number, or a list of them, for its text."""
        if isinstance(value, (list, tuple)):
            return "/".join(map(str, value))
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("rounds")
    @classmethod
    def _numbered(cls, value: str) -> str:
        parts = [part.strip() for part in value.split("/")] if value.strip() else []
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise InvalidInputError(f"{value!r} is no round, and no list of rounds as 1/3/5")
        return "/".join(parts)

    @model_validator(mode="after")
    def _known(self) -> Tamper:
        self.made  # noqa: B018  # refuses what is unknown
        return self

    @property
    def made(self) -> SentModel | None:
        """The tamper; None of an honest server."""
        return None if self.name == "none" else parse_tamper(self.name)

    @property
    def when(self) -> tuple[int, ...] | None:
        """The rounds in which it is sent; None: all."""
        return tuple(map(int, self.rounds.split("/"))) if self.rounds else None

    @property
    def label(self) -> str:
        """As one word, for names of folders."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name)


class Guard(Section):
    """What clients do who look at the model before they train on it."""

    action: Literal["none", "warn", "refuse", "noise"] = Field(
        "none", description="on a sign of tampering: warn, send nothing, or send noise"
    )
    disparity: float = Field(
        0.0, ge=0, description="D-SNR from which one image stands out; 0: it is not looked at"
    )
    leakage: float = Field(
        0.0, ge=0, description="PSNR in dB, predicted for the own update, from which it is a sign; "
        "0: it is not predicted",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Take ``"warn"`` for the section."""
        return {"action": value} if isinstance(value, str) else value

    @property
    def looks(self) -> bool:
        """Whether clients look at all."""
        return self.action != "none"
