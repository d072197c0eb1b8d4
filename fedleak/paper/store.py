"""The folder of a comparison: finished cells are kept, and only those of the same settings."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from fedleak.errors import InvalidInputError
from fedleak.files import make_private, read_json, refuse_links, write_arrays, write_atomically
from fedleak.paper.cells import COLUMNS, Row, pictures_of

#: What a comparison writes; ``overwrite`` removes these and nothing else.
WRITTEN = ("paper.csv", "paper.json", "paper.md", "paper.png")
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
        self.folder, self.csv = folder, folder / "paper.csv"
        stored, pictures = folder / "paper.json", folder / "reconstructions"
        try:
            make_private(folder)
        except OSError as error:
            raise InvalidInputError(f"--out {str(folder)!r} cannot be used: {error}") from error
        refuse_links(folder)
        if not stored.is_file():
            if any(folder.iterdir()):
                raise InvalidInputError(
                    f"--out {str(folder)!r} is not empty and holds no comparison; use another"
                )
        elif overwrite:
            for name in WRITTEN:
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(pictures, ignore_errors=True)
        else:
            self._compare(stored, settings)
        pictures.mkdir(exist_ok=True)
        text = json.dumps({"settings": settings, **(record or {})}, indent=2)
        write_atomically(stored, (text + "\n").encode())

    def _compare(self, stored: Path, settings: dict[str, Any]) -> None:
        try:
            before = dict(read_json(stored)["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(
                f"{str(stored)!r} cannot be read ({error}); use another --out or --overwrite"
            ) from error
        other = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
        if other:
            listed = "; ".join(f"{k} {before.get(k)!r}, now {settings.get(k)!r}" for k in other)
            raise InvalidInputError(
                f"{str(self.folder)!r} was made with other settings ({listed}); "
                "use another --out, or --overwrite to start again"
            )

    def table(self) -> pd.DataFrame:
        """Return every finished row."""
        if not self.csv.is_file():
            return pd.DataFrame(columns=list(COLUMNS))
        kept = dict.fromkeys(_TEXT, str)
        return pd.read_csv(self.csv, dtype=kept, keep_default_na=False, na_values={
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
        whole = pd.DataFrame(rows, columns=list(COLUMNS))
        if self.csv.is_file():
            table = self.table()
            whole = pd.concat([table[~_cell(table, *cell)], whole])
        write_atomically(self.csv, whole.to_csv(index=False, na_rep="nan").encode())


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
