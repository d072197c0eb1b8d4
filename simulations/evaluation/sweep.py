"""A sweep, described and validated, and the cells that it is made of."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedleak.errors import InvalidInputError
from fedleak.wording import RECOGNISABLE
from simulations.scenario import Scenario, make_scenario
from simulations.tables import explain, override, read_table

SHIPPED = Path(__file__).parents[1] / "sweeps"


class Sweep(BaseModel):
    """The grid: every defence and tamper on every scenario, data set, model and seed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    name: str = Field("sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    scenario: tuple[str | dict[str, Any], ...] = Field(
        ("demo",), min_length=1, description="names, files or tables of scenarios; one or several"
    )
    set: dict[str, Any] = Field(default_factory=dict, description="keys of every scenario")
    defences: tuple[str, ...] = Field((), description='as "none", "clip:1+noise:0.1"')
    strengths: dict[str, tuple[float | str, ...]] = Field(
        default_factory=dict, description="a defence's name, and a list of its strengths"
    )
    tampers: tuple[str, ...] = Field((), description='as "none", "peel:directions=8"')
    datasets: tuple[str, ...] = Field((), description="data.name; none: the scenario's")
    models: tuple[str, ...] = Field((), description="model.name; none: the scenario's")
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    threshold_db: float = Field(
        RECOGNISABLE, gt=0, description="PSNR from which an image is identifiable"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="of (epsilon, delta), where dp is used")
    max_cells: int = Field(60, ge=1, description="more cells than this need --yes")

    @field_validator("scenario", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, dict)) else value

    @field_validator("defences", "tampers", "datasets", "models", "seeds", "scenario")
    @classmethod
    def _each_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        seen: set[str] = set()
        for value in values:
            if repr(value) in seen:
                raise ValueError(f"{value!r} is listed twice")
            seen.add(repr(value))
        return values

    @property
    def all_defences(self) -> list[str]:
        """Each as NAME:STRENGTH: those listed, then those of each list of strengths.

        Where tampers are compared and no defence is listed, clients have none.
        """
        listed = [f"{n}:{s}" for n, strengths in self.strengths.items() for s in strengths]
        found = [*self.defences, *listed]
        return found or (["none"] if self.tampers else [])

    @property
    def count(self) -> int:
        """Number of cells."""
        axes = (self.datasets, self.models, self.tampers)
        kinds = (self.scenario, *(axis or (None,) for axis in axes), self.seeds)
        return math.prod(map(len, (*kinds, self.all_defences)))

    def grid(self) -> list[Scenario]:
        """Return a scenario for each seed, model, data set and scenario, with all defences.

        Raises
        ------
        InvalidInputError
            If there is no defence, or something contradicts itself; the value is named.
        """
        defences = self.all_defences
        if not defences:
            raise InvalidInputError(
                "the sweep names no defence, so there is nothing to do; write "
                'defences = ["none", "noise:0.1"], or a table [strengths] with noise = [0.1]'
            )
        found = []
        for source in self.scenario:
            table = _merged(read_table(source) if isinstance(source, str) else source, self.set)
            for data in self.datasets or (None,):
                for model in self.models or (None,):
                    for tamper in self.tampers or (None,):
                        named = {"data": data, "model": model, "tamper": tamper}
                        chosen = {k: {"name": v} for k, v in named.items() if v is not None}
                        for seed in self.seeds:
                            own = {**chosen, "seed": seed, "defence": defences[0]}
                            whole = _merged(table, own) | {"compare": defences[1:]}
                            found.append(make_scenario(whole))
        return found

    def cells(self) -> list[Cell]:
        """Return the cells in the order of the table: seeds of one defence beside each other.

        Raises
        ------
        InvalidInputError
            As :meth:`grid`, and if two cells would be the same.
        """
        cells = [Cell(_unaware(s.arm(d))) for s in self.grid() for d in s.arms()]
        places: dict[tuple[str, ...], int] = {}
        for cell in cells:  # the order of first appearance, seeds aside
            places.setdefault(cell.setting, len(places))
        if len({c.key for c in cells}) < len(cells):
            raise InvalidInputError(f"sweep {self.name!r} has the same cell twice")
        return sorted(cells, key=lambda c: places[c.setting])  # stable: seeds stay in order


@dataclass(frozen=True)
class Cell:
    """One federated run: a scenario with one defence, and no attacker who knows it."""

    scenario: Scenario

    @property
    def setting(self) -> tuple[str, ...]:
        """What the cells of different seeds have in common."""
        s = self.scenario
        return s.name, s.data.name, s.model.name, str(s.defence.spec), s.tamper.name

    @cached_property
    def key(self) -> str:
        """Name of the cell's folder: readable, and another one wherever the run is another."""
        from fedleak import __version__

        table = self.scenario.model_dump(mode="json")
        for where in ("root", "download"):  # the same images lie elsewhere on another machine
            del table["data"][where]
        content = json.dumps([table, _files(self.scenario), __version__], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:10]
        return f"{self.scenario.label[:60]}_seed-{self.scenario.seed}_{digest}"


def load_sweep(source: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """Read a sweep file.

    Parameters
    ----------
    source : path or str
        A TOML file, or the name of a shipped sweep (``"noise-pruning"``).
    overrides : iterable of str
        ``"key=value"`` of the sweep, as ``seeds=[0]``, or of every scenario, as
        ``data.name=CIFAR10``.

    Returns
    -------
    Sweep

    Raises
    ------
    InvalidInputError
        If the file is missing or no TOML, a key unknown, or a value not allowed.
    """
    table = read_table(source, SHIPPED, "sweep")
    for text in overrides:
        head = text.partition("=")[0].strip().partition(".")[0]
        own = head in Sweep.model_fields
        override(table if own else table.setdefault("set", {}), [text])
    try:
        return Sweep.model_validate(table)
    except ValidationError as error:
        raise InvalidInputError("invalid sweep: " + explain(error, Sweep)) from error


def _unaware(scenario: Scenario) -> Scenario:
    """Return a cell's scenario, whichever process runs it, wherever."""
    threat = scenario.threat.model_copy(update={"defence": False})
    data = scenario.data.model_copy(update={"root": str(Path(scenario.data.root).absolute())})
    return scenario.model_copy(update={"threat": threat, "data": data})


def _merged(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``table`` with the values of ``over``, section by section."""
    out = dict(table)
    for key, value in over.items():
        inner = out.get(key)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        out[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return out


def _files(scenario: Scenario) -> list[str]:
    """Return checksums of the files that a run depends on, beside its data."""
    code = Path(scenario.model.name.rpartition(":")[0])
    files = [code if code.suffix == ".py" else None, scenario.model.weights or None]
    return [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files if f]
