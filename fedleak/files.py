"""Files: strangers' are read within bounds; ours are written whole, and for their owner alone.

A file may be anything: a pipe that never ends, a link to a device, gigabytes of zeros that take
no room on the disk. Everything that is not fedleak's own is read here.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedleak.errors import InvalidInputError

#: Raises the limit on tensors, in GiB.
ENVIRONMENT = "FEDLEAK_MAX_GIB"
#: Bytes of a file of settings (JSON, TOML), of a table, and of an image; how deep JSON is nested.
TEXT, TABLE, IMAGE = 16 << 20, 256 << 20, 256 << 20
_DEEP = 64


def tensors() -> int:
    """Return how many bytes a file of tensors, or a model, may have: 4 GiB by default.

    Raises
    ------
    InvalidInputError
        If ``FEDLEAK_MAX_GIB`` is no number of GiB.
    """
    given = os.environ.get(ENVIRONMENT, "4")
    try:
        found = float(given) * (1 << 30)
        if not 0 < found < 1 << 60:
            raise ValueError
    except ValueError:
        raise InvalidInputError(f"{ENVIRONMENT} must be a number of GiB, not {given!r}") from None
    return int(found)


def size_words(size: int) -> str:
    """Return a number of bytes as people write it."""
    for step, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= step:
            return f"{size / step:.3g} {unit}"
    return f"{size} bytes"


def read_bytes(path: Path, most: int) -> bytes:
    """Read a regular file of at most ``most`` bytes.

    Raises
    ------
    OSError
        If it is missing, is no regular file (a pipe, a device, or a link to one), or larger.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: a device may act on that
        raise OSError(f"{path.name} is not a regular file")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError(f"{path.name} is not a regular file")
        if about.st_size > most:
            raise OSError(
                f"{path.name} has {size_words(about.st_size)}, more than the "
                f"{size_words(most)} that are read"
            )
        return file.read(about.st_size)


def read_text(path: Path, most: int = TEXT) -> str:
    """Read UTF-8 text.

    Raises
    ------
    OSError, ValueError
        As :func:`read_bytes`; and if it is no UTF-8.
    """
    return read_bytes(path, most).decode("utf-8")


def read_json(path: Path, most: int = TEXT) -> Any:
    """Read JSON.

    Raises
    ------
    OSError, ValueError
        As :func:`read_bytes`; and if it is no JSON, or nested too deep.
    """
    try:
        found = json.loads(read_text(path, most))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [found]
    for _ in range(_DEEP):
        tables = [x for x in level if isinstance(x, dict)]
        lists = [x for x in level if isinstance(x, list)]
        level = [v for x in tables for v in x.values()] + [v for x in lists for v in x]
        if not level:
            return found
    raise ValueError("it is nested too deep")


def to_json(values: Mapping[str, Any]) -> bytes:
    """Return readable JSON."""
    return (json.dumps(values, indent=1) + "\n").encode()


def write_atomically(path: Path, content: bytes, durable: bool = False) -> None:
    """Write beside and move, so that a kill leaves a whole file or none.

    Only the owner can read it. A link of that name is replaced, never followed. With ``durable``
    it is on the disk when this returns, so that a power cut leaves it, too.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    make_private(path.parent)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
    fresh.unlink(missing_ok=True)  # of a process that was killed; or a link
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
            file.write(content)
        if durable:
            flush(fresh)
        fresh.replace(path)
        if durable:
            flush(path.parent)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def private(path: str, flags: int) -> int:
    """Open a file for the owner alone, and through no link: an ``opener`` of :func:`open`."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)


def flush(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # not every file system does so for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as a compressed ``.npz``, as :func:`write_atomically` writes."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    write_atomically(path, stream.getvalue())


def make_private(folder: Path) -> Path:
    """Make a folder, and those above it, that only its owner can enter; what is there stays.

    Raises
    ------
    OSError
        If it cannot be made.
    """
    for path in reversed((folder, *folder.parents)):
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(exist_ok=True)  # says so where it is a file
    return folder


def refuse_links(folder: Path, below: Path | None = None) -> None:
    """Refuse to write into a folder through a link: it may lead anywhere.

    Parameters
    ----------
    folder : Path
        Where something is to be written. Whether there are links anywhere in it is checked,
        if it exists.
    below : Path, optional
        A folder above it that was given by the user; what lies between is checked as well.

    Raises
    ------
    InvalidInputError
        The link is named.
    """
    between = [] if below is None else [p for p in folder.parents if p.is_relative_to(below)]
    above = [p for p in (folder, *between) if p != below and below is not None and p.is_symlink()]
    found = above[0] if above else _first_link(folder)
    if found is not None:
        raise InvalidInputError(
            f"{str(found)!r} is a link, and nothing is written into a folder with links in it: "
            "they may lead anywhere. Remove it, or use another --out"
        )


def _first_link(folder: Path) -> Path | None:
    for where, folders, files in os.walk(folder):  # does not follow links
        for name in (*folders, *files):
            path = Path(where) / name
            if path.is_symlink():
                return path
    return None
