"""Write a capture while the federation runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from fedleak.capture.manifest import (
    MANIFEST,
    Manifest,
    Record,
    describe_model,
    sha256,
    spec_of,
)
from fedleak.capture.update import Update
from fedleak.errors import InvalidInputError
from fedleak.files import flush, to_json, write_atomically
from fedleak.provenance import now, package_versions
from fedleak.wording import clean_reason

_log = logging.getLogger(__name__)


class CaptureWriter:
    """A folder of updates; each is on disk, whole, before :meth:`add` returns.

    ::

        captures/
          manifest.json                     the model, versions
          round-0001/
            model.safetensors               the weights that were sent, once
            client-000000.safetensors       what came back, exactly
            client-000000.json              round, node, images, threat model, checksums

    Parameters
    ----------
    folder : path
        New or empty: a capture is never mixed with another.
    model : nn.Module or callable
        The architecture, or what makes it.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    spec : str, optional
        By which name the model can be made elsewhere: a registered one, ``FILE.py:FACTORY``
        or ``module:FACTORY``. Found from ``model`` where it can be.
    classes : int, optional
        Number of logits; found from ``model`` where it can be.
    simulated : bool
        Whether the clients are simulated.

    Raises
    ------
    InvalidInputError
        If the folder is not empty or cannot be written.
    """

    def __init__(
        self,
        folder: Path | str,
        model: nn.Module | Callable[[], nn.Module],
        input_shape: tuple[int, int, int],
        spec: str | None = None,
        classes: int | None = None,
        simulated: bool = False,
    ):
        self.folder = Path(folder).absolute()
        made = model if isinstance(model, nn.Module) else model()
        channels, height, width = input_shape
        name = spec or spec_of(model, (channels, height, width))
        if name is None:
            _log.warning("the captured model has no name to make it by; attack with --model")
        card = describe_model(made, (channels, height, width), name, classes)
        manifest = Manifest(
            created=now(),
            simulated=simulated,
            model=card,
            versions=package_versions(),
        )
        try:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise InvalidInputError(
                    f"capture folder {str(folder)!r} is not empty; name a new one, or remove it"
                )
            write_atomically(self.folder / MANIFEST, to_json(manifest.model_dump(mode="json")))
        except OSError as error:
            raise InvalidInputError(
                f"capture folder {str(folder)!r} cannot be used: {error}"
            ) from error
        self._counts: dict[int, int] = {}
        self._settled: set[int] = set()
        # What was sent in this round, by identity: clients mostly share it. The dictionary is
        # kept, so that no other can take its identity.
        self._sent: dict[int, tuple[dict[str, Tensor], str, str]] = {}

    def add(self, update: Update) -> str:
        """Write one update; return its name, ``"round-0001/client-000000"``.

        Raises
        ------
        OSError, ValueError
            If the disk is full, or a tensor of a type that safetensors does not know.
        """
        content = _packed(update.received)
        name = self._next(update.server_round)
        model, model_sum = self._write_sent(update.server_round, update.sent)
        file = self.folder / f"{name}.safetensors"
        write_atomically(file, content)
        record = Record.of_update(
            update, tensors=file.name, tensors_sha256=sha256(content), sent=model,
            sent_sha256=model_sum,
        )  # fmt: skip
        self._write(name, record)
        return name

    def add_failure(self, server_round: int, nodes: tuple[int, ...], reason: str) -> str:
        """Note that nothing usable came from a client; return the name of the note."""
        name = self._next(server_round)
        self._write(name, Record(round=server_round, nodes=nodes, reason=clean_reason(reason)))
        return name

    def _next(self, server_round: int) -> str:
        if server_round not in self._counts:
            self._settle()
            self._sent = {}
        count = self._counts.get(server_round, 0)
        self._counts[server_round] = count + 1
        return f"round-{server_round:04d}/client-{count:06d}"

    def _settle(self) -> None:
        """Have what earlier rounds wrote on the disk: a power cut costs the one in hand."""
        for number in set(self._counts) - self._settled:
            folder = self.folder / f"round-{number:04d}"
            for path in (*folder.iterdir(), folder):
                flush(path)
            self._settled.add(number)

    def _write(self, name: str, record: Record) -> None:
        # Last: what has no record is not there.
        write_atomically(self.folder / f"{name}.json", to_json(record.model_dump(mode="json")))

    def _write_sent(self, server_round: int, sent: dict[str, Tensor]) -> tuple[str, str]:
        if id(sent) not in self._sent:
            content = _packed(sent)
            digest = sha256(content)
            known = {d: f for _, f, d in self._sent.values()}
            if digest in known:
                file = known[digest]
            else:
                file = f"model-{len(known)}.safetensors" if known else "model.safetensors"
                write_atomically(self.folder / f"round-{server_round:04d}" / file, content)
            self._sent[id(sent)] = (sent, file, digest)
        _, file, digest = self._sent[id(sent)]
        return file, digest


def _packed(tensors: dict[str, Tensor]) -> bytes:
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    return save({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()})
