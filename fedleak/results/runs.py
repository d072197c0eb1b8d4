"""Runs read back from their folders: what ``fedleak simulate`` and ``fedleak evaluate`` left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from fedleak.errors import InvalidInputError, nearest
from fedleak.files import read_json
from fedleak.results.format import CELLS, DONE, INFORMED, LEAKAGE, ROUNDS, RUN, SWEEP, UNAWARE
from fedleak.results.reading import demand_table
from fedleak.status import STATUSES
from fedleak.untrusted import dig
from fedleak.wording import clean

#: Letters of a defence's name in a file that somebody else may have written.
_LETTERS = 200
#: Of a scenario, but not what a run was made of: names, and what is an arm of its own.
_NOT_SETTINGS = ("name", "compare", "data.download", "defence", "defence.name", "defence.strength")


@dataclass(frozen=True, eq=False)
class Run:
    """One training under one defence, or several that differ by their seed alone.

    Attributes
    ----------
    name : str
        As shown; of several runs the least of the path that tells them apart.
    defence : str
        As one word, ``noise-0.1``.
    settings : dict of str to value
        The scenario with dotted keys, without the defence.
    leakage, rounds : DataFrame
        Of the finished rounds, as in ``leakage.csv`` and ``rounds.csv``.
    folder : Path
    commit : str or None
        Of the code that ran.
    gaps : tuple of str
        What is missing, for a person.
    """

    name: str
    defence: str
    settings: dict[str, Any]
    leakage: pd.DataFrame = field(repr=False)
    rounds: pd.DataFrame = field(repr=False)
    folder: Path
    commit: str | None = None
    gaps: tuple[str, ...] = ()


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read folders of runs, each with one arm or several, and of evaluations.

    Of an evaluation each defence is a run, its seeds together, as the informed attacker saw it.

    Returns
    -------
    list of Run
        In the order given; the arms of a folder in the order they ran.

    Raises
    ------
    InvalidInputError
        If a folder holds no run, or a file in it cannot be used; the file is named.
    """
    resolved = [f.resolve() for f in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise InvalidInputError(f"{str(folder)!r} is given twice; give each run once")
    names = _names(resolved)
    return [run for f, name in zip(resolved, names, strict=True) for run in _read(f, name)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return as much of the end of each path as tells them apart."""
    longest = max((len(f.parts) for f in folders), default=1)
    for parts in range(1, longest + 1):
        names = ["/".join(f.parts[-parts:]) for f in folders]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str) -> Iterator[Run]:
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.glob("*") if p.is_dir()]
        raise InvalidInputError(
            f"there is no folder {str(folder)!r}{nearest(folder.name, beside[:20])}"
        )
    if (folder / SWEEP).is_file():
        yield from _evaluation(folder, name)
        return
    about = _about(folder)
    listed = about.get("arms")
    arms = [str(a) for a in listed] if isinstance(listed, list) else []
    arms = [a for a in arms if a == Path(a).name and a != ".."]
    if not arms:
        yield _arm(folder, name, about)
        return
    missing = [a for a in arms if not (folder / a / RUN).is_file()]
    gap = (f"{name}: not run yet: {', '.join(missing)}",) if missing else ()
    there = [a for a in arms if a not in missing]
    if not there:
        raise InvalidInputError(
            f"{str(folder / arms[0] / 'run.json')!r} is missing: no defence of this run has "
            "started; run it again with --overwrite"
        )
    for count, arm in enumerate(there):
        run = _arm(folder / arm, name, _about(folder / arm))
        yield replace(run, gaps=run.gaps + (() if count else gap))


def _about(folder: Path) -> dict[str, Any]:
    """Read ``run.json``."""
    path = folder / RUN
    if not path.is_file():
        below = sorted(p.parent.name for p in folder.glob("*/run.json"))
        inside = f"; there are runs in it: {', '.join(below[:10])}" if below else ""
        raise InvalidInputError(
            f"{str(path)!r} is missing: give a folder that fedleak simulate or evaluate "
            f"wrote{inside}"
        )
    try:
        about = read_json(path)
        if not isinstance(about["scenario"], dict):
            raise TypeError("'scenario' is no table")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}); restore it, or "
            "run the scenario again"
        ) from error
    return dict(about)


def _arm(folder: Path, name: str, about: Mapping[str, Any]) -> Run:
    """Read one training, up to its last finished round."""
    leakage, lacking = demand_table(folder, LEAKAGE)
    rounds, more = demand_table(folder, ROUNDS)
    label = clean(_defence(about["scenario"].get("defence")))
    who, gaps = f"{name}, {label}", []
    for column in {*lacking, *more}:
        gaps.append(f"{who}: no {column} (written by an earlier version)")
    rounds = rounds.dropna(subset=["accuracy"])
    unfinished = ~leakage["round"].isin(rounds["round"])
    wanted = dig(about, "scenario", "federation", "rounds", default="?")
    if rounds.empty:
        gaps.append(f"{who}: no round is finished")
    elif about.get("status") != "finished" or unfinished.any():
        state = str(about.get("status", "unknown")).replace("running", "running, or killed")
        gaps.append(f"{who}: {state}; {len(rounds)} of {wanted} rounds are finished")
    settings = dict(_flat(about["scenario"]))
    unused = ("data.root",) if settings.get("data.name") == "digits" else ()
    settings = {k: v for k, v in settings.items() if k not in (*_NOT_SETTINGS, *unused)}
    leakage = leakage[~unfinished & leakage["status"].isin(STATUSES)]
    return Run(
        name, label, settings, leakage, rounds, folder, about.get("commit"), tuple(sorted(gaps))
    )


def _evaluation(folder: Path, name: str) -> Iterator[Run]:
    """Read an evaluation: the cells of one defence and setting, over all seeds."""
    groups: dict[str, list[Run]] = {}
    # Undefended first: all else is held against it.
    for cell in sorted(finished_cells(folder), key=lambda c: not c.name.startswith("none")):
        seen = judged_side(cell)
        if not (seen / RUN).is_file():
            continue
        about = _about(seen)
        run = _predicted(_arm(seen, name, about), cell / UNAWARE)
        same = {k: v for k, v in run.settings.items() if k not in ("seed", "threat.defence")}
        key = json.dumps([run.defence, about["scenario"].get("name"), same], sort_keys=True)
        groups.setdefault(key, []).append(replace(run, settings={**same, "attacker": "informed"}))
    if not groups:
        raise InvalidInputError(
            f"{str(folder / CELLS)!r} has no finished cell; the same fedleak evaluate goes on "
            "where it stopped"
        )
    told_apart = differences([runs[0] for runs in groups.values()])
    for runs, own in zip(groups.values(), told_apart, strict=True):
        yield replace(
            runs[0],
            name=f"{name} ({', '.join(map(str, own.values()))})" if own else name,
            leakage=pd.concat([r.leakage for r in runs], ignore_index=True),
            rounds=pd.concat([r.rounds for r in runs], ignore_index=True),
            settings={**runs[0].settings, "seeds": len(runs)},
            gaps=tuple(dict.fromkeys(g for r in runs for g in r.gaps)),
        )


def _predicted(run: Run, unaware: Path) -> Run:
    if run.folder == unaware or not (unaware / RUN).is_file():
        return run
    other = _arm(unaware, run.name, _about(unaware))
    return replace(run, leakage=predicted(run.leakage, other.leakage), rounds=other.rounds)


def predicted(informed: pd.DataFrame, unaware: pd.DataFrame) -> pd.DataFrame:
    """Return the informed attacker's table with the predictions, which lie beside the other."""
    keys, column = ["round", "client", "image"], "predicted_psnr_db"
    if not set(keys) <= set(unaware) & set(informed):
        return informed
    told = unaware.drop_duplicates(keys)[[*keys, column]]
    return informed.drop(columns=column).merge(told, on=keys, how="left")


def finished_cells(folder: Path) -> list[Path]:
    """Return the folders of an evaluation's finished cells."""
    return sorted(done.parent for done in (folder / CELLS).glob(f"*/{DONE}"))


def judged_side(cell: Path) -> Path:
    """Return the folder of the attacker that a defence is judged by."""
    return next(s for s in (cell / INFORMED, cell / UNAWARE) if s.is_dir() or s.name == UNAWARE)


def _defence(value: Any) -> str:
    """Return the label of a defence as ``run.json`` has it."""
    from fedleak.defences import DefenceSpec

    if not isinstance(value, Mapping):
        return "none"
    name, strength = str(value.get("name", "none"))[:_LETTERS], value.get("strength", 0.0)
    if not isinstance(strength, int | float):
        strength = str(strength)[:_LETTERS]
    try:
        return DefenceSpec(name, strength).label
    except Exception:  # of a package that is not installed here, or no defence at all
        return name if name == "none" else f"{name}-{strength}"


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, Mapping):
            yield f"{prefix}{key}", value


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return of each run the settings in which not all agree; None where it has no such key."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differ = [
        key for key in keys if any(r.settings.get(key) != runs[0].settings.get(key) for r in runs)
    ]
    return [{key: run.settings.get(key) for key in differ} for run in runs]
