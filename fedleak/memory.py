"""A limit on the memory that an attack may take: an error of its own, and not of the process.

A process that takes all memory is killed, and a federation with it. Below that an allocation
fails, which torch and numpy report as an error that can be survived.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

#: Part of the memory that is free when an attack begins, which it may take by default.
SHARE = 0.8
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


@contextmanager
def limit(gib: float = 0.0) -> Iterator[None]:
    """Let allocations in this block fail beyond ``gib`` (0: most of what is free) more memory.

    It is a limit of the process (``RLIMIT_DATA``), so that other threads meet it, too. There is
    none where the system has no such limit or does not know what is free, and with CUDA in use,
    which maps far more than it takes.
    """
    more = gib * _GIB if gib else SHARE * free()
    if resource is None or more == float("inf") or torch.cuda.is_initialized():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(_taken() + more)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        yield
        return
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    except (OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _taken() -> int:
    """Return what of ``RLIMIT_DATA`` is in use, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def exhausted(error: BaseException) -> bool:
    """Return whether an error says that there was not enough memory."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and "memory" in words and "alloc" in words
