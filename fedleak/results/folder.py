"""An output folder that can be gone on with: what it holds, and what that was made with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedleak.errors import InvalidInputError
from fedleak.files import make_private, read_json, refuse_links, to_json, write_atomically
from fedleak.lock import is_empty

#: In the file that says what a folder holds: what everything in it was made with.
_SETTINGS = "settings"


@dataclass(frozen=True)
class Kind:
    """A kind of output folder.

    Attributes
    ----------
    what : str
        In messages: ``an attack``.
    about : str
        The file that says that it is one.
    written : tuple of str
        Files and folders in it; ``overwrite`` removes these and nothing else.
    """

    what: str
    about: str
    written: tuple[str, ...]


def claim(
    folder: Path,
    kind: Kind,
    settings: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Make an output folder, or go on with one of the same kind and settings.

    Parameters
    ----------
    folder : Path
    kind : Kind
    settings : dict, optional
        What all results in the folder must have been made with; plain types.
    record : dict, optional
        What is only written down, beside the settings.
    overwrite : bool
        Start again, where the folder holds results of this kind.

    Raises
    ------
    InvalidInputError
        If the folder cannot be used, holds something else, or was made with other settings.
    """
    plain = None if settings is None else json.loads(json.dumps(settings, default=str))
    stored = folder / kind.about
    try:
        make_private(folder)
        refuse_links(folder)
        if stored.is_file() and overwrite:
            clear(folder, kind.written)
        elif stored.is_file() and plain is not None:
            _compare(stored, plain)
        elif not stored.is_file() and not is_empty(folder):
            raise InvalidInputError(
                f"--out {str(folder)!r} is not empty and holds no {kind.what}; use another"
            )
        write_atomically(
            stored, to_json({**({} if plain is None else {_SETTINGS: plain}), **(record or {})})
        )
    except OSError as error:
        raise InvalidInputError(f"--out {str(folder)!r} cannot be used: {error}") from error


def settings_in(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in what a folder says of itself; once they stood there alone."""
    found = about.get(_SETTINGS, about)
    return dict(found) if isinstance(found, Mapping) else {}


def clear(folder: Path, names: Iterable[str]) -> None:
    """Remove files and folders of these names; a link is removed, never followed."""
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _compare(stored: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = settings_in(read_json(stored))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"{str(stored)!r} cannot be read ({error}); use another --out, or --overwrite"
        ) from error
    other = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
    if other:
        listed = "; ".join(f"{k} {before.get(k)!r}, now {settings.get(k)!r}" for k in other)
        raise InvalidInputError(
            f"{str(stored.parent)!r} was made with other settings ({listed}); use another "
            "--out, or --overwrite to start again"
        )
