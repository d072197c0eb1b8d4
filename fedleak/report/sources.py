"""What kind of folder it is, and what it holds of every defence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from fedleak.errors import InvalidInputError
from fedleak.results.folder import settings_in
from fedleak.results.format import (
    ATTACK,
    ATTACKS,
    AUDIT,
    COVERAGE,
    EVALUATION,
    EVALUATION_ROUNDS,
    INFORMED,
    LEAKAGE,
    METRIC,
    ROUNDS,
    ROUNDS_OF_ARMS,
    RUN,
    SWEEP,
    TAMPERING,
    UNAWARE,
    Table,
)
from fedleak.results.reading import read_json, try_json, try_table
from fedleak.results.runs import finished_cells, judged_side, predicted
from fedleak.status import STATUSES
from fedleak.untrusted import dig, finite, within
from fedleak.wording import RECOGNISABLE, clean, defence_words, strength_words

Kind = Literal["run", "evaluation", "attack", "audit"]
_GROUP = ["scenario", "data", "model"]
_ARM = ["defence", "strength"]


@dataclass(eq=False)
class Arm:
    """One defence, and all that is known of it.

    Attributes
    ----------
    defence, strength : str
    leakage, rounds, metric : DataFrame
        A row for each image, round, and round and layer; with a column ``seed``. The leakage
        is that of an attacker who knows the defence, where there were two.
    table : DataFrame
        Rows of ``evaluation.csv``, one for each seed; empty for a run.
    per_round : DataFrame
        Rows of the evaluation's ``rounds.csv``.
    coverage : DataFrame
        A row for each client and round, of a server with memory.
    folders : list of Path
        Where the reconstructions are, first seed first.
    """

    defence: str = "none"
    strength: str = "0"
    leakage: pd.DataFrame = field(default_factory=lambda: _nothing(LEAKAGE))
    rounds: pd.DataFrame = field(default_factory=lambda: _nothing(ROUNDS))
    metric: pd.DataFrame = field(default_factory=lambda: _nothing(METRIC))
    table: pd.DataFrame = field(default_factory=lambda: _nothing(EVALUATION))
    per_round: pd.DataFrame = field(default_factory=lambda: _nothing(EVALUATION_ROUNDS))
    coverage: pd.DataFrame = field(default_factory=lambda: _nothing(COVERAGE))
    folders: list[Path] = field(default_factory=list)
    label: str = ""
    tamper: str = "none"
    """What the server sent; the honest model by default."""
    tampering: pd.DataFrame = field(default_factory=lambda: _nothing(TAMPERING))
    """Rows of ``tampering.csv``, where there is one."""

    def __post_init__(self) -> None:
        self.label = clean(self.label or defence_words(self.defence, self.strength))

    @property
    def undefended(self) -> bool:
        """Whether the clients sent what they had computed."""
        return self.defence in ("none", "")


@dataclass(eq=False)
class Study:
    """Defences that can be compared: of one scenario, data set and model."""

    title: str
    arms: list[Arm]
    scenario: dict[str, Any]
    informed: bool
    """Whether the attacker knew the defences."""
    tampered: list[Arm] = field(default_factory=list)
    """The same of a server that changes the model."""


@dataclass(eq=False)
class Source:
    """A folder, read."""

    kind: Kind
    name: str
    folder: Path
    studies: list[Study] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def simulated(self) -> bool | None:
        """Whether clients and data are simulated; None where nothing says so."""
        return self.about.get("simulated") if "simulated" in self.about else None


def _nothing(table: Table) -> pd.DataFrame:
    return pd.DataFrame(columns=["seed", *(c for c in table.columns if c != "seed")])


def read_source(folder: Path) -> Source:
    """Read the folder of a run, an evaluation, an attack on a capture, or an audit.

    Raises
    ------
    InvalidInputError
        If it is none of these, or what it cannot do without is damaged.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise InvalidInputError(
            f"{str(folder)!r} is no folder; name one that fedleak simulate, evaluate, attack "
            "or audit (--out) has written"
        )
    present = {p.name for p in folder.iterdir()}
    if present & {EVALUATION.file, SWEEP}:
        source = _evaluation(folder)
    elif present & {RUN, LEAKAGE.file}:
        source = _run(folder)
    elif ATTACKS.file in present or (folder / "attacks").is_dir():
        source = _attacks(folder)
    elif AUDIT in present:
        return Source("audit", folder.name, folder, audit=read_json(folder / AUDIT))
    else:
        raise InvalidInputError(_none_of_these(folder))
    for path in (folder / AUDIT, folder / "audit" / AUDIT):
        if path.is_file() and source.audit is None:
            source.audit = try_json(path, source.notes) or None
    source.notes = list(dict.fromkeys(source.notes))
    return source


def _none_of_these(folder: Path) -> str:
    made = (RUN, SWEEP, ATTACKS.file, AUDIT)
    below = sorted({p.parent.name for name in made for p in folder.glob(f"*/{name}")})
    hint = f"; these folders in it do: {', '.join(below[:8])}" if below else ""
    return (
        f"{str(folder)!r} holds no results of fedleak (none of run.json, leakage.csv, "
        f"evaluation.csv, attacks.csv, audit.json){hint}; name a folder that fedleak simulate, "
        "evaluate, attack or audit (--out) has written"
    )


def _run(folder: Path) -> Source:
    source = Source("run", folder.name, folder)
    source.about = try_json(folder / RUN, source.notes)
    scenario = dig(source.about, "scenario", default={})
    names = dig(source.about, "arms", default=[])
    listed = [str(n) for n in names] if isinstance(names, list) else []
    folders = within(folder, listed)
    if listed:
        arms = [_run_arm(f, source.notes) for f in folders] or _combined(folder, source.notes)
        absent = sorted(set(listed) - {f.name for f in folders})
        if absent:
            source.notes.append(f"No folder of: {', '.join(absent)}. It was not run, or removed.")
    else:
        arms = [_run_arm(folder, source.notes, source.about)]
    if not arms:
        arms = [Arm(label="no defence has run")]
    title = str(dig(scenario, "name", default=folder.name))
    scenario = scenario if isinstance(scenario, dict) else {}
    informed = dig(scenario, "threat", "defence") is True
    honest, tampered = _by_honesty(arms)
    source.studies = [Study(title, honest, scenario, informed, tampered)]
    return source


def _by_honesty(arms: list[Arm]) -> tuple[list[Arm], list[Arm]]:
    """Return the arms of an honest server, and those of one that changes the model.

    Where there are no honest ones, the others are in their place as well.
    """
    tampered = [a for a in arms if a.tamper != "none"]
    return [a for a in arms if a.tamper == "none"] or arms, tampered


def _run_arm(folder: Path, notes: list[str], about: dict[str, Any] | None = None) -> Arm:
    about = try_json(folder / RUN, notes) if about is None else about
    seed = finite(about.get("seed")) or 0
    leakage = try_table(folder, LEAKAGE, notes).assign(seed=seed)
    rounds = try_table(folder, ROUNDS, notes).assign(seed=seed)
    metric = _nothing(METRIC)
    if (folder / METRIC.file).is_file():
        metric = try_table(folder, METRIC, notes).assign(seed=seed)
    coverage = _nothing(COVERAGE)
    if (folder / COVERAGE.file).is_file():
        coverage = try_table(folder, COVERAGE, notes)
    name = dig(about, "scenario", "defence", "name")
    strength = dig(about, "scenario", "defence", "strength", default="")
    if name is None and len(leakage):
        name, strength = leakage["defence"].iloc[0], leakage["strength"].iloc[0]
    label = "" if name is not None else f"unknown defence ({folder.name})"
    name, strength = str(name if name is not None else "?"), str(strength)
    arm = Arm(
        name, strength, _whole(leakage, notes), rounds, metric, folders=[folder], label=label,
        coverage=coverage, tamper=str(dig(about, "scenario", "tamper", "name", default="none")),
    )  # fmt: skip
    if (folder / TAMPERING.file).is_file():
        arm.tampering = try_table(folder, TAMPERING, notes).assign(seed=seed)
    return arm


def _whole(leakage: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Leave out rows of which a killed run wrote half."""
    good = leakage["status"].isin(STATUSES) & leakage["round"].notna()
    if not good.all():
        notes.append(f"{int((~good).sum())} incomplete rows of leakage.csv were left out.")
    return leakage[good]


def _combined(folder: Path, notes: list[str]) -> list[Arm]:
    """Return the arms of a run of which only the common tables are left."""
    leakage = _whole(try_table(folder, LEAKAGE, notes), notes).assign(seed=0)
    rounds = try_table(folder, ROUNDS_OF_ARMS, notes).assign(seed=0)
    keys = pd.concat([leakage[["defence", "strength"]], rounds[["defence", "strength"]]])
    return [
        Arm(key[0], key[1], _rows_of(leakage, key), _rows_of(rounds, key))
        for key in keys.drop_duplicates().itertuples(index=False, name=None)
    ]


def _rows_of(table: pd.DataFrame, key: tuple[str, str]) -> pd.DataFrame:
    return table[(table["defence"] == key[0]) & (table["strength"] == key[1])]


def _evaluation(folder: Path) -> Source:
    source = Source("evaluation", folder.name, folder)
    source.about = try_json(folder / SWEEP, source.notes)
    table = try_table(folder, EVALUATION, source.notes)
    per_round = try_table(folder, EVALUATION_ROUNDS, source.notes)
    per_round["tamper"] = per_round["tamper"].fillna("none")
    cells = list(_cells(folder, source.notes))
    threshold = finite(dig(source.about, "sweep", "threshold_db"))
    if threshold is not None and threshold != RECOGNISABLE and not cells:
        source.notes.append(f"Recognisable means here: at least {threshold:g} dB (threshold_db).")
    bad = table[table["status"] != "ok"]
    if len(bad):
        reason = str(bad["reason"].value_counts().index[0])
        source.notes.append(
            f"{len(bad)} of {len(table)} cells failed and are not counted ({reason}); the same "
            "fedleak evaluate command repeats them."
        )
    for group, rows in table.groupby(_GROUP, sort=False):
        key = tuple(map(str, group))
        arms: list[Arm] = []
        scenario: dict[str, Any] = {}
        rows = rows.assign(tamper=rows["tamper"].fillna("none"))
        for (tamper, *defended), own in rows.groupby(["tamper", *_ARM], sort=False):
            where = (*key, str(tamper), *map(str, defended))
            of_arm = [c for c in cells if _same(c[0], where)]
            scenario = scenario or (dig(of_arm[0][1], "scenario", default={}) if of_arm else {})
            good = own[own["status"] == "ok"]
            own_rounds = per_round[(per_round[[*_GROUP, "tamper", *_ARM]] == where).all(axis=1)]
            arms.append(_cell_arm(where[-3:], good, own_rounds, of_arm, source.notes))
        honest, tampered = _by_honesty(arms)
        title = ", ".join(k for k in key if k)
        source.studies.append(Study(title, honest, scenario, True, tampered))
    if not source.studies:
        source.notes.append("evaluation.csv has no rows: no cell has finished.")
        source.studies = [Study(folder.name, [Arm(label="no defence has run")], {}, True)]
    return source


Cell = tuple[tuple[str, ...], dict[str, Any], Path]


def _cells(folder: Path, notes: list[str]) -> Iterator[Cell]:
    """Yield what each cell is of, its run.json, and the folder of the informed attacker."""
    for cell in finished_cells(folder):
        run = judged_side(cell)
        about = try_json(run / RUN, notes)
        s = dig(about, "scenario", default={})
        names = (dig(s, "name"), dig(s, "data", "name"), dig(s, "model", "name"),
                 dig(s, "tamper", "name", default="none"), dig(s, "defence", "name"),
                 dig(s, "defence", "strength"))  # fmt: skip
        yield tuple("" if n is None else str(n) for n in names), about, run


def _same(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether two cells differ in their seed alone; 1 and 1.0 are the same strength."""
    return one[:-1] == other[:-1] and strength_words(one[-1]) == strength_words(other[-1])


def _cell_arm(
    key: tuple[str, ...],
    table: pd.DataFrame,
    per_round: pd.DataFrame,
    cells: list[Cell],
    notes: list[str],
) -> Arm:
    seeds = set(table["seed"].dropna())
    order = sorted(
        (c for c in cells if finite(c[1].get("seed")) in seeds),
        key=lambda c: finite(c[1].get("seed")) or 0,
    )
    tamper, defence, strength = key
    arm = Arm(defence, strength, table=table, per_round=per_round, tamper=tamper)
    runs = [_run_arm(run, notes, about) for _, about, run in order]
    for one in runs:
        _add_predictions(one, notes)
    if runs:
        arm.leakage = pd.concat([r.leakage for r in runs], ignore_index=True)
        arm.rounds = pd.concat([r.rounds for r in runs], ignore_index=True)
        arm.metric = pd.concat([r.metric for r in runs], ignore_index=True)
        arm.tampering = pd.concat([r.tampering for r in runs], ignore_index=True)
        arm.folders = [run for _, _, run in order]
    return arm


def _add_predictions(run: Arm, notes: list[str]) -> None:
    """Take the predictions from the unaware attacker's table: one serves both attackers."""
    beside = run.folders[0].parent / UNAWARE
    if run.folders[0].name == INFORMED and (beside / LEAKAGE.file).is_file():
        run.leakage = predicted(run.leakage, try_table(beside, LEAKAGE, notes))


def _attacks(folder: Path) -> Source:
    """Read one attack on a capture, or a capture with the attacks in it."""
    source = Source("attack", folder.name, folder)
    own = (folder / ATTACKS.file).is_file()
    folders = [folder] if own else sorted(p.parent for p in folder.glob("attacks/*/attacks.csv"))
    if not folders:
        raise InvalidInputError(
            f"the capture {str(folder)!r} has not been attacked; run: fedleak attack {folder}"
        )
    capture = folder.parent.parent if own else folder
    if (capture / "manifest.json").is_file():
        manifest = try_json(capture / "manifest.json", source.notes)
        source.about = {"simulated": manifest.get("simulated"), "capture": manifest.get("model")}
    arms = []
    for one in folders:
        settings = settings_in(try_json(one / ATTACK, source.notes))
        source.about.setdefault("attack", settings)
        found = try_table(one, ATTACKS, source.notes)
        leakage = found.reindex(columns=list(LEAKAGE.columns)).assign(seed=0.0)
        label = one.name if len(folders) > 1 else str(settings.get("attack", one.name))
        arms.append(Arm("?", "", _whole(leakage, source.notes), folders=[one], label=label))
    source.studies = [Study(folder.name, arms, {}, False)]
    return source
