"""The folder of a comparison: finished cells are kept, and only those of the same settings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from fedleak.files import write_arrays
from fedleak.paper.cells import Row, pictures_of
from fedleak.results.folder import Kind, claim
from fedleak.results.format import COMPARISON, PAPER, RECONSTRUCTIONS

KIND = Kind(
    "comparison", COMPARISON, (COMPARISON, PAPER.file, "paper.md", "paper.png", RECONSTRUCTIONS)
)
_TEXT = ("network", "attack", "options", "image", "label_inferred", "status", "reason")


class Store:
    """The csv, settings and reconstructions in one folder.

    Parameters
    ----------
    folder : Path
    settings : dict
        What every cell of the folder must have been made with; plain types.
    record : dict
        What is only written down, next to the settings.
    overwrite : bool
        Start again, where the folder holds an earlier comparison.

    Raises
    ------
    InvalidInputError
        If the folder cannot be used, holds something else, or was made with other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        record: dict[str, Any] | None = None,
        overwrite: bool = False,
    ):
        self.folder = folder
        claim(folder, KIND, settings, record, overwrite)
        (folder / RECONSTRUCTIONS).mkdir(exist_ok=True)

    def table(self) -> pd.DataFrame:
        """Return every finished row."""
        if not (self.folder / PAPER.file).is_file():
            return pd.DataFrame(columns=list(PAPER.columns))
        kept = dict.fromkeys(_TEXT, str)
        return pd.read_csv(self.folder / PAPER.file, dtype=kept, keep_default_na=False, na_values={
            "psnr_db": ["", "nan"], "ssim": ["", "nan"], "fit": ["", "nan"],
        })  # fmt: skip

    def has(self, network: str, attack: str, options: str, images: list[str]) -> bool:
        """Return whether a cell is there, with all its images."""
        table = self.table()
        return list(table.loc[_cell(table, network, attack, options), "image"]) == images

    def add(self, rows: list[Row], made: np.ndarray) -> None:
        """Write one finished cell: its pictures first, then its rows, in one go."""
        cell = tuple(str(rows[0][name]) for name in ("network", "attack", "options"))
        write_arrays(pictures_of(self.folder, *cell), made=made)
        table = self.table()
        others = table[~_cell(table, *cell)]
        made_now = pd.DataFrame(rows, columns=list(PAPER.columns))
        whole = pd.concat([others, made_now]) if len(others) else made_now
        PAPER.write(self.folder, whole, missing="nan")


def _cell(table: pd.DataFrame, network: str, attack: str, options: str) -> pd.Series:
    """Return which rows belong to one cell."""
    return (
        (table["network"] == network) & (table["attack"] == attack) & (table["options"] == options)
    )


def digest(images: Tensor | None) -> str | None:
    """Return a checksum of images, to tell whether two runs had the same."""
    if images is None:
        return None
    shape = "x".join(map(str, images.shape))
    return f"{shape} {hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]}"
