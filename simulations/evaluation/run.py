"""Run a sweep: resumable, in one process, in several, or on Ray; the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from fedleak import workers
from fedleak.errors import InvalidInputError
from fedleak.events import emit
from fedleak.lock import only_writer
from fedleak.provenance import commit, now, package_versions
from fedleak.results.folder import Kind, claim
from fedleak.results.format import EVALUATION, EVALUATION_ROUNDS, SWEEP
from fedleak.workers import JobEngine, OnProgress
from simulations.evaluation.cell import CellOutcome, clear_interrupted, finished, run_cell
from simulations.evaluation.sweep import Cell, Sweep
from simulations.evaluation.table import Row, add_costs, cell_rows, failed_row

#: Cells are found by what they are of: another sweep may use the same folder.
KIND = Kind("evaluation", SWEEP, ())


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What came of a sweep.

    Attributes
    ----------
    folder : Path
    table : DataFrame
        As ``evaluation.csv``.
    skipped : int
        Cells that an earlier call had finished.
    """

    folder: Path
    table: pd.DataFrame
    skipped: int


def evaluate(
    sweep: Sweep,
    out: Path | str | None = None,
    *,
    jobs: int = 1,
    engine: JobEngine = "local",
    confirmed: bool = False,
    on_progress: OnProgress | None = None,
) -> Evaluated:
    """Run the cells of a sweep that are not finished, and write the tables and pictures.

    Parameters
    ----------
    sweep : Sweep
    out : path, optional
        By default ``results/runs/NAME``. Cells that are finished in it are kept, also those of
        another sweep: the same cell is not run twice.
    jobs : int
        Processes. With more than one, a script that calls this needs the usual
        ``if __name__ == "__main__":``.
    engine : {"local", "ray"}
        ``ray`` uses the cluster at ``RAY_ADDRESS`` where that is set; all nodes must see
        ``out`` under the same path.
    confirmed : bool
        Run also more than ``sweep.max_cells`` cells.
    on_progress : callable, optional

    Returns
    -------
    Evaluated

    Raises
    ------
    FedleakError
        If anything in the sweep cannot run; no cell has run then.
    """
    workers.check_engine(engine, jobs)
    cells = _checked(sweep, confirmed)
    folder = (Path(out) if out is not None else Path("results/runs") / sweep.name).absolute()
    with only_writer(folder):
        claim(folder, KIND, record=_about(sweep))
        clear_interrupted(folder)
        book = _Book(folder, sweep, cells)
        skipped = len(book.rows)
        todo = [c for c in cells if c.key not in book.rows]
        if on_progress is not None:
            on_progress(skipped, len(cells))
        for count, (cell, found) in enumerate(_run(folder, todo, jobs, engine), skipped + 1):
            outcome = (
                found if isinstance(found, CellOutcome) else CellOutcome("failed", found.reason)
            )
            book.add(cell, outcome)
            _tell(cell, outcome)
            book.write()
            if on_progress is not None:
                on_progress(count, len(cells))
        book.write()
        from simulations.evaluation.plots import plot_evaluation  # seaborn takes seconds to import

        plot_evaluation(folder, [c for c in cells if finished(folder, c) is not None])
        return Evaluated(folder, pd.read_csv(folder / EVALUATION.file), skipped)


def _checked(sweep: Sweep, confirmed: bool) -> list[Cell]:
    """Return the cells, once everything that they need is known to be there."""
    from simulations.server_app import check

    if sweep.count > sweep.max_cells and not confirmed:  # before any of them is made
        raise InvalidInputError(
            f"sweep {sweep.name!r} makes {sweep.count} cells, more than max_cells = "
            f"{sweep.max_cells}; say --yes to run them all, or raise max_cells"
        )
    cells = sweep.cells()
    for scenario in sweep.grid():
        check(scenario)
    return cells


def _about(sweep: Sweep) -> dict[str, Any]:
    return {
        "sweep": sweep.model_dump(mode="json"),
        "simulated": True,
        "started": now(),
        "versions": package_versions(),
        "commit": commit(),
    }


def _run(
    folder: Path, cells: Sequence[Cell], jobs: int, engine: JobEngine
) -> Iterator[tuple[Cell, CellOutcome | workers.Crash]]:
    function: Callable[[Cell], CellOutcome] = partial(run_cell, str(folder))
    if not cells:
        return iter(())
    if engine == "ray":
        training, attack = cells[0].scenario.training, cells[0].scenario.attack
        gpus = 1 if attack.device.startswith("cuda") else 0
        return workers.run_ray(function, cells, training.threads, gpus)
    if jobs > 1:
        return workers.run_processes(function, cells, jobs)
    return ((cell, function(cell)) for cell in cells)


def _tell(cell: Cell, outcome: CellOutcome) -> None:
    """Log how a cell ended; a person is told of failures at the end."""
    scenario = cell.scenario
    emit(
        "cell", defence=str(scenario.defence.spec), tamper=scenario.tamper.name,
        model=scenario.model.name, data=scenario.data.name, seed=scenario.seed, **vars(outcome),
    )  # fmt: skip


class _Book:
    """The rows of all cells that are finished, or failed in this call, in the sweep's order."""

    def __init__(self, folder: Path, sweep: Sweep, cells: Sequence[Cell]):
        self.folder, self.sweep, self.cells = folder, sweep, cells
        self.rows: dict[str, tuple[Row, list[Row]]] = {}
        for cell in cells:
            outcome = finished(folder, cell)
            if outcome is not None:
                try:
                    self.add(cell, outcome)
                except (OSError, ValueError, KeyError, IndexError):
                    continue  # its tables were lost, as by a power cut: it is run again

    def add(self, cell: Cell, outcome: CellOutcome) -> None:
        if outcome.status == "ok":
            self.rows[cell.key] = cell_rows(self.folder, cell, outcome, self.sweep)
        else:
            self.rows[cell.key] = failed_row(cell, outcome), []

    def write(self) -> None:
        found = [self.rows[c.key] for c in self.cells if c.key in self.rows]
        rounds: list[Any] = [row for _, rows in found for row in rows]
        add_costs(row for row, _ in found)
        EVALUATION.write(self.folder, [row for row, _ in found])
        EVALUATION_ROUNDS.write(self.folder, rounds)
