"""Read a capture: lazily, and what is damaged costs its own row only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from fedleak.capture.manifest import (
    MANIFEST,
    ModelCard,
    Record,
    read_manifest,
    read_record,
    sha256,
)
from fedleak.capture.update import Update, load_sent
from fedleak.errors import FedleakError, InvalidInputError, InvalidUpdateError
from fedleak.files import TEXT, read_bytes, tensors
from fedleak.models import MODELS, build_model
from fedleak.modules import unwrapped
from fedleak.observation import Observation
from fedleak.wording import clean_reason

_ROUND = re.compile(r"round-\d{4,9}")
#: Bytes for the names of tensors, in a file of them.
_NAMES = 64 << 20
_UPDATE = re.compile(r"(client-\d{6,9})\.(json|safetensors)")


@dataclass(frozen=True, eq=False)
class Captured:
    """One captured update, or why there is none.

    Attributes
    ----------
    name : str
        ``"round-0001/client-000000"``.
    server_round : int
    nodes : tuple of int
        Empty where the record cannot be read.
    images : int
        Images behind it, as far as that is known; else 1.
    observation : Observation or None
    reason : str
        Why there is no observation; empty otherwise.
    damaged : bool
        Whether a file is missing or damaged: another copy may be whole.
    """

    name: str
    server_round: int
    nodes: tuple[int, ...]
    images: int
    observation: Observation | None
    reason: str = ""
    damaged: bool = False


class Capture:
    """A folder that :class:`CaptureWriter` made.

    Parameters
    ----------
    folder : path
    model : str, optional
        How to make the model here: a registered name, ``FILE.py:FACTORY`` or
        ``module:FACTORY``. Not needed where the manifest has a registered name; nothing else
        that it says is run.

    Raises
    ------
    InvalidInputError
        If the folder is no capture, is of another version, or the model cannot be made here
        or is not the one of the capture; the message says what to pass.
    """

    def __init__(self, folder: Path | str, model: str | None = None):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.digest = sha256(read_bytes(self.folder / MANIFEST, TEXT))
        # Of 64-bit numbers, the names, and as much again: a client may have sent more.
        self._most = min(tensors(), 16 * self.manifest.model.entries + _NAMES)
        self.spec = self._spec(model)
        # What was sent in the round that is being read, and the models that hold it.
        self._sent: dict[tuple[int, str, str], dict[str, Tensor]] = {}
        self._models: dict[tuple[int, str, str], nn.Module] = {}
        self._check_model()

    def names(self) -> list[str]:
        """Return the names of all updates, in the order of rounds and clients."""
        found = set()
        for folder in self.folder.iterdir():
            if _ROUND.fullmatch(folder.name) and folder.is_dir():
                for file in folder.iterdir():
                    if match := _UPDATE.fullmatch(file.name):
                        found.add((round_of(folder.name), int(match[1][7:]), match[1], folder.name))
        return [f"{folder}/{stem}" for *_, stem, folder in sorted(found)]

    def read(self, name: str) -> Captured:
        """Return one update; never raise for what is wrong with it."""
        number, record = round_of(name), None

        def lost(reason: object, damaged: bool = False) -> Captured:
            nodes, images = (record.nodes, record.images) if record else ((), 1)
            why = clean_reason(reason)
            return Captured(name, number, nodes, images, None, why, damaged=damaged)

        try:
            record = self.record(name)
            if record.reason:
                return lost(record.reason)
            update = self._update(name, record)
        except FedleakError as error:
            return lost(error, damaged=True)
        try:
            seen = update.observe(self._model(record, update.sent))
        except FedleakError as error:
            return lost(error)
        except Exception as error:  # a client may have sent anything
            return lost(f"the update cannot be read: {type(error).__name__}: {error}")
        return Captured(name, number, record.nodes, record.images, seen)

    def record(self, name: str) -> Record:
        """Return what belongs to one update, without its tensors.

        Raises
        ------
        InvalidUpdateError
            If it is missing or damaged.
        """
        record = read_record(self.folder / f"{name}.json")
        if record.round != round_of(name):
            raise InvalidUpdateError(f"{name}.json is damaged: it says round {record.round}")
        return record

    def update(self, name: str) -> Update:
        """Return one update with its tensors, as it was received.

        Raises
        ------
        InvalidUpdateError
            If a file is missing or damaged, or the client sent nothing.
        """
        return self._update(name, self.record(name))

    def fresh_models(self) -> None:
        """Read and make the models anew from now on: an attack may have changed them."""
        self._models, self._sent = {}, {}

    def _update(self, name: str, record: Record) -> Update:
        if record.reason or record.tensors is None or record.sent is None:
            raise InvalidUpdateError(record.reason or f"{name}.json names no tensors")
        folder = self.folder / Path(name).parent
        key = _key(record)
        if key not in self._sent:
            if any(known[0] != record.round for known in self._sent):
                self.fresh_models()
            self._sent[key] = _read_tensors(folder / record.sent, record.sent_sha256, self._most)
        received = _read_tensors(folder / record.tensors, record.tensors_sha256, self._most)
        update = record.update(self._sent[key], received, self.manifest.model.input_shape)
        return replace(update, place=0 if update.summed else place_of(name))

    def _model(self, record: Record, sent: dict[str, Tensor]) -> nn.Module:
        # One object for one set of weights: what is attacked together shares it.
        key = _key(record)
        if key not in self._models:
            self._models[key] = load_sent(self._build(), sent)
        return self._models[key]

    def _build(self) -> nn.Module:
        """Return the model in the state that it had, apart from the weights."""
        card = self.manifest.model
        # 10 is a guess; where it is wrong, the shapes tell.
        model = unwrapped(build_model(self.spec, card.input_shape, card.classes or 10, seed=0))
        model.to(getattr(torch, card.dtype))
        evaluating, frozen = set(card.evaluating), set(card.frozen)
        for name, module in model.named_modules():
            module.training = name not in evaluating
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return model

    def _spec(self, given: str | None) -> str:
        """Return how the model is made. A capture is data: it names no code, only known models."""
        if given is not None:
            return given
        named, wanted = self.manifest.model.spec, "--model NAME, FILE.py:FACTORY or module:FACTORY"
        if named in MODELS:
            return str(named)
        said = "does not say how its model is made" if named is None else f"is of model {named!r}"
        raise InvalidInputError(
            f"capture {str(self.folder)!r} {said}, which is no name of a model here (fedleak list "
            f"models), and a capture never chooses code that runs; pass {wanted}, of code that you "
            "trust"
        )

    def _check_model(self) -> None:
        hint = (
            "pass the model of the capture with --model NAME, FILE.py:FACTORY or module:FACTORY "
            f"(it was {self.manifest.model.spec!r} where the capture was made)"
        )
        if ":" not in self.spec and self.spec not in MODELS:
            raise InvalidInputError(f"model {self.spec!r} is not known here; {hint}")
        try:
            with torch.device("meta"):  # shapes alone: what is wrong or too large is not allocated
                self._compare(self._build(), hint)
        except FedleakError:
            raise
        except Exception:  # some models cannot be made without numbers
            self._compare(self._build(), hint)

    def _compare(self, model: nn.Module, hint: str) -> None:
        card = self.manifest.model
        found = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        if found != card.state:
            raise InvalidInputError(
                f"model {self.spec!r} is not the one that was captured: "
                f"{_first_difference(found, card)}; {hint}"
            )


def read_captures(folder: Path | str, model: str | None = None) -> Iterator[Captured]:
    """Yield every captured update, read when it is asked for.

    Parameters
    ----------
    folder, model
        As for :class:`Capture`.

    Yields
    ------
    Captured
        In the order of rounds and clients. Observations of one set of weights share their
        model. What cannot be read has a reason instead of an observation.

    Raises
    ------
    InvalidInputError
        As :class:`Capture`.
    """
    capture = Capture(folder, model)
    return (capture.read(name) for name in capture.names())


def round_of(name: str) -> int:
    """Return the round of ``"round-0001/client-000000"``."""
    return int(name.partition("/")[0][6:])


def place_of(name: str) -> int:
    """Return the place of ``"round-0001/client-000000"`` in its round."""
    return int(name.partition("/client-")[2])


def _key(record: Record) -> tuple[int, str, str]:
    return record.round, record.sent or "", record.sent_sha256 or ""


def _read_tensors(path: Path, digest: str | None, most: int) -> dict[str, Tensor]:
    try:
        content = read_bytes(path, most)
    except FileNotFoundError as error:
        raise InvalidUpdateError(f"{path.name} is missing") from error
    except OSError as error:
        raise InvalidUpdateError(f"{path.name} cannot be read: {error}") from error
    if sha256(content) != digest:
        raise InvalidUpdateError(
            f"{path.name} is damaged: its checksum differs from the record's; copy it again"
        )
    try:
        return load(content)
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise InvalidUpdateError(f"{path.name} is damaged: {error}") from error


def _first_difference(found: dict[str, tuple[int, ...]], card: ModelCard) -> str:
    for name, shape in card.state.items():
        if name not in found:
            return f"it has no {name!r}"
        if found[name] != shape:
            return f"its {name!r} has shape {found[name]}, in the capture {shape}"
    extra = next(n for n in found if n not in card.state)
    return f"its {extra!r} is not in the capture"
