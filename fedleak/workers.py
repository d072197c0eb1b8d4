"""Spread items of work over processes or Ray; a worker that ends costs only what it had."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Literal, TypeVar

from fedleak.errors import InvalidInputError, UnknownNameError

#: ``local`` is this process, or several of this machine.
JobEngine = Literal["local", "ray"]
JOB_ENGINES = ("local", "ray")
#: ``on_progress(finished, all)``, in items; first with those that were done already.
OnProgress = Callable[[int, int], None]
#: Seconds that an idle process has to end by itself.
_GOODBYE = 10.0

Item = TypeVar("Item")
Result = TypeVar("Result")


def check_engine(engine: str, jobs: int) -> None:
    """Refuse an engine that does not exist, and jobs that make no sense with it.

    Raises
    ------
    InvalidInputError
    """
    if jobs < 1:
        raise InvalidInputError(f"jobs must be at least 1, not {jobs}")
    if engine not in JOB_ENGINES:
        raise UnknownNameError("engine", engine, JOB_ENGINES)
    if engine == "ray" and jobs > 1:
        raise InvalidInputError("jobs are processes here; with engine 'ray', Ray decides")


@dataclass(frozen=True)
class Crash:
    """What is known of an item whose worker ended, or raised."""

    reason: str


@dataclass(frozen=True)
class Told:
    """What a worker tells before its result: see :func:`tell`."""

    content: Any


def tell(content: Any) -> None:
    """Tell whoever asked for this work something meanwhile; nobody where it is no worker's."""
    if _ASKED_BY:
        _ASKED_BY[-1].send(Told(content))


#: In a worker, the pipe to who asked.
_ASKED_BY: list[Connection] = []


def run_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    jobs: int,
    on_told: Callable[[Item, Any], None] | None = None,
) -> Iterator[tuple[Item, Result | Crash]]:
    """Call ``function`` in ``jobs`` processes; yield each result as it comes.

    A process that ends is replaced. All end with the one that asked, however that ends.

    Parameters
    ----------
    function : callable
        One that can be pickled, as ``functools.partial`` of a module's function.
    items : sequence
        Each is given to one process.
    jobs : int
    on_told : callable, optional
        ``(item, content)`` of what a process tells meanwhile.
    """
    waiting = deque(items)
    workers = [Worker(function) for _ in range(min(jobs, len(items)))]
    try:
        for worker in workers:
            worker.give(waiting.popleft())
        while busy := [w for w in workers if w.busy]:
            ready = wait([w.pipe for w in busy])
            for worker in [w for w in busy if w.pipe in ready]:
                item = worker.item
                found = worker.take()
                if isinstance(found, Told):
                    if on_told is not None:
                        on_told(item, found.content)
                    continue
                if waiting:
                    worker.give(waiting.popleft())
                yield item, found
    finally:
        for worker in workers:
            worker.end()


class Worker(Generic[Item, Result]):
    """A process that works on one item at a time, and ends with the one that started it.

    A pool of the standard library would not say which item a process had when it ended.
    """

    item: Item

    def __init__(self, function: Callable[[Item], Result]):
        self.function, self.busy = function, False
        self._start()

    def _start(self) -> None:
        # A fork of a process that has used torch's threads or a GPU would hang.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.function), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def give(self, item: Item) -> None:
        if not self.process.is_alive():
            self.end()
            self._start()
        self.item, self.busy = item, True
        self.pipe.send(item)

    def take(self) -> Result | Crash:
        """Return the result, or what is told before it (:class:`Told`) of work that tells."""
        try:
            found = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            found = Crash(_how_it_ended(self.process.exitcode))
        self.busy = isinstance(found, Told)
        return found

    def end(self) -> None:
        self.pipe.close()
        if not self.busy:  # then the end of the pipe ends it, and it tidies up
            self.process.join(_GOODBYE)
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """Answer items until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _ASKED_BY.append(pipe)
    while True:
        try:
            item = pipe.recv()
            try:
                answer = function(item)
            except Exception as error:
                answer = Crash(f"{type(error).__name__}: {error}")
            pipe.send(answer)
        except (EOFError, OSError):
            return


def _end_with_parent() -> None:
    """End at once where the process that asked was killed: nobody waits for the answer."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"the worker process was ended by {name}" + (
            "; out of memory? use fewer --jobs" if name == "SIGKILL" else ""
        )
    return f"the worker process ended with exit code {code}"


def _call(function: Callable[[Any], Any], item: Any, folder: str) -> Any:
    if os.path.isdir(folder):  # a worker on another node was not started here
        os.chdir(folder)
    return function(item)


def run_ray(
    function: Callable[[Item], Result], items: Sequence[Item], cpus: int = 1, gpus: int = 0
) -> Iterator[tuple[Item, Result | Crash]]:
    """Call ``function`` on Ray: on the cluster at ``RAY_ADDRESS``, or on this machine.

    Every node must see files under the same paths; relative ones are taken from here.

    Parameters
    ----------
    function, items
        As for :func:`run_processes`.
    cpus, gpus : int
        Of each task.

    Raises
    ------
    InvalidInputError
        If Ray is missing or cannot be started.
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
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_call)
    try:
        asked = {remote.remote(function, item, os.getcwd()): item for item in items}
        while asked:
            (done,), _ = ray.wait(list(asked), num_returns=1)
            item = asked.pop(done)
            try:
                found: Result | Crash = ray.get(done)
            except Exception as error:  # the worker ended, or raised
                reason = f"the worker on Ray failed: {type(error).__name__}: {error}"
                found = Crash(" ".join(reason.split())[:500])
            yield item, found
    finally:
        if ours:
            ray.shutdown()
