"""What numbers and defences are called: for tables, pictures and pages alike."""

from __future__ import annotations

import math
import re
from statistics import median
from typing import Any

#: PSNR in dB from which on images are recovered so well; limits of experience.
INDISTINGUISHABLE, RECOGNISABLE, BLURRED = 40.0, 20.0, 14.0
#: Above this one exact image counts as much as another, and scales are compressed.
ENOUGH_DB = 60.0
#: Exact reconstructions have an infinite PSNR; means are taken, and points drawn, here.
CEILING_DB = 160.0
#: ``fit`` below which images explain the update, and below which they explain a part of it.
EXPLAINED, PARTLY = 0.1, 0.5

#: Characters of a reason in a table, and of a message.
LONGEST_REASON, LONGEST_MESSAGE = 500, 4000

_TURNS = "\u200e\u200f\u202a-\u202e\u2066-\u2069"
#: Where an object lies in memory, in the words of Python: another in every run.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_UNFIT = re.compile(f"[\x00-\x1f\x7f-\x9f{_TURNS}\ud800-\udfff\ufffe\uffff]")


def grade(psnr_db: float) -> str:
    """Return what a PSNR in dB looks like, as the end of "a server can recover ..."."""
    if psnr_db >= INDISTINGUISHABLE:
        return "images that nobody can tell from the true ones"
    if psnr_db >= RECOGNISABLE:
        return "images in which people and objects can be recognised"
    if psnr_db >= BLURRED:
        return "blurred images: large shapes and colours"
    return "little more than the average image"


def fit_words(fit: float, doubtful: bool = False) -> str:
    """Return what a ``fit`` allows to say of images, with ``{}`` for their labels.

    A gradient that is half explained is that of many images; a grey one may be as near.
    """
    if fit < EXPLAINED:
        return "doubtful images of {}" if doubtful else "reconstructed images of {}"
    if fit < PARTLY:
        return "a rough guess at images of {}, which may show little of them"
    return "no images, what was found explains too little of the update; inferred {}"


def fit_text(fit: float | None) -> str:
    """Return a ``fit`` as people read it: ``0.31``, ``2e-7``, or a dash where there is none."""
    if fit is None or not math.isfinite(fit):
        return "–"
    if fit and abs(fit) < 0.001:
        digits, _, power = f"{fit:.0e}".partition("e")
        return f"{digits}e{int(power)}"
    return f"{fit:.2g}"


def defence_words(name: str, strength: object, none: str = "no defence") -> str:
    """Return ``"no defence"``, ``"noise 0.1"``, or ``"clip 1 + noise 0.1"``."""
    if name in ("none", ""):
        return none
    names, strengths = name.split("+"), str(strength).split("+")
    if len(names) != len(strengths):
        return f"{name} {strength}".strip()
    pairs = zip(names, strengths, strict=True)
    return " + ".join(f"{n} {strength_words(s)}".strip() for n, s in pairs)


def strength_words(strength: object) -> str:
    """Return a strength as people write it: ``0.1``, ``1+0.1``; 1 and 1.0 are the same."""
    try:
        return f"{float(str(strength)):g}"
    except ValueError:
        return str(strength)


def clean(text: object, most: int = 80) -> str:
    """Return a stranger's text for a label, a table or a terminal.

    Line breaks become blanks. Characters that steer a terminal, that no XML has, or that turn
    around what follows become a replacement character, and what is longer than ``most`` is cut.
    """
    # A stranger may send megabytes: what is cut off anyway is not looked at.
    kept = _UNFIT.sub("�", " ".join(str(text)[: 4 * most].split()))
    return kept if len(kept) <= most and len(str(text)) <= 4 * most else kept[: most - 1] + "…"


def clean_reason(text: object) -> str:
    """Return why something failed, for a table and for people: on one line, and no formula."""
    kept = clean(_ADDRESS.sub("", str(text)[: 4 * LONGEST_REASON]), LONGEST_REASON)
    return f"'{kept}" if kept[:1] in tuple("=+-@") else kept


def clean_lines(text: str, most: int = LONGEST_MESSAGE) -> str:
    """Return text of several lines without what steers a terminal, cut where it is too long."""
    lines = (_UNFIT.sub("�", line.replace("\t", " ")) for line in text[:most].split("\n"))
    return "\n".join(lines) + ("…" if len(text) > most else "")


def in_order(text: str) -> str:
    """Return text without characters that turn around what is written after it."""
    return re.sub(f"[{_TURNS}]", "�", text)


def json_ready(value: Any) -> Any:
    """Replace what JSON has no word for by null: an exact image has no finite PSNR.

    Parameters
    ----------
    value : object
        Dictionaries, lists and tuples are gone through.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: json_ready(v) for k, v in value.items()}
    return [json_ready(v) for v in value] if isinstance(value, list | tuple) else value


def more_rounds_words(leakage: Any, epsilon: float | None = None) -> str:
    """Say what more rounds of the same images buy, as predicted.

    Parameters
    ----------
    leakage : DataFrame
        As in ``leakage.csv``, of one run of a server with memory.
    epsilon : float, optional
        Of differential privacy, over the same rounds.

    Returns
    -------
    str
        Empty where no images were used twice.
    """
    first, last, bought, most = [], [], [], 1
    if "predicted_together_db" not in leakage:  # of an older version
        return ""
    for _, rows in leakage.groupby(["client", "image"]):
        rows = rows.sort_values("round")
        together = rows["predicted_together_db"].dropna().tolist()
        alone = rows["predicted_psnr_db"].dropna().tolist()
        if together and alone:
            first.append(alone[0])
            last.append(together[-1])
            bought.append(together[-1] - [alone[0], *together][-2])
            most = max(most, len(together) + 1)
    if not last:
        return ""
    private = "" if epsilon is None else f"; epsilon of differential privacy is {epsilon:.3g} then"
    return (
        f"predicted for the same images again: {median(first):.1f} dB after one round, "
        f"{median(last):.1f} dB after {most}, the last of which bought {median(bought):+.1f} dB"
        f"{private}"
    )


def coverage_words(coverage: Any) -> str:
    """Say in one sentence what a server with memory holds of the client that it knows most of.

    Parameters
    ----------
    coverage : DataFrame
        As in ``coverage.csv``, of one run.

    Returns
    -------
    str
        Empty where there is nothing to say.
    """
    counts = ["round", "images", "together_20", "together_60", "alone_20", "alone_60"]
    coverage = coverage.dropna(subset=counts)
    coverage = coverage[coverage["images"] > 0]
    if coverage.empty:
        return ""
    last = coverage.sort_values("round").groupby("client").tail(1)
    place = (last["together_20"] / last["images"]).idxmax()
    most = last.loc[place]
    # A row has one type: the name of a client is its column's.
    n, client = int(most["round"]), clean(str(last["client"][place]))
    return (
        f"after {n} round{'s' * (n > 1)} the server holds {int(most['together_20'])} of the "
        f"{int(most['images'])} images of client {client}, {int(most['together_60'])} of them "
        f"exact; from each round alone {int(most['alone_20'])} and {int(most['alone_60'])}"
    )
