"""The numbers of one defence that the report shows, from whichever tables there are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from fedleak.report.evidence import WithoutTruth, classes, evidence, without_truth
from fedleak.report.sources import Arm
from fedleak.status import most_frequent, most_frequent_note, reconstructed
from fedleak.wording import BLURRED, CEILING_DB, INDISTINGUISHABLE, RECOGNISABLE

#: Grades of an image, best recovered first, as the legend names them.
GRADES = (
    "nobody can tell it from the original",
    "recognisable",
    "blurred",
    "little more than the average image",
    "not recovered by this attack",
)


@dataclass(frozen=True, eq=False)
class Exposure:
    """How far one client was exposed.

    Attributes
    ----------
    client : str
    attacked, recognisable : int
        Images.
    best_db : float
    rounds : str
        In which an image was recognisable, or explained its update.
    unscored, explained : int
        Images that cannot be compared with true ones, and of these those that explain their
        update, which are taken for recovered.
    best_fit : float
        Of the former.
    """

    client: str
    attacked: int
    recognisable: int
    best_db: float
    rounds: str
    unscored: int = 0
    explained: int = 0
    best_fit: float = math.nan

    @property
    def known(self) -> bool:
        """Whether the number of recognisable images is known."""
        return not self.unscored


@dataclass(frozen=True, eq=False)
class Figures:
    """What the report says of one defence; NaN is unknown.

    Attributes
    ----------
    images : int
        Attacked.
    grades : tuple of int or None
        Images in each of :data:`GRADES`; None where single images are not on record.
    unscored : int
        Reconstructed, but the truth is not known.
    recognisable : float
        Share of the attacked images with at least 20 dB; unknown where some cannot be compared.
    evidence : WithoutTruth
        What is known of those that cannot.
    doubtful : int
        Reconstructed, but the update is not what was declared, or time ran out.
    doubt : str
        The most frequent reason.
    note : str
        The most frequent of what was not as declared and taken into account, and of how many.
    seen : int
        Images with at least 20 dB, of those that can be compared.
    median_db, best_db, unaware_db : float
        PSNR of the median and the best image; the median for an attacker who does not know
        the defence.
    predicted_db : float
    labels : float
        Share of images whose label was inferred rightly.
    accuracy : float
        After the last round, the mean over seeds.
    accuracy_range, median_range : (float, float)
        Lowest and highest of the seeds.
    seeds : int
    rounds : tuple of int
        Attacked ones.
    first_db, last_db : float
        Median in the first and the last attacked round.
    clients : tuple of Exposure
        Most exposed first.
    """

    images: int
    grades: tuple[int, ...] | None
    unscored: int
    recognisable: float
    median_db: float
    best_db: float
    unaware_db: float
    predicted_db: float
    labels: float
    accuracy: float
    accuracy_range: tuple[float, float]
    median_range: tuple[float, float]
    c_metric: float
    epsilon: float
    bytes_sent: float
    seeds: int
    rounds: tuple[int, ...]
    first_db: float
    last_db: float
    clients: tuple[Exposure, ...]
    reason: str
    evidence: WithoutTruth = field(default_factory=WithoutTruth)
    doubtful: int = 0
    doubt: str = ""
    note: str = ""
    seen: int = 0

    @property
    def recovered(self) -> int:
        """Images with at least 20 dB."""
        if self.grades is not None:
            return sum(self.grades[:2])
        share = self.recognisable
        return 0 if math.isnan(share) else round(share * self.images)

    @property
    def exposed(self) -> list[Exposure]:
        """Clients of whom an image is recognisable, or explains the update."""
        return [c for c in self.clients if c.recognisable or c.explained]


def figures(arm: Arm) -> Figures:
    """Judge one defence: from its images where they are on record, else from its table."""
    leakage, table = arm.leakage, arm.table
    ok = leakage[reconstructed(leakage)]
    scored = ok[ok["psnr_db"].notna()]
    known, wide = len(leakage) > 0, len(table) > 0
    images = len(leakage) if known else int(table["images"].fillna(0).sum())
    medians = scored.groupby("round")["psnr_db"].median()
    if wide:
        median_db = _mean(table["psnr_db_median_informed"])
        accuracy, between = _mean(table["accuracy"]), _range(table["accuracy"])
    else:
        median_db = _median(scored["psnr_db"])
        last = arm.rounds.dropna(subset="accuracy")
        accuracy = float(last["accuracy"].iloc[-1]) if len(last) else math.nan
        between = accuracy, accuracy
    unscored = len(ok) - len(scored)
    return Figures(
        images=images,
        grades=grades(leakage) if known and not unscored else None,
        unscored=unscored,
        recognisable=_share(scored, images, unscored) if known
        else _mean(table["identified_informed"]),
        median_db=median_db,
        best_db=_top(scored["psnr_db"] if known else table["psnr_db_worst_informed"]),
        unaware_db=_mean(table["psnr_db_median_unaware"]) if wide else math.nan,
        predicted_db=_mean(table["predicted_psnr_db"]) if wide
        else _median(leakage["predicted_psnr_db"]),
        labels=_labels(leakage) if known else _mean(table["label_accuracy_informed"]),
        accuracy=accuracy,
        accuracy_range=between,
        median_range=_range(table["psnr_db_median_informed"]) if wide else (median_db, median_db),
        c_metric=_median(table["c_metric"] if wide else arm.rounds["c_metric"]),
        epsilon=_mean(table["epsilon"]) if wide else math.nan,
        bytes_sent=_mean(table["bytes_sent"] if wide else arm.rounds["bytes_sent"]),
        seeds=max(1, table["seed"].nunique() if wide else 1),
        rounds=tuple(sorted({int(r) for r in leakage["round"].dropna()})) if known
        else tuple(sorted({int(r) for r in arm.per_round["round"].dropna()})),
        first_db=float(medians.iloc[0]) if len(medians) else math.nan,
        last_db=float(medians.iloc[-1]) if len(medians) else math.nan,
        clients=_clients(leakage),
        reason=_reason(leakage, table),
        evidence=evidence(leakage),
        doubtful=int((leakage["status"] == "doubtful").sum()),
        doubt=most_frequent(leakage, "doubtful"),
        note=most_frequent_note(leakage),
        seen=int((scored["psnr_db"] >= RECOGNISABLE).sum()),
    )  # fmt: skip


def grades(leakage: pd.DataFrame) -> tuple[int, ...]:
    """Count the images in each of :data:`GRADES`."""
    psnr = leakage["psnr_db"].where(reconstructed(leakage))
    edges = (INDISTINGUISHABLE, RECOGNISABLE, BLURRED, -math.inf)
    at_least = [int((psnr >= edge).sum()) for edge in edges]
    return (*np.diff([0, *at_least]).tolist(), len(leakage) - at_least[-1])


def _share(scored: pd.DataFrame, images: int, unknown: int) -> float:
    if not images or unknown:
        return math.nan
    return float((scored["psnr_db"] >= RECOGNISABLE).sum()) / images


def _labels(leakage: pd.DataFrame) -> float:
    """Return for how many of the images whose label is known it was inferred."""
    known = leakage[leakage["label_true"].notna()]
    right = reconstructed(known) & (known["label_true"] == known["label_inferred"])
    return float(right.sum()) / len(known) if len(known) else math.nan


def _clients(leakage: pd.DataFrame) -> tuple[Exposure, ...]:
    found = []
    for client, own in leakage.groupby("client", sort=False):
        psnr = own["psnr_db"].where(reconstructed(own))
        seen = own[psnr >= RECOGNISABLE]
        blind = without_truth(own)
        told = blind[classes(blind) < 2]
        made = int(reconstructed(blind).sum())
        fit = -_top(-blind["fit"].astype(float)) if made and "fit" in blind else math.nan
        rounds = sorted({int(r) for r in [*seen["round"], *told["round"]]})
        found.append(Exposure(str(client), len(own), len(seen), _top(psnr), ranges(rounds),
                              made, len(told), fit))  # fmt: skip
    return tuple(sorted(found, key=lambda e: (
        -e.recognisable - e.explained, -_or(e.best_db, -1.0), _or(e.best_fit, math.inf), e.client
    )))  # fmt: skip


def ranges(numbers: list[int]) -> str:
    """Return ``"1-3, 5"``, shortened where it is long."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    texts = [str(a) if a == b else f"{a}–{b}" for a, b in parts]
    return ", ".join(texts) if len(texts) <= 6 else ", ".join([*texts[:5], "…", texts[-1]])


def _reason(leakage: pd.DataFrame, table: pd.DataFrame) -> str:
    reasons = (
        leakage.loc[leakage["status"] == "failed", "reason"] if len(leakage) else table["reason"]
    )
    reasons = reasons[reasons.fillna("") != ""]
    return str(reasons.value_counts().index[0]) if len(reasons) else ""


def _or(value: float, other: float) -> float:
    return other if math.isnan(value) else value


def _top(values: pd.Series) -> float:
    values = values.dropna()
    return float(values.max()) if len(values) else math.nan


def _median(values: pd.Series) -> float:
    values = values.dropna()
    return float(values.median()) if len(values) else math.nan


def _mean(values: pd.Series) -> float:
    """Return the mean; exact images count as :data:`CEILING_DB`."""
    values = values.dropna().astype(float)
    if len(values) and np.isinf(values).all():
        return math.inf
    return float(values.mask(np.isposinf(values), CEILING_DB).mean()) if len(values) else math.nan


def _range(values: pd.Series) -> tuple[float, float]:
    values = values.dropna().astype(float).clip(upper=CEILING_DB)
    return (float(values.min()), float(values.max())) if len(values) else (math.nan, math.nan)
