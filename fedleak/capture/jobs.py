"""Attack chunks of a capture: here, in several processes, or on Ray; the same everywhere."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fedleak.attacks import Attack, make_attack, run_attack
from fedleak.capture.reader import Capture, Captured
from fedleak.errors import InvalidInputError
from fedleak.observation import Observation

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
    """

    capture: str
    model: str
    attack: str
    options: dict[str, Any] = field(hash=False)
    device: str
    threads: int

    def make(self) -> Attack:
        """Make the attack."""
        return make_attack(self.attack, device=self.device, **self.options)


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
    """

    name: str
    images: np.ndarray | None = None
    labels: tuple[int, ...] = ()
    fit: float | None = None
    seconds: float = 0.0
    reason: str = ""
    retry: Retry = ""


@lru_cache(maxsize=1)
def _opened(work: Work) -> tuple[Capture, Attack]:
    return Capture(work.capture, work.model), work.make()


def attack_chunk(work: Work, chunk: Chunk) -> list[Result]:
    """Attack one chunk; what is damaged in it costs only itself.

    The result is that of the chunk alone, whatever the process did before.
    """
    capture, attack = _opened(work)
    capture.fresh_models()
    with _alone(work.threads, chunk.digest):
        read = [capture.read(name) for name in chunk.names]
        results = {c.name: _unread(c) for c in read if c.observation is None}
        groups: dict[nn.Module, list[tuple[str, Observation]]] = {}
        for c in read:
            if c.observation is not None:
                groups.setdefault(c.observation.model, []).append((c.name, c.observation))
        for group in groups.values():
            outcomes = run_attack(attack, [o for _, o in group])
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
                )
    return [results[name] for name in chunk.names]


def _unread(captured: Captured) -> Result:
    retry: Retry = "damaged" if captured.damaged else ""
    return Result(captured.name, reason=captured.reason, retry=retry)


@contextmanager
def _alone(threads: int, digest: str) -> Iterator[None]:
    """Fix the number of threads and the random generators; leave them as they were."""
    before, python, numpy_state = torch.get_num_threads(), random.getstate(), np.random.get_state()
    seed = zlib.crc32(digest.encode())
    torch.set_num_threads(threads)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(before)
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
    waiting = deque(chunks)
    workers = [_Worker(work) for _ in range(min(jobs, len(chunks)))]
    try:
        for worker in workers:
            worker.give(waiting.popleft())
        while busy := [w for w in workers if w.chunk is not None]:
            ready = wait([w.pipe for w in busy])
            for worker in [w for w in busy if w.pipe in ready]:
                chunk = worker.chunk
                assert chunk is not None
                results = worker.take()
                if waiting:
                    worker.give(waiting.popleft())
                yield chunk, results
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that attacks one chunk at a time.

    A pool of the standard library would not say which chunk a process had when it ended.
    """

    def __init__(self, work: Work):
        self.work, self.chunk = work, None
        self._start()

    def _start(self) -> None:
        # A fork of a process that has used torch's threads or a GPU would hang.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.work), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    chunk: Chunk | None

    def give(self, chunk: Chunk) -> None:
        if not self.process.is_alive():
            self.end()
            self._start()
        self.chunk = chunk
        self.pipe.send(chunk)

    def take(self) -> list[Result]:
        chunk, self.chunk = self.chunk, None
        assert chunk is not None
        try:
            found: list[Result] | str = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            found = _how_it_ended(self.process.exitcode)
        return crashed(chunk, found) if isinstance(found, str) else found

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, work: Work) -> None:
    """Answer chunks until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    while True:
        try:
            chunk = pipe.recv()
            try:
                answer: list[Result] | str = attack_chunk(work, chunk)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            pipe.send(answer)
        except (EOFError, OSError):
            return


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"the worker process was ended by {name}" + (
            "; out of memory? use fewer --jobs" if name == "SIGKILL" else ""
        )
    return f"the worker process ended with exit code {code}"


def crashed(chunk: Chunk, reason: str) -> list[Result]:
    """Return the results of a chunk whose worker ended."""
    return [Result(name, reason=reason, retry="crashed") for name in chunk.names]


def run_ray(work: Work, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[Result]]]:
    """Attack on Ray: on the cluster at ``RAY_ADDRESS``, or on this machine.

    Every node must see the capture under the same path.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise InvalidInputError(
            f"engine 'ray' needs Ray ({error}); install it, or use --jobs N"
        ) from error
    ours = not ray.is_initialized()
    if ours:
        local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level="error", **local)
        except Exception as error:
            raise InvalidInputError(f"Ray cannot be started: {error}; use --jobs N") from error
    gpus = 1 if work.device.startswith("cuda") else 0
    remote = ray.remote(num_cpus=work.threads, num_gpus=gpus, max_retries=0)(attack_chunk)
    try:
        asked = {remote.remote(work, chunk): chunk for chunk in chunks}
        while asked:
            (done,), _ = ray.wait(list(asked), num_returns=1)
            chunk = asked.pop(done)
            try:
                results = ray.get(done)
            except Exception as error:  # the worker ended, or raised
                reason = f"the worker on Ray failed: {type(error).__name__}: {error}"
                results = crashed(chunk, " ".join(reason.split())[:500])
            yield chunk, results
    finally:
        if ours:
            ray.shutdown()
