"""Names for things a third party may add: attacks, defences, models, data sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any, Generic, TypeVar

from fedleak.errors import InvalidInputError, UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from name to object, open to other packages through entry points.

    Parameters
    ----------
    kind : str
        What the entries are, in the singular, for messages ("attack").
    group : str, optional
        Entry-point group (``"fedleak.attacks"``). A package that declares
        ``[project.entry-points."fedleak.attacks"] mine = "pkg.module:object"``
        adds ``mine`` here without touching fedleak. Entry points are read on the
        first look-up and loaded only when their name is asked for.
    """

    def __init__(self, kind: str, group: str | None = None):
        self.kind, self.group = kind, group
        self._entries: dict[str, T] = {}
        self._points: dict[str, metadata.EntryPoint] | None = None
        self._ours: set[str] = set()

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its argument under ``name``."""

        def enter(item: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = item
            self._ours.add(name)
            return item

        return enter

    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        if self._points is None:
            found = metadata.entry_points(group=self.group) if self.group else ()
            self._points = {p.name: p for p in found}
        return self._points

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            point = self._entry_points().get(name)
            if point is None:
                raise UnknownNameError(self.kind, name, self)
            self._entries[name] = point.load()
        return self._entries[name]

    def name_of(self, item: T) -> str | None:
        """Return the name that ``item`` is entered under, if it has been."""
        return next((name for name, known in self._entries.items() if known is item), None)

    def package_of(self, name: str) -> str | None:
        """Return the package whose entry point a name is; None of one registered in the code."""
        point = None if name in self._ours else self._entry_points().get(name)
        if point is None:
            return None
        return point.dist.name if point.dist is not None else point.value.partition(":")[0]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._entry_points()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._entries, *self._entry_points()}))


def make(
    registry: Registry[Any], name: str, options: Mapping[str, Any], *args: Any, **given: Any
) -> Any:
    """Make what a name stands for, with the options of a user.

    Parameters
    ----------
    registry : Registry
        Of classes or factories.
    name : str
    options : mapping
        A user's, which are refused by name.
    *args, **given
        What the caller gives, and a user does not choose.

    Raises
    ------
    UnknownNameError
        If there is no such name.
    InvalidInputError
        If it does not take an option or refuses its value.
    """
    kind = registry[name]
    try:
        return kind(*args, **given, **options)
    except TypeError as error:
        known = [p for p in inspect.signature(kind).parameters if p not in given][len(args) :]
        raise InvalidInputError(
            f"{registry.kind} {name!r} does not take these options {dict(options)}: {error}. "
            f"Known: {', '.join(known) or 'none'}"
        ) from error
