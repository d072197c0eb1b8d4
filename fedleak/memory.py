"""A limit on the memory that an attack may take: an error of its own, and not of the process.

A process that takes all memory is killed, and a federation with it. Below that the system can
refuse memory, which torch and numpy report as an error when it is about a tensor. Where it is
about a few bytes, the interpreter and torch's own code may not survive it. So loops ask first
(:func:`check`), and the system refuses only :data:`RESERVE` later, which one large tensor meets.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

#: Part of the memory that is free when an attack begins, which it may take by default.
SHARE = 0.8
#: What the system gives beyond the limit before it refuses: room for small things, in GiB.
RESERVE = 0.25
#: Of each thread that may still begin: twice its stack where nothing else is said.
_THREAD = 2**24
_GIB = 2**30
#: Where a control group says how much it may use, and uses.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free() -> float:
    """Return the bytes that this process could still take; infinity where nobody says."""
    found = [float("inf")]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")]
    except (OSError, ValueError):
        pass
    for most, used in _GROUPS:
        try:
            found.append(int(Path(most).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # "max": no limit
            continue
    return max(min(found), 0.0)


@dataclass(frozen=True)
class _Limit:
    """The bytes in use from which on it is too much, and the GiB of them that were allowed."""

    most: float
    gib: float


_CURRENT: ContextVar[_Limit | None] = ContextVar("memory", default=None)


@contextmanager
def limit(gib: float = 0.0) -> Iterator[None]:
    """Let work in this block fail beyond ``gib`` (0: most of what is free) more memory.

    What asks (:func:`check`) fails there; an allocation :data:`RESERVE` later, by a limit of the
    process (``RLIMIT_DATA``), so that other threads meet it, too. There is none where the system
    has no such limit or does not know what is free, and with CUDA in use, which maps far more
    than it takes.
    """
    import torch  # here: loops of commands that need no torch ask, too

    more = gib * _GIB if gib else SHARE * free()
    if resource is None or more == float("inf") or torch.cuda.is_initialized():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held, mapped = _used()
    wanted = int(mapped + more + RESERVE * _GIB + _THREAD * torch.get_num_threads())
    if soft != resource.RLIM_INFINITY:
        wanted = min(wanted, soft)
    token = _CURRENT.set(_Limit(held + more, more / _GIB))
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        _CURRENT.reset(token)


def check() -> None:
    """Go on, or raise: for loops, before the next step.

    Raises
    ------
    MemoryError
        If more is in use than the limit that is in force allows.
    """
    current = _CURRENT.get()
    if current is not None and _used()[0] > current.most:
        raise MemoryError(f"more than the {current.gib:.3g} GiB allowed")


def _used() -> tuple[int, int]:
    """Return the bytes held, without files, and those that ``RLIMIT_DATA`` counts.

    0 where nobody says. Of a thread's stack the first counts what was touched, the second all.
    """
    try:
        pages = [int(n) for n in Path("/proc/self/statm").read_text().split()]
        size = resource.getpagesize()
        return (pages[1] - pages[2]) * size, pages[5] * size
    except (OSError, ValueError, IndexError):
        return 0, 0


def exhausted(error: BaseException | None) -> bool:
    """Return whether an error, or what it came from, says that there was not enough memory."""
    while error is not None:
        words = str(error).lower()
        if isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and "memory" in words and "alloc" in words:
            return True  # torch's, also those of a device
        error = error.__cause__
    return False
