"""The packages beside this one, under its name: ``fedleak.strategies`` is ``strategies``.

An app of Flower's has files of its own beside its scripts, which Python finds first: one that is
called ``strategies.py`` hides the package of that name. Under fedleak's name ours is found all the
same, and only once: where nothing hides it, both names are the same modules.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).resolve().parent


class _Finder(MetaPathFinder, Loader):
    """Finds ``fedleak.NAME.x`` in the package beside, by its own name ``NAME.x``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        home, _, name = fullname.partition(".")
        top = name.partition(".")[0]
        if home != "fedleak" or top not in _SAME or name == top:
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(spec.name.partition(".")[2])
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has set the other name's


#: Packages whose modules have both names.
_SAME: set[str] = set()
_FINDER = _Finder()


def adopt(name: str) -> None:
    """Make the package ``name`` beside this one importable as ``fedleak.name``.

    Raises
    ------
    ModuleNotFoundError
        If there is none, or what it needs is not installed.
    """
    folder, alias = _HERE.parent / name, f"fedleak.{name}"
    if not _hidden(name, folder):
        _SAME.add(name)
        if _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)
        sys.modules[alias] = importlib.import_module(name)
        return
    spec = spec_from_file_location(
        alias, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[alias] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


def _hidden(name: str, folder: Path) -> bool:
    """Return whether another module of that name comes first."""
    module = sys.modules.get(name)
    spec = PathFinder.find_spec(name) if module is None else module.__spec__
    origin = None if spec is None else spec.origin
    origin = origin or getattr(module, "__file__", None)
    if origin is None:  # an editable installation finds it in ways of its own
        return module is None and importlib.util.find_spec(name) is None
    return Path(origin).resolve().parent != folder
