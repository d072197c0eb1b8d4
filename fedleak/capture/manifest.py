"""The JSON of a capture: which model, and what belongs to each update.

Everything read here may come from a stranger. It is validated before it is used, names no
file outside its own folder, chooses no code, and is bounded before anything is allocated.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from fedleak.capture.update import Update
from fedleak.client.training import LocalTraining
from fedleak.defences import parse_defence
from fedleak.errors import InvalidInputError, InvalidUpdateError
from fedleak.files import ENVIRONMENT, TEXT, read_bytes, read_json, size_words, tensors
from fedleak.models import MODELS, call_factory
from fedleak.modules import logits_of, unwrapped
from fedleak.terms import Shared, Terms
from fedleak.threat import ThreatModel

FORMAT = "fedleak-capture"
VERSION = 1
MANIFEST = "manifest.json"
#: Bounds what a hostile file can make the reader allocate, list or compute: things of a kind,
#: values of pixels of one image and of all that an update is of, local steps, letters.
MANY, PIXELS, STEPS, LETTERS = 100_000, 1 << 26, 10_000, 1000
_Size = Annotated[int, Field(ge=0, le=1 << 40)]
_Side = Annotated[int, Field(ge=1, le=PIXELS)]
_Label = Annotated[int, Field(ge=0, le=1 << 31)]
_Node = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
_Text = Annotated[str, Field(max_length=LETTERS)]
_Numbers = Annotated[tuple[float, ...], Field(max_length=1000)]
_Names = Annotated[tuple[_Text, ...], Field(max_length=MANY)]
_FILE = r"^[A-Za-z0-9][A-Za-z0-9_-]*\.safetensors$"
_SHA256 = r"^[0-9a-f]{64}$"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelCard(_Part):
    """How to make the model of a capture.

    Attributes
    ----------
    spec : str or None
        A registered name, ``FILE.py:FACTORY`` or ``module:FACTORY``; None where the writer
        was given something that has no such name.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    classes : int or None
        Number of logits.
    dtype : str
        Type of the parameters, ``"float32"``.
    evaluating : tuple of str
        Modules in evaluation mode: a batch normalisation there uses running statistics.
    frozen : tuple of str
        Parameters that are not trained.
    state : dict of str to tuple of int
        Name and shape of every tensor in it.
    """

    spec: _Text | None
    input_shape: tuple[_Side, _Side, _Side]
    classes: int | None = Field(ge=1, le=MANY)
    dtype: Literal["float16", "bfloat16", "float32", "float64"] = "float32"
    evaluating: _Names = ()
    frozen: _Names = ()
    state: dict[_Text, Annotated[tuple[_Size, ...], Field(max_length=64)]] = Field(max_length=MANY)

    @property
    def entries(self) -> int:
        """Number of all numbers in the state."""
        return sum(math.prod(shape) for shape in self.state.values())

    @model_validator(mode="after")
    def _fits(self) -> ModelCard:
        if math.prod(self.input_shape) > PIXELS:
            raise ValueError(f"images of shape {self.input_shape} are larger than {PIXELS} values")
        if 4 * self.entries > tensors():
            raise ValueError(
                f"a model of {self.entries} numbers is larger than the {size_words(tensors())} "
                f"that are read; {ENVIRONMENT} raises that"
            )
        return self


class Manifest(_Part):
    """What holds for a whole capture."""

    format: Literal["fedleak-capture"] = "fedleak-capture"
    version: Literal[1] = 1
    created: _Text
    simulated: bool
    model: ModelCard
    versions: dict[_Text, _Text] = Field(max_length=LETTERS)


class _StoredTerms(_Part):
    """The terms of an update, as far as the attacker knows them."""

    images: int = Field(1, ge=1, le=MANY)
    labels: tuple[_Label, ...] | None = Field(None, max_length=MANY)
    threat: dict[str, bool | _Text] = {}
    training: dict[str, int | float | _Text | _Numbers] | None = None
    shared: Shared = "gradient"
    defence: _Text | None = None

    @staticmethod
    def of(terms: Terms) -> dict[str, Any]:
        """Return the fields of terms."""
        return {
            "images": terms.num_images,
            "labels": terms.labels,
            "threat": asdict(terms.threat),
            "training": None if terms.training is None else _known_training(terms).to_dict(),
            "shared": terms.shared,
            "defence": None if terms.defence is None else str(terms.defence),
        }

    def terms(self, input_shape: tuple[int, int, int], clients: int) -> Terms:
        """Return the terms; what the file does not hold is given."""
        if self.images * math.prod(input_shape) > PIXELS:
            raise InvalidUpdateError(
                f"{self.images} images of shape {input_shape} are more than {PIXELS} values"
            )
        try:
            terms = Terms(
                input_shape=input_shape,
                num_images=self.images,
                labels=self.labels,
                threat=ThreatModel(**self.threat),  # type: ignore[arg-type]
                training=None if self.training is None else LocalTraining(**self.training),  # type: ignore[arg-type]
                shared=self.shared,
                clients=clients,
                defence=None if self.defence is None else parse_defence(self.defence),
            )
        except TypeError as error:
            raise InvalidUpdateError(f"threat or training of the update: {error}") from error
        if terms.steps > STEPS:
            raise InvalidUpdateError(f"{terms.steps} local steps are more than {STEPS}")
        return terms


class Record(_StoredTerms):
    """What belongs to one update, beside its tensors."""

    round: int = Field(ge=0)
    nodes: tuple[_Node, ...] = Field(min_length=1, max_length=MANY)
    tensors: str | None = Field(None, pattern=_FILE)
    tensors_sha256: str | None = Field(None, pattern=_SHA256)
    sent: str | None = Field(None, pattern=_FILE)
    sent_sha256: str | None = Field(None, pattern=_SHA256)
    summed: bool = False
    reason: str = ""

    @classmethod
    def of_update(cls, update: Update, **files: str) -> Record:
        """Return the record of an update whose tensors are in ``files``."""
        return cls(
            round=update.server_round,
            nodes=update.nodes,
            summed=update.summed,
            **cls.of(update.terms),
            **files,
        )

    def update(
        self, sent: dict[str, Tensor], received: dict[str, Tensor], shape: tuple[int, int, int]
    ) -> Update:
        """Return the update, with its tensors."""
        terms = self.terms(shape, len(self.nodes) if self.summed else 1)
        return Update(self.round, self.nodes, sent, received, terms, self.summed)


def _known_training(terms: Terms) -> LocalTraining:
    """Leave out of the file what the attacker does not know; its observation stays the same."""
    training, threat = terms.training, terms.threat
    assert training is not None
    if not threat.learning_rate:
        training = replace(training, learning_rate=1.0, weight_decay=0.0)
        training = _without_options(training)
    if not threat.local_steps:
        training = replace(training, batch_size=terms.own, epochs=1, momentum=0.0, weight_decay=0.0)
        training = _without_options(training)
    return training


def _without_options(training: LocalTraining) -> LocalTraining:
    """Return it without the numbers of its optimiser, of which only the kind is known."""
    return replace(training, optimiser=training.told_rule)


def describe_model(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    spec: str | None,
    classes: int | None,
) -> ModelCard:
    """Return the card of a model, without what wraps it."""
    model = unwrapped(model)
    types = {p.dtype for p in model.parameters()}
    return ModelCard(
        spec=spec,
        input_shape=input_shape,
        classes=classes or _classes(model, input_shape),
        dtype=str(next(iter(types))).removeprefix("torch.") if len(types) == 1 else "float32",
        evaluating=tuple(n for n, m in model.named_modules() if not m.training),
        frozen=tuple(n for n, p in model.named_parameters() if not p.requires_grad),
        state={n: tuple(t.shape) for n, t in model.state_dict().items()},
    )


def _classes(model: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """Return how many logits a model has; None where it does not take a single image."""
    modes = {m: m.training for m in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            image = torch.zeros(1, *shape, dtype=next(model.parameters()).dtype)
            return int(logits_of(model.eval()(image)).shape[1])
    except Exception:  # a stranger's forward pass may raise anything
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode


def spec_of(
    model: nn.Module | Callable[[], nn.Module], input_shape: tuple[int, int, int]
) -> str | None:
    """Return the name by which a factory can be found again; None where it has none.

    A factory of the script that runs is named by its file, any other by its module. A module
    is named by its class, if that makes the same architecture again.
    """
    factory: Any = type(model) if isinstance(model, nn.Module) else model
    registered = MODELS.name_of(factory)
    if registered is not None:
        return registered
    module, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", "")
    found = getattr(sys.modules.get(module or ""), name, None)
    if module is None or found is not factory or not _takes_what_is_offered(factory):
        return None
    if isinstance(model, nn.Module) and not _makes_again(factory, model, input_shape):
        return None
    if module != "__main__":
        return f"{module}:{name}"
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    near = path.is_relative_to(Path.cwd())
    return f"{path.relative_to(Path.cwd()) if near else path}:{name}"


def _makes_again(factory: Any, model: nn.Module, shape: tuple[int, int, int]) -> bool:
    try:
        with torch.random.fork_rng(devices=[]):
            again = call_factory(factory, shape, _classes(model, shape) or 10)
        assert isinstance(again, nn.Module)
    except Exception:  # a stranger's constructor may raise anything
        return False
    found, wanted = again.state_dict(), model.state_dict()
    return {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in wanted.items()}


def _takes_what_is_offered(factory: Any) -> bool:
    """Return whether ``build_model`` can call it."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    open_kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in open_kinds}
    return needed <= {"input_shape", "classes", "num_classes"}


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a capture.

    Raises
    ------
    InvalidInputError
        If the folder is no capture, or its manifest is damaged or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InvalidInputError(f"{str(folder)!r} is no capture: {_what_instead(folder)}")
    try:
        found = read_json(path)
        kind, version = found.get("format"), found.get("version")
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidInputError(
            f"{str(path)!r} cannot be read ({error}); copy the capture again"
        ) from error
    if kind != FORMAT:
        raise InvalidInputError(
            f"{str(path)!r} is not of a capture: its format is {kind!r}, not {FORMAT!r}"
        )
    if version != VERSION:
        raise InvalidInputError(
            f"{str(path)!r} is of version {version!r}, this fedleak reads version {VERSION}; "
            "use the fedleak that wrote it, or a newer one"
        )
    try:
        return Manifest.model_validate(found)
    except ValidationError as error:
        raise InvalidInputError(f"{str(path)!r} is damaged: {problems(error)}") from error


def _what_instead(folder: Path) -> str:
    patterns = (f"*/{MANIFEST}", f"*/*/{MANIFEST}")  # a run, and a run with several arms
    below = [p.parent for pattern in patterns for p in sorted(folder.glob(pattern))]
    if below:
        listed = ", ".join(str(p) for p in below[:4])
        return f"it has no {MANIFEST}; these below it do: {listed}"
    return (
        f"it has no {MANIFEST}; captures are made by fedleak simulate --capture, or by "
        "MaliciousServer(..., capture=FOLDER) in an app of your own"
    )


def read_record(path: Path) -> Record:
    """Read and check what belongs to one update.

    Raises
    ------
    InvalidUpdateError
        If the file is missing or damaged.
    """
    try:
        return Record.model_validate_json(read_bytes(path, TEXT))
    except FileNotFoundError as error:
        raise InvalidUpdateError(f"{path.name} is missing") from error
    except OSError as error:
        raise InvalidUpdateError(f"{path.name} cannot be read: {error}") from error
    except ValidationError as error:
        raise InvalidUpdateError(f"{path.name} is damaged: {problems(error)}") from error


def problems(error: ValidationError) -> str:
    """Return what a validation found, in one line, without the values."""
    listed = [
        f"{'.'.join(map(str, e['loc']))}: {e['msg']}" if e["loc"] else e["msg"]
        for e in error.errors()
    ]
    return "; ".join(listed[:3])


def sha256(content: bytes) -> str:
    """Return a checksum in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
