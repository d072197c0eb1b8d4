"""The format of results: which files there are, their columns, and what can stand in them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedleak.files import private, write_atomically

#: Of an evaluation: the folder of its cells, what says that one is finished, and in each cell the
#: folders of both attackers; the informed one's is missing where there is no defence to know of.
CELLS, DONE, UNAWARE, INFORMED = "cells", "cell.json", "unaware", "informed"
#: What a run, an evaluation, an attack on a capture, the paper's comparison and an audit say of
#: themselves.
RUN, SWEEP, ATTACK, COMPARISON, AUDIT = (
    "run.json", "sweep.json", "attack.json", "paper.json", "audit.json",
)  # fmt: skip
#: Pictures of a run by round, and the updates that it captured.
RECONSTRUCTIONS, CAPTURES = "reconstructions", "captures"


#: Decimals of a number in a table.
_DIGITS = 6


def plain(value: Any) -> Any:
    """Return a value as a table has it: rounded, and nothing for NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else round(float(value), _DIGITS)
    return value


@dataclass(frozen=True)
class Table:
    """A CSV file.

    Attributes
    ----------
    file : str
    columns : tuple of str
        As written. A reader takes the order of those that are there.
    needed : tuple of str
        Columns without which nothing can be said.
    late : tuple of str
        Columns of later versions: where they are missing an older one wrote the file.
    quiet : tuple of str
        Columns that readers can do without: nobody is told where they are missing.
    """

    file: str
    columns: tuple[str, ...]
    needed: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    quiet: tuple[str, ...] = ()

    def start(self, folder: Path) -> None:
        """Write the names of the columns."""
        self._line(folder, self.columns)

    def append(self, folder: Path, row: Mapping[str, Any]) -> None:
        """Add a row; what it does not have is empty."""
        self._line(folder, [row.get(c, "") for c in self.columns])

    def _line(self, folder: Path, values: Iterable[Any]) -> None:
        with open(
            folder / self.file, "a", newline="", encoding="utf-8", opener=private
        ) as file:  # fmt: skip
            csv.writer(file).writerow(values)

    def write(self, folder: Path, rows: Any, missing: str = "") -> None:
        """Write rows, or a DataFrame, in the place of what was there."""
        import pandas as pd

        text = pd.DataFrame(rows, columns=list(self.columns)).to_csv(index=False, na_rep=missing)
        write_atomically(folder / self.file, text.encode())


_QUIET = ("attack", "psnr_fitted_db", "mse", "seconds", "psnr_together_db",
          "predicted_together_db")  # fmt: skip
#: A row for each image that was attacked.
LEAKAGE = Table(
    "leakage.csv",
    ("round", "client", "image", "attack", "defence", "strength", "psnr_db", "psnr_fitted_db",
     "predicted_psnr_db", "ssim", "mse", "label_true", "label_inferred", "fit", "certified",
     "seconds", "status", "reason", "notes", "psnr_together_db", "predicted_together_db"),
    needed=("round", "psnr_db", "status"),
    late=("predicted_psnr_db",),
    quiet=(*_QUIET, "fit", "certified", "notes"),
)  # fmt: skip
#: A row for each round.
ROUNDS = Table(
    "rounds.csv",
    ("round", "accuracy", "loss", "c_metric", "c_normalised", "predicted_psnr_db", "cramer_rao_db",
     "clients", "failures", "bytes_sent", "seconds_train", "seconds_attack"),
    needed=("round", "accuracy"),
    late=("predicted_psnr_db",),
    quiet=("loss", "c_normalised", "cramer_rao_db", "clients", "failures", "seconds_train",
           "seconds_attack"),
)  # fmt: skip
_ARM = ("defence", "strength")
#: The same of several defences in one table.
ROUNDS_OF_ARMS = replace(ROUNDS, columns=(*ROUNDS.columns, *_ARM))
#: Both, where a defence has an arm of an honest server and one of a server that tampers.
LEAKAGE_OF_TAMPERS = replace(LEAKAGE, columns=(*LEAKAGE.columns, "arm"))
ROUNDS_OF_TAMPERS = replace(ROUNDS_OF_ARMS, columns=(*ROUNDS_OF_ARMS.columns, "arm"))
#: A row for each client that was asked, each round: what it was sent, and what became of it.
TAMPERING = Table(
    "tampering.csv",
    ("round", "client", "tamper", "change", "restored", "images", "recovered", "certified",
     "certified_wrong", "suspected", "signs", "reason"),
    needed=("round", "client", "tamper"),
)  # fmt: skip
#: A row for each round and layer.
METRIC = Table(
    "metric.csv",
    ("round", "name", "kind", "unknowns", "rank", "deficiency", "weight", "exact"),
    quiet=("exact",),
)  # fmt: skip
#: A row for each image of captured updates.
ATTACKS = Table(
    "attacks.csv",
    ("round", "client", "image", "attack", "psnr_db", "psnr_fitted_db", "ssim", "mse",
     "label_true", "label_inferred", "fit", "certified", "defence", "seconds", "status", "reason",
     "notes"),
    quiet=(*_QUIET, "notes"),
)  # fmt: skip
#: A row for each client and round of a server with memory: how many of the client's images it holds
#: that well (20, 40, 60 dB), from rounds alone and from all together.
COVERAGE = Table(
    "coverage.csv",
    ("round", "client", "images", "used", "held", "alone_20", "alone_40", "alone_60",
     "together_20", "together_40", "together_60", "twice", "invented", "certainty_db"),
    needed=("round", "client", "images", "together_20"),
)  # fmt: skip
#: The same of several defences in one table.
COVERAGE_OF_ARMS = replace(COVERAGE, columns=("defence", *COVERAGE.columns))
#: A row for each image that a server holds of the clients of a capture.
GALLERIES = Table(
    "gallery.csv",
    ("client", "place", "label", "seen", "rounds", "certainty_db", "misfit", "certified",
     "together", "psnr_db"),
)  # fmt: skip
#: Folder of the galleries' pictures.
GALLERY = "gallery"
_CELL = ("scenario", "data", "model", *_ARM, "seed")
#: What an evaluation says of each attacker.
OF_ATTACKER = (
    "psnr_db_median", "psnr_db_worst", "ssim_median", "ssim_worst", "identified", "label_accuracy",
    "failed",
)  # fmt: skip
#: What it says of one that keeps a gallery of each client.
OF_MEMORY = ("covered_20", "covered_40", "covered_60", "invented")
_MEMORY = tuple(f"{name}_{who}" for name in OF_MEMORY for who in (UNAWARE, INFORMED))
#: What it says of a server that sends a changed model, and of clients that look.
OF_TAMPER = (
    "tamper", "recovered", "certified", "certified_wrong", "restored", "accuracy_lost", "detected",
    "false_alarms",
)  # fmt: skip
#: A row for each cell and seed of an evaluation.
EVALUATION = Table(
    "evaluation.csv",
    (*_CELL, "rounds", "accuracy", "loss", "images",
     *(f"{name}_{who}" for name in OF_ATTACKER for who in (UNAWARE, INFORMED)),
     *_MEMORY,
     "c_metric", "predicted_psnr_db", "cramer_rao_db", "epsilon", "bytes_sent",
     *OF_TAMPER, "seconds", "status", "reason"),
    quiet=(*OF_TAMPER,
           *_MEMORY, "rounds", "loss", "cramer_rao_db", "seconds", "psnr_db_worst_unaware",
           "ssim_median_unaware", "ssim_median_informed", "ssim_worst_unaware",
           "ssim_worst_informed", "identified_unaware", "label_accuracy_unaware",
           "failed_unaware"),
)  # fmt: skip
#: A row for each attacked round of each cell.
EVALUATION_ROUNDS = Table(
    "rounds.csv",
    (*_CELL, "round", "accuracy", "psnr_db_unaware", "psnr_db_informed", "predicted_psnr_db",
     "tamper"),
    quiet=("tamper",),
)  # fmt: skip
#: A row for each image of the paper's comparison.
PAPER = Table(
    "paper.csv",
    ("network", "attack", "options", "image", "psnr_db", "ssim", "fit", "label_true",
     "label_inferred", "seconds", "images_together", "status", "reason"),
)  # fmt: skip

#: Columns that are text; all others are numbers.
TEXT = {
    "attack", "data", "defence", "kind", "model", "name", "reason", "scenario", "status",
    "strength", "exact", "client", "tamper", "signs", "arm", "notes",
}  # fmt: skip
#: Of columns whose name starts so, what can be true; of all others, the last.
RANGES: tuple[tuple[str, float, float], ...] = (
    ("round", 0, 1e9), ("seed", 0, 2**31), ("image", 0, 1e12), ("accuracy", 0, 1),
    ("identified", 0, 1), ("label_accuracy", 0, 1), ("psnr_db", -1e4, math.inf),
    ("psnr_fitted_db", -1e4, math.inf),
    ("predicted_psnr_db", -1e4, math.inf), ("ssim", -2, 2), ("label_", -1, 2**31),
    ("", -1e15, 1e15),
)  # fmt: skip
#: Of these only whole numbers.
WHOLE = ("round", "seed", "image", "label_true", "label_inferred")
