"""One command at a time in an output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedleak.errors import InvalidInputError
from fedleak.files import make_private, refuse_links

#: In the folder that it guards. It is given back with the process, however that ends.
LOCK = ".lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make a folder where there is none, and keep every other command out of it.

    Raises
    ------
    InvalidInputError
        If another command works there, there are links in it, or it cannot be used.
    """
    try:
        make_private(folder)
        refuse_links(folder)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise InvalidInputError(
            f"another command is at work in {str(folder)!r}: wait for it, or use another --out"
        ) from None
    except OSError as error:
        raise InvalidInputError(f"--out {str(folder)!r} cannot be used: {error}") from error
    try:
        yield
    finally:
        lock.release()


def is_empty(folder: Path) -> bool:
    """Return whether a folder holds nothing but a lock, or does not exist."""
    return not folder.exists() or all(p.name == LOCK for p in folder.iterdir())
