"""Attack chunks of a capture: here, in several processes, or on Ray; the same everywhere."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fedleak import workers
from fedleak.attacks import Attack, Reconstruction, attack_for, run_attack
from fedleak.capture.reader import Capture, Captured
from fedleak.observation import Observation
from fedleak.status import Status, notes_text, status_of
from fedleak.threads import threads

#: Why a failure may be gone the next time: a file was damaged, or the worker ended.
Retry = Literal["", "damaged", "crashed"]


@dataclass(frozen=True)
class Work:
    """What a worker needs to attack any chunk; it reads the capture itself.

    Attributes
    ----------
    capture : str
        Folder, as the worker sees it.
    model : str
        How the model is made.
    attack : str
    options : dict
    device : str
    threads : int
        CPU threads of one worker. A sum in several threads rounds differently, so that one
        number everywhere makes one table everywhere.
    seconds : float
        Allowed for each update; 0: no limit.
    """

    capture: str
    model: str
    attack: str
    options: dict[str, Any] = field(hash=False)
    device: str
    threads: int
    seconds: float = 0.0

    def make(self) -> Attack:
        """Make the attack."""
        return attack_for(self.attack, self.options, self.device)


@dataclass(frozen=True)
class Chunk:
    """Updates that are attacked together, and a checksum of their records."""

    names: tuple[str, ...]
    digest: str


@dataclass(frozen=True, eq=False)
class Result:
    """What came of one update; plain types, to travel between processes.

    Attributes
    ----------
    name : str
        That of the update.
    images : ndarray, float64, shape (B, C, H, W), or None
    labels : tuple of int
    fit : float or None
    seconds : float
        Of the attack, shared evenly by what was attacked together.
    reason : str
        Why there are no images; empty otherwise.
    retry : {"", "damaged", "crashed"}
    doubtful : bool
        Whether the update is not what was declared; ``reason`` says what shows it.
    certified : tuple of bool
        Of each image, whether the attack's own test proved it; empty where it has none.
    notes : str
        What is not as declared, and was taken into account.
    details : dict
        What a dossier of several rounds asks of the attack's details.
    """

    name: str
    images: np.ndarray | None = None
    labels: tuple[int, ...] = ()
    fit: float | None = None
    seconds: float = 0.0
    reason: str = ""
    retry: Retry = ""
    doubtful: bool = False
    certified: tuple[bool, ...] = ()
    notes: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        return status_of(self.images is not None, self.doubtful)


@lru_cache(maxsize=1)
def _opened(work: Work) -> tuple[Capture, Attack]:
    return Capture(work.capture, work.model), work.make()


def attack_chunk(work: Work, chunk: Chunk) -> list[Result]:
    """Attack one chunk; what is damaged in it costs only itself.

    The result is that of the chunk alone, whatever the process did before.
    """
    capture, attack = _opened(work)
    capture.fresh_models()
    with _alone(work.threads, chunk):
        read = [capture.read(name) for name in chunk.names]
        results = {c.name: _unread(c) for c in read if c.observation is None}
        groups: dict[nn.Module, list[tuple[str, Observation]]] = {}
        for c in read:
            if c.observation is not None:
                groups.setdefault(c.observation.model, []).append((c.name, c.observation))
        for group in groups.values():
            outcomes = run_attack(attack, [o for _, o in group], work.seconds)
            for (name, _), outcome in zip(group, outcomes, strict=True):
                made = outcome.reconstruction
                if made is None:
                    results[name] = Result(name, seconds=outcome.seconds, reason=outcome.reason)
                    continue
                results[name] = Result(
                    name,
                    made.images.detach().cpu().double().numpy(),
                    tuple(int(y) for y in made.labels),
                    float(made.fit),
                    outcome.seconds,
                    outcome.reason,
                    doubtful=made.status == "doubtful",
                    certified=made.certified,
                    notes=notes_text(made.notes),
                    details=_asked(made),
                )
    return [results[name] for name in chunk.names]


def _asked(made: Reconstruction) -> dict[str, Any]:
    """Return of an attack's details what a dossier asks: noise, ranks, whom to trust."""
    told: dict[str, Any] = {
        k: made.details[k] for k in ("by", "noise", "certified") if k in made.details
    }
    layers = made.details.get("layers") or ()
    told["layers"] = [{k: s[k] for k in ("rank", "unknowns")} for s in layers if "rank" in s]
    head = made.details.get("head") or {}
    return told | ({"head": {"trusted": head["trusted"]}} if "trusted" in head else {})


def _unread(captured: Captured) -> Result:
    retry: Retry = "damaged" if captured.damaged else ""
    return Result(captured.name, reason=captured.reason, retry=retry)


@contextmanager
def _alone(count: int, chunk: Chunk) -> Iterator[None]:
    """Fix the number of threads and the random generators; leave them as they were.

    The seed is of the names: what clients sent rounds otherwise on another machine.
    """
    python, numpy_state = random.getstate(), np.random.get_state()
    seed = zlib.crc32(" ".join(chunk.names).encode())
    with threads(count), torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


def run_inline(work: Work, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[Result]]]:
    """Attack chunk after chunk in this process."""
    for chunk in chunks:
        yield chunk, attack_chunk(work, chunk)


def run_processes(
    work: Work, chunks: Sequence[Chunk], jobs: int
) -> Iterator[tuple[Chunk, list[Result]]]:
    """Attack in ``jobs`` processes; one that ends costs the chunk it had, and is replaced."""
    for chunk, found in workers.run_processes(partial(attack_chunk, work), chunks, jobs):
        yield chunk, _or_crashed(chunk, found)


def run_ray(work: Work, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[Result]]]:
    """Attack on Ray: on the cluster at ``RAY_ADDRESS``, or on this machine.

    Every node must see the capture under the same path.
    """
    gpus = 1 if work.device.startswith("cuda") else 0
    for chunk, found in workers.run_ray(partial(attack_chunk, work), chunks, work.threads, gpus):
        yield chunk, _or_crashed(chunk, found)


def _or_crashed(chunk: Chunk, found: list[Result] | workers.Crash) -> list[Result]:
    if isinstance(found, workers.Crash):
        return [Result(name, reason=found.reason, retry="crashed") for name in chunk.names]
    return found
