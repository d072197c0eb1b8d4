"""One row for each cell and seed: what its defence cost, and what was still recovered."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fedleak.defences.accountant import epsilon
from fedleak.results.format import (
    CELLS,
    COVERAGE,
    EVALUATION,
    EVALUATION_ROUNDS,
    INFORMED,
    LEAKAGE,
    OF_ATTACKER,
    OF_MEMORY,
    ROUNDS,
    TAMPERING,
    UNAWARE,
    plain,
)
from fedleak.results.reading import read_table
from fedleak.results.tampering import tamper_figures
from fedleak.status import STATUSES, most_frequent, reconstructed
from simulations.evaluation.cell import CellOutcome
from simulations.evaluation.sweep import Cell, Sweep
from simulations.scenario import Scenario
from simulations.tampering import wanted

#: Columns of the tables of a cell, without which it is run again.
_NEEDED = (
    "round",
    "psnr_db",
    "predicted_psnr_db",
    "ssim",
    "label_true",
    "label_inferred",
    "status",
)
#: What ``tampering.csv`` is summed up to.
_OF_TAMPERING = ("recovered", "certified", "certified_wrong", "restored", "detected",
                 "false_alarms")  # fmt: skip
_SAME = ("scenario", "data", "model", "defence", "strength")
_OF_ROUNDS = ("round", "accuracy", "loss", "c_metric", "cramer_rao_db", "bytes_sent")

Row = dict[str, Any]


def describe(cell: Cell) -> Row:
    """Return what tells a cell from the others."""
    s = cell.scenario
    return {
        "scenario": s.name, "data": s.data.name, "model": s.model.name,
        "defence": s.defence.spec.name, "strength": s.defence.spec.strength, "seed": s.seed,
        "tamper": s.tamper.name,
    }  # fmt: skip


def failed_row(cell: Cell, outcome: CellOutcome) -> Row:
    """Return the row of a cell that did not finish."""
    return dict.fromkeys(EVALUATION.columns, "") | describe(cell) | {
        "rounds": cell.scenario.federation.rounds, "status": "failed", "reason": outcome.reason,
    }  # fmt: skip


def cell_rows(out: Path, cell: Cell, outcome: CellOutcome, sweep: Sweep) -> tuple[Row, list[Row]]:
    """Return the row of a finished cell, and one for each of its attacked rounds.

    Parameters
    ----------
    out : Path
        Folder of the evaluation.
    cell : Cell
    outcome : CellOutcome
    sweep : Sweep
        For the threshold, and the delta of epsilon: neither needs another run.

    Raises
    ------
    OSError, ValueError
        If its tables cannot be read, or are not whole.
    """
    folder, scenario = out / CELLS / cell.key, cell.scenario
    rounds = read_table(folder / UNAWARE / ROUNDS.file)
    unaware = read_table(folder / UNAWARE / LEAKAGE.file)
    informed = unaware  # no defence: there is nothing more to know
    if (folder / INFORMED).is_dir():
        informed = read_table(folder / INFORMED / LEAKAGE.file)
    if not all(_is_whole(t, rounds, scenario.federation.rounds) for t in (unaware, informed)):
        raise ValueError(f"the tables of {str(folder)!r} are not whole")
    attacked: Row = {}
    for who, leakage in ((UNAWARE, unaware), (INFORMED, informed)):
        found = _attacked(leakage, sweep.threshold_db)
        attacked |= {f"{name}_{who}": found[name] for name in OF_ATTACKER}
        own = folder / who if (folder / who).is_dir() else folder / UNAWARE
        attacked |= {f"{name}_{who}": value for name, value in covered(own, scenario).items()}
    last = rounds.iloc[-1]
    spec, number = scenario.defence.spec, scenario.federation.rounds
    private = epsilon(spec, number, delta=sweep.delta)
    row = describe(cell) | attacked | {
        "rounds": number,
        "accuracy": last["accuracy"],
        "loss": last["loss"],
        "images": len(unaware),
        "c_metric": rounds["c_metric"].median(),
        "predicted_psnr_db": unaware["predicted_psnr_db"].median(),
        "cramer_rao_db": rounds["cramer_rao_db"].median(),
        "epsilon": math.nan if private is None else private,
        "bytes_sent": rounds["bytes_sent"].mean(),
        **_tampered(folder / UNAWARE, scenario),
        "accuracy_lost": math.nan,  # known where the honest server's cell is
        "seconds": outcome.seconds,
        "status": outcome.status,
        "reason": _most_frequent(pd.concat([unaware, informed])),
    }  # fmt: skip
    by_round = _by_round(cell, rounds, unaware, informed)
    return {c: plain(row[c]) for c in EVALUATION.columns}, by_round


def covered(folder: Path, scenario: Scenario) -> Row:
    """Return what share of the clients' images the server holds at the end; NaN without memory."""
    if not scenario.attack.memory:
        return dict.fromkeys(OF_MEMORY, math.nan)
    table = read_table(folder / COVERAGE.file).sort_values("round")
    last = table.groupby("client").tail(1)
    if last.empty:
        return dict.fromkeys(OF_MEMORY, math.nan)
    total = float(last["images"].sum())
    told: Row = {f"covered_{k}": float(last[f"together_{k}"].sum()) / total for k in (20, 40, 60)}
    return told | {"invented": int(last["invented"].sum())}


def _tampered(folder: Path, scenario: Scenario) -> Row:
    """Return what the changed model gave, and who noticed; NaN where nothing of it was tried."""
    nothing = dict.fromkeys(_OF_TAMPERING, math.nan)
    if not wanted(scenario):
        return nothing
    found = tamper_figures(read_table(folder / TAMPERING.file))
    told = {k: getattr(found, k) for k in _OF_TAMPERING}
    return told if found.sent else {**nothing, "false_alarms": found.false_alarms}


def add_costs(rows: Iterable[Row]) -> None:
    """Note how much accuracy each tamper costs beside the honest server's cell, in place."""
    keys = (*_SAME, "seed")
    known = list(rows)
    honest = {tuple(str(r[k]) for k in keys): r for r in known if r["tamper"] == "none"}
    for row in known:
        base = honest.get(tuple(str(row[k]) for k in keys))
        if base is None or row["tamper"] == "none":
            continue
        if row["status"] == base["status"] == "ok":
            row["accuracy_lost"] = plain(float(base["accuracy"]) - float(row["accuracy"]))


def _is_whole(leakage: pd.DataFrame, rounds: pd.DataFrame, count: int) -> bool:
    """Return whether nothing is missing in the tables of a run, and all numbers can be true."""
    if leakage.empty or not {*_NEEDED} <= {*leakage} or not {*_OF_ROUNDS} <= {*rounds}:
        return False
    made = reconstructed(leakage)
    return bool(
        rounds["round"].tolist() == list(range(1, count + 1))
        and rounds["accuracy"].notna().all()
        and leakage["round"].isin(rounds["round"]).all()
        and leakage["status"].isin(STATUSES).all()
        and leakage.loc[made, "psnr_db"].notna().all()
    )


def _attacked(leakage: pd.DataFrame, threshold_db: float) -> Mapping[str, float]:
    """Return what one attacker recovered; medians are of the images that were reconstructed."""
    ok = leakage[reconstructed(leakage)]
    right = ok["label_true"] == ok["label_inferred"]
    return {
        "psnr_db_median": ok["psnr_db"].median(),
        "psnr_db_worst": ok["psnr_db"].max(),
        "ssim_median": ok["ssim"].median(),
        "ssim_worst": ok["ssim"].max(),
        "identified": (ok["psnr_db"] >= threshold_db).sum() / max(len(leakage), 1),
        "label_accuracy": right.sum() / max(len(leakage), 1),
        "failed": len(leakage) - len(ok),
    }


def _by_round(
    cell: Cell, rounds: pd.DataFrame, unaware: pd.DataFrame, informed: pd.DataFrame
) -> list[Row]:
    accuracy = rounds.set_index("round")["accuracy"]
    rows = []
    for number, group in unaware.groupby("round"):
        known = informed[informed["round"] == number]
        row = describe(cell) | {
            "round": number,
            "accuracy": accuracy.get(number, math.nan),
            "psnr_db_unaware": group["psnr_db"].median(),
            "psnr_db_informed": known["psnr_db"].median(),
            "predicted_psnr_db": group["predicted_psnr_db"].median(),
        }
        rows.append({c: plain(row[c]) for c in EVALUATION_ROUNDS.columns})
    return rows


def _most_frequent(leakage: pd.DataFrame) -> str:
    return most_frequent(leakage, "failed") or most_frequent(leakage, "doubtful")
