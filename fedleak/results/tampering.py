"""What ``tampering.csv`` says of a run: what a changed model gave, and who noticed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class TamperFigures:
    """The sums of one run, or of several of one kind; NaN is unknown.

    Attributes
    ----------
    sent : int
        Times that a client was sent a changed model.
    batch : float
        Images behind an update, the median; unknown where none was attacked.
    recovered, certified : float
        Share of the images behind attacked updates of a changed model that came back at 60 dB,
        and that the attack itself could also prove.
    certified_wrong : int
        Images that it took for proved, and that are not at 60 dB.
    hit : float
        Share of these updates of which at least one image came back.
    restored : float
        Share of the times in which the server computed on what it had recovered what the client
        would have replied.
    detected : float
        Share of the times in which the client suspected something.
    honest : int
        Times that a client was sent the honest model, and none but that until then: what is held
        against a changed one looks changed itself.
    false_alarms : float
        Share of these in which it suspected something.
    """

    sent: int
    batch: float
    recovered: float
    certified: float
    certified_wrong: int
    hit: float
    restored: float
    detected: float
    honest: int
    false_alarms: float


def tamper_figures(table: pd.DataFrame) -> TamperFigures:
    """Sum up the rows of one or several ``tampering.csv``."""
    tampered = table["tamper"].fillna("") != ""
    sent, honest = table[tampered], table[~tampered & ~_deceived(table, tampered)]
    attacked = sent[sent["images"].fillna(0) > 0]
    images = float(attacked["images"].sum())

    def of_images(column: str) -> float:
        return float(attacked[column].sum()) / images if images else math.nan

    return TamperFigures(
        sent=len(sent),
        batch=float(attacked["images"].median()) if images else math.nan,
        recovered=of_images("recovered"),
        certified=of_images("certified"),
        certified_wrong=int(attacked["certified_wrong"].sum()),
        hit=float((attacked["recovered"] > 0).mean()) if images else math.nan,
        restored=float((sent["restored"].fillna(0) > 0).mean()) if len(sent) else math.nan,
        detected=_share(sent["suspected"]),
        honest=len(honest),
        false_alarms=_share(honest["suspected"]),
    )


def _deceived(table: pd.DataFrame, tampered: pd.Series) -> pd.Series:
    """Return of each row whether the client had been sent a changed model before."""
    keys = [table[c] for c in ("seed", "client") if c in table]
    first = table["round"].where(tampered).groupby(keys, dropna=False).transform("min")
    return table["round"] > first


def _share(suspected: pd.Series) -> float:
    known = suspected.dropna()
    return float(known.mean()) if len(known) else math.nan
