"""What is known of images whose truth is not: what the update itself says of them.

Who attacks a real capture has no true images. What is left is whether the pictures explain the
update (``fit``, a certificate), and an unknown closeness is never counted as none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from fedleak.status import reconstructed
from fedleak.wording import EXPLAINED

#: What the update says of an image, most telling first, as the legend names it.
EVIDENCE = (
    "its update follows from the pictures entirely",
    "its update follows from the pictures, but for a little",
    "doubtful: the update is not as declared, or time ran out",
    "not known: the pictures explain too little",
    "no picture was made",
)
#: ``fit`` below which nothing of the update is left but rounding, of local training too.
ENTIRELY = 1e-3
#: Defences that leave all that an update says: with others, much else fits as well.
_WHOLE = {"", "none", "clip"}


@dataclass(frozen=True)
class WithoutTruth:
    """What is known of the images of one attack that cannot be compared with true ones.

    Attributes
    ----------
    counts : tuple of int
        Images in each of :data:`EVIDENCE`; all 0 where every image can be compared.
    fit_median, fit_best, fit_worst : float
        Part of an update that the pictures leave unexplained; NaN where there are none.
    certified : int
        Images that the attack's own test proved.
    noise : str
        A defence that the attack allowed for, with which ``fit`` says little; else empty.
    """

    counts: tuple[int, ...] = (0,) * len(EVIDENCE)
    fit_median: float = math.nan
    fit_best: float = math.nan
    fit_worst: float = math.nan
    certified: int = 0
    noise: str = ""

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def explained(self) -> int:
        """Images that are taken for recovered, as far as updates tell."""
        return sum(self.counts[:2])


def evidence(leakage: pd.DataFrame) -> WithoutTruth:
    """Weigh the images that cannot be compared; none where all can be."""
    rows = without_truth(leakage)
    made = rows[reconstructed(rows)]
    if made.empty:
        return WithoutTruth()
    which = classes(rows)
    fit = _numbers(made, "fit").dropna()
    noisy = made.loc[_noisy(made), "defence"] if "defence" in made else pd.Series(dtype=object)
    return WithoutTruth(
        counts=tuple(int((which == n).sum()) for n in range(len(EVIDENCE))),
        fit_median=float(fit.median()) if len(fit) else math.nan,
        fit_best=float(fit.min()) if len(fit) else math.nan,
        fit_worst=float(fit.max()) if len(fit) else math.nan,
        certified=int(((_numbers(made, "certified") == 1) & ~_noisy(made)).sum()),
        noise=str(noisy.iloc[0]) if len(noisy) else "",
    )


def without_truth(leakage: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that were not compared with a truth, failures without one among them."""
    truth = leakage["label_true"].notna() | leakage["psnr_db"].notna()
    return leakage[leakage["psnr_db"].isna() & (reconstructed(leakage) | ~truth)]


def classes(rows: pd.DataFrame) -> pd.Series:
    """Return of each row its place in :data:`EVIDENCE`."""
    fit = _numbers(rows, "fit")
    found = pd.Series(3, index=rows.index)
    found[fit < EXPLAINED] = 1
    found[(fit < ENTIRELY) | (_numbers(rows, "certified") == 1)] = 0
    found[_noisy(rows)] = 3
    # Where much is left unexplained, that is the doubt, or comes of it.
    found[(rows["status"] == "doubtful") & ~(fit >= EXPLAINED)] = 2
    found[~reconstructed(rows)] = 4
    return found


def _noisy(rows: pd.DataFrame) -> pd.Series:
    """Return where a defence took so much that other pictures may fit as well."""
    if "defence" not in rows:
        return pd.Series(False, index=rows.index)

    def noisy(defence: object) -> bool:
        names = {part.partition(":")[0].strip() for part in str(defence).split("+")}
        return not names <= _WHOLE

    return rows["defence"].fillna("").map(noisy).astype(bool)


def _numbers(rows: pd.DataFrame, name: str) -> pd.Series:
    return rows[name].astype(float) if name in rows else pd.Series(math.nan, index=rows.index)
