"""What became of an image: the words of the ``status`` columns.

``ok``: reconstructed, the images explain the update, and it is what it was declared to be, as far
as it shows. ``doubtful``: reconstructed, but the images leave a tenth of the update or more
unexplained, the update shows something that the attack does not model, or a time limit cut the
search short; the ``reason`` says what. ``failed``: there is no image, and the ``reason`` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fedleak.wording import clean_reason

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["ok", "doubtful", "failed"]
STATUSES: tuple[Status, ...] = ("ok", "doubtful", "failed")


def status_of(reconstructed: bool, doubtful: bool) -> Status:
    """Return the status of what was attacked."""
    if not reconstructed:
        return "failed"
    return "doubtful" if doubtful else "ok"


def notes_text(notes: Sequence[str]) -> str:
    """Return notes as a table has them, each once."""
    return clean_reason("; ".join(dict.fromkeys(notes)))


def most_frequent_note(table: pd.DataFrame) -> str:
    """Return the notes that most rows have, and how many rows have any; empty where none has."""
    if "notes" not in table:
        return ""
    notes = table["notes"].dropna()
    notes = notes[notes != ""].value_counts()
    return f"{int(notes.sum())} images: {notes.index[0]}" if len(notes) else ""


def reconstructed(table: pd.DataFrame) -> pd.Series:
    """Return which rows of a table of images have one, doubtful or not."""
    return table["status"].isin(("ok", "doubtful"))


def most_frequent(table: pd.DataFrame, status: Status) -> str:
    """Return the reason that most rows of a status have; empty where there are none."""
    reasons = table.loc[table["status"] == status, "reason"].dropna().value_counts()
    return str(reasons.index[0]) if len(reasons) else ""
