"""What a server gets that changes the model, what it costs, and who sees it: numbers and words."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedleak.report.numbers import figures
from fedleak.report.sources import Arm, Study
from fedleak.results.tampering import TamperFigures, tamper_figures
from fedleak.tampers import TAMPERS
from fedleak.wording import strength_words

#: A change of accuracy that is taken for none, as a share.
_NO_CHANGE = 0.005


@dataclass(frozen=True)
class TamperRow:
    """One line of the picture.

    Attributes
    ----------
    label : str
        The tamper, with the clients' defence where they have one.
    plain : str
        What it does, in a line; empty where that is not known.
    honest : bool
        Whether it is the server that changes nothing.
    figures : TamperFigures
        Of the honest server ``detected`` are false alarms.
    lost : float
        Accuracy lost beside the honest server, as a share; NaN where it is not known.
    """

    label: str
    plain: str
    honest: bool
    figures: TamperFigures
    lost: float

    @property
    def shown(self) -> tuple[tuple[str, float, str], ...]:
        """Of each bar: what it is, its length from 0 to 1, and its words."""
        f = self.figures
        return (
            ("images of a batch recovered", f.recovered, _of_batch(f)),
            ("models that a client suspects who looks", f.detected, _of_models(f)),
            ("accuracy lost", max(0.0, self.lost), _points(self.lost)),
        )


def tamper_rows(study: Study) -> list[TamperRow]:
    """Return the lines of a study's picture: the honest server, then each tamper."""
    return [*_honest(study.arms), *_tampered(study)] if study.tampered else []


def _honest(arms: Sequence[Arm]) -> Iterator[TamperRow]:
    for arm in arms:
        if len(arm.tampering) and arm.tamper == "none":
            figures_ = tamper_figures(arm.tampering.assign(tamper="none"))
            who = "an honest server" if arm.undefended else f"an honest server, {arm.label}"
            plain = "It sends the model that the training made."
            yield TamperRow(who, plain, True, figures_, 0.0)


def _tampered(study: Study) -> Iterator[TamperRow]:
    for arm in study.tampered:
        base = next((a for a in study.arms if _alike(a, arm)), None)
        lost = math.nan
        if base is not None:
            lost = figures(base).accuracy - figures(arm).accuracy
        label = arm.tamper if arm.undefended else f"{arm.tamper}, {arm.label}"
        yield TamperRow(label, _plain(arm.tamper), False, tamper_figures(arm.tampering), lost)


def _alike(one: Arm, other: Arm) -> bool:
    same = strength_words(one.strength) == strength_words(other.strength)
    return one.tamper == "none" and one.defence == other.defence and (same or one.undefended)


def _plain(tamper: str) -> str:
    """Return the first line of a tamper's documentation; of strangers' none is loaded."""
    name = tamper.partition(":")[0]
    ours = name in TAMPERS and TAMPERS.package_of(name) is None
    return (inspect.getdoc(TAMPERS[name]) or "").split("\n")[0] if ours else ""


def basis(rows: Sequence[TamperRow]) -> str:
    """Say from how many models all of this is known."""
    changed = sum(r.figures.sent for r in rows if not r.honest)
    honest = sum(r.figures.honest if not r.honest else r.figures.sent for r in rows)
    return f"Measured on {changed} changed models that clients were sent, and {honest} honest ones."


def sentences(rows: Sequence[TamperRow]) -> list[str]:
    """Say it in words: what the worst tamper gets, what it costs, and who sees it."""
    tried = [r for r in rows if not r.honest and not math.isnan(r.figures.recovered)]
    if not tried:
        return []
    worst = max(tried, key=lambda r: r.figures.recovered)
    honest = next((r for r in rows if r.honest), None)
    said = [f"A server that changes the model ({worst.label}) gets {_gets(worst.figures)}"]
    if honest is not None and not math.isnan(honest.figures.recovered):
        less = honest.figures.recovered < worst.figures.recovered
        own = _of_batch(honest.figures) if less else "no fewer, so that here it gains nothing by it"
        said[0] += f"; one that changes nothing gets {own}"
    said[0] += "."
    if math.isnan(worst.figures.detected):
        said.append("Whether its clients could have seen it is not known: none of them looked.")
    else:
        said.append(
            f"A client that looks at the model before it trains suspected "
            f"{_of_models(worst.figures)} of this kind{_least(tried, worst)}."
        )
        if alarms := _alarms(rows):
            said.append(alarms)
    if abs(worst.lost) <= _NO_CHANGE and worst.figures.restored > 0:
        said.append(
            "The training does not show it: the server puts in, for the clients it deceives, what "
            "they would have sent, computed on the images that it recovered."
        )
    elif abs(worst.lost) <= _NO_CHANGE:
        said.append("The training does not show it: the model becomes as good.")
    elif not math.isnan(worst.lost):
        said.append(f"It costs the training {_points(worst.lost)} of accuracy.")
    return said


def _least(tried: Sequence[TamperRow], worst: TamperRow) -> str:
    """Name the tamper that is seen least, where it is another one and gets anything."""
    known = [r for r in tried if r.figures.recovered > 0 and not math.isnan(r.figures.detected)]
    least = min(known, key=lambda r: r.figures.detected, default=worst)
    if least is worst or least.figures.detected >= worst.figures.detected:
        return ""
    seen = _of_models(least.figures)
    return f", but {seen} of {least.label}, which gets {_of_batch(least.figures)}"


def _alarms(rows: Sequence[TamperRow]) -> str:
    honest = [(r.figures.honest, r.figures.false_alarms) for r in rows if not r.honest]
    honest += [(r.figures.sent, r.figures.detected) for r in rows if r.honest]
    known = [(n, share) for n, share in honest if n and not math.isnan(share)]
    count = sum(n for n, _ in known)
    if not count:
        return ""
    alarms = round(sum(n * share for n, share in known))
    return f"Of {count} honest models that arrived it suspected {alarms or 'none'}."


def _gets(f: TamperFigures) -> str:
    proved = ""
    if f.certified > 0:
        sure = "all" if f.certified >= f.recovered else _images(f.certified, f)
        proved = f", and can prove {sure} of them right without having these"
    exact = "so exactly that nobody can tell them from the originals"
    return f"{_of_batch(f)} of a client {exact}{proved}"


def _of_batch(f: TamperFigures) -> str:
    if math.isnan(f.recovered):
        return "not attacked"
    return f"{_images(f.recovered, f)} of {f.batch:.0f} images"


def _images(share: float, f: TamperFigures) -> str:
    count = share * f.batch
    return f"{count:.0f}" if count == 0 or count > 9.95 or count == round(count) else f"{count:.1f}"


def _of_models(f: TamperFigures) -> str:
    """Say of how many models it was suspected: as many as were sent, no share of a hundred."""
    if math.isnan(f.detected):
        return "not looked for"
    return f"{f.detected * f.sent:.0f} of {f.sent} models"


def _points(share: float) -> str:
    if math.isnan(share):
        return "not known"
    points = 100 * share
    return f"{points:.1f} points" if points >= 0.05 else "none"
