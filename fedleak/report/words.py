"""The verdict in plain words, and what the page says beside its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedleak.defences import DefenceSpec
from fedleak.defences.accountant import epsilon
from fedleak.errors import FedleakError
from fedleak.report.numbers import Exposure, Figures
from fedleak.report.sources import Arm, Source, Study
from fedleak.untrusted import dig
from fedleak.wording import ENOUGH_DB, EXPLAINED, coverage_words, fit_text, grade, more_rounds_words

Judged = tuple[Arm, Figures]
#: Between a number and its unit.
NBSP = "\u00a0"

NO_PROOF = (
    "What this attack did not recover may still be recoverable: by another attack, by a server "
    "that knows more or sends a changed model, or from more rounds. This report is no proof of "
    "safety."
)
_TWICE = (
    "Every update was attacked twice: by one who knows the defence and its strength (informed), "
    "and by one who does not. The verdict is on the first."
)
GLOSSARY = (
    ("update", "what a client sends after training on its own images: a gradient, or weights"),
    ("round", "the server sends a model, clients train on it, and send their updates"),
    ("PSNR", "closeness of an image to the true one, in dB (peak 1): above 40 nobody sees a "
             "difference, from about 20 it is recognisable, below 14 little is left; an estimate "
             "for natural images, so look at the pictures"),
    ("fit", "the part of an update that the pictures leave unexplained: 0 nothing, 1 all; known "
            "without the true images, and so all that a real server knows of its success"),
    ("doubtful", "a picture was made, but it does not explain the update, the update shows "
                 "something that was not declared, or a time limit cut the search short"),
    ("SSIM", "likeness in structure: 1 is the same image, 0 is none"),
    ("informed", "an attacker who knows which defence the clients use, and how strong it is"),
    ("unaware", "one who takes a defended update for an undefended one"),
    ("predicted", "the PSNR that an update leaves open, computed without an attack; it takes a "
                  "server that knows the defence and what such images look like"),
    ("c(M)", "the security metric of Chen & Campbell (2022): 0 where every layer's linear system "
             "determines its input, negative where something is missing; knows no defences"),
    ("accuracy", "share of test images that the trained model classifies rightly"),
    ("epsilon", "the differential-privacy guarantee over all rounds; smaller is stronger"),
)  # fmt: skip


def decibels(value: float | None) -> str:
    """Return ``"21.3 dB"``, ``"exact"``, or a dash."""
    text = plain_decibels(value)
    return text if text in ("exact", "–") else f"{text}{NBSP}dB"


def plain_decibels(value: float | None) -> str:
    """The same without the unit, for a column that names it."""
    if value is None or math.isnan(value):
        return "–"
    return "exact" if math.isinf(value) else f"{value:.1f}"


def percent(share: float | None) -> str:
    """Return a share in per cent; never 0 % or 100 % of what is not."""
    if share is None or not math.isfinite(share):
        return "–"
    if 0 < share < 0.01:
        return f"<{NBSP}1{NBSP}%"
    return f">{NBSP}99{NBSP}%" if 0.99 < share < 1 else f"{100 * share:.0f}{NBSP}%"


def images(count: int) -> str:
    """Return ``"1 image"`` or ``"12 images"``."""
    return f"{count:,} image{'' if count == 1 else 's'}".replace(",", "\u202f")


def under(arm: Arm) -> str:
    """Return ``"Without a defence"`` or ``"Under noise 0.3"``."""
    if arm.undefended:
        return "Without a defence"
    return f"With {arm.label}" if arm.defence == "?" else f"Under {arm.label}"


def headline(arm: Arm, found: Figures, informed: bool = True) -> str:
    """Return the verdict on one defence, in one sentence.

    Parameters
    ----------
    arm : Arm
    found : Figures
    informed : bool
        Whether the attacker knew the defence, where there is one.
    """
    knows = informed or arm.undefended or arm.defence == "?"
    start = f"{under(arm)}, {'the server' if knows else 'a server that does not know of it'} "
    if not found.images:
        return f"{under(arm)}, no attack is on record: this folder says nothing about leakage."
    of_all = f"of {found.images} attacked image{'' if found.images == 1 else 's'}"
    if found.unscored:
        return _untold(start, arm, found)
    if found.grades is None:
        if math.isnan(found.recognisable):
            return (
                f"{start}attacked {images(found.images)}; how many it recovered is not on record."
            )
        count = found.recovered
        how = f"all {count} attacked images" if count == found.images > 1 else f"{count} {of_all}"
        return f"{start}recovered {how} well enough to be recognised."
    same, seen, blurred, faint, _ = found.grades
    if same + seen:
        count = same + seen
        how = f"all {count} attacked images" if count == found.images > 1 else f"{count} {of_all}"
        if same == count:
            return f"{start}recovered {how} so well that nobody can tell them from the originals."
        more = f"; {same} of them nobody can tell from the originals" if same else ""
        return f"{start}recovered {how} well enough to be recognised{more}."
    if blurred:
        return f"{start}recovered blurred versions of {blurred} {of_all}; none is recognisable."
    if faint:
        return f"{start}got little more than an average image, {faint} {of_all} this way."
    return f"{start}recovered none {of_all}. With this attack: that is no proof of safety."


def _untold(start: str, arm: Arm, found: Figures) -> str:
    """Return the verdict where true images are missing: by what the updates say themselves."""
    told, total = found.evidence, found.evidence.total
    beside = ""
    if scored := found.images - total:
        seen = f"{found.seen} of {scored} images that can be compared with the true ones"
        beside = f"{start}recovered {seen} well enough to be recognised. "
        start = "Of the others, it "
    rest = total - told.explained
    if told.explained:
        how = f"all {total} attacked images" if not rest and total > 1 else (
            f"{told.explained} of {total} attacked image{'' if total == 1 else 's'}"
        )  # fmt: skip
        how_far = "almost all that" if told.counts[1] else "exactly what"
        said = (
            f"{beside}{start}reconstructed {how}, as far as can be told without the true ones: "
            f"its pictures explain {how_far} the clients sent."
        )
        return f"{said} Of the other {rest}, it is not known what it learned." if rest else said
    doubtful = told.counts[2] == total - told.counts[4]
    why = "the pictures that it made are doubtful" if doubtful else (
        f"the updates, defended by {told.noise}, do not prove the pictures that it made"
        if told.noise
        else "the pictures that it made explain too little of the updates"
    )  # fmt: skip
    where = under(arm) if not beside else f"{beside}Of the others"
    return (
        f"{where}, it is not known what the server learned of {images(total)}: there are no true "
        f"ones to compare with, and {why}. That is no all-clear."
    )


def _evidence(found: Figures) -> list[tuple[str, str]]:
    """Say what is known, and what is not, of images that no true ones can be compared with."""
    told = found.evidence
    said: list[tuple[str, str]] = []
    if not told.total:
        return said
    how = "There are no true images here, as for any real server, so no closeness (PSNR) is given."
    if not math.isnan(told.fit_median):
        how += (
            f" Instead, fit: the part of an update that the pictures leave unexplained, in the "
            f"median {fit_text(told.fit_median)} (best {fit_text(told.fit_best)}, worst "
            f"{fit_text(told.fit_worst)}; 0: nothing, 1: all)."
        )
    if told.explained:
        how += (
            " A small fit is strong evidence: take these pictures for the clients' images."
            if told.explained == told.total
            else f" Where it is below {EXPLAINED:g}, take the pictures for the clients' images."
        )
    if told.certified:
        how += f" {images(told.certified)} passed the attack's own proof."
    said.append(("How it is known", how))
    unknown = []
    if told.explained:
        unknown.append(
            "Whether other pictures would lead to the same updates: rarely, where a network is "
            "large and clients send all of it. If people or things can be seen, they were there."
        )
    if told.noise:
        unknown.append(
            f"How much {told.noise} hid: with it, a small fit proves nothing, as other pictures "
            "fit as well."
        )
    if told.counts[3] and not told.noise:
        unknown.append(
            f"Whether {images(told.counts[3])} resemble the true ones: a fit of {EXPLAINED:g} or "
            "more is that of a rough guess or of none, a wrong declaration (learning rate, number "
            "of images, a defence) or a search that failed. Another attack may recover them."
        )
    if unknown:
        said.append(("What is not known", " ".join(unknown)))
    return said


def _could(arm: Arm, found: Figures) -> str:
    """Say what the prediction leaves open beyond what the attack attained; empty if little."""
    known = [
        0.0 if math.isnan(x) else min(x, ENOUGH_DB) for x in (found.predicted_db, found.median_db)
    ]
    if known[0] < known[1] + 3:
        return ""
    knows = "" if arm.undefended else "the defence and "
    return (
        f"The updates leave open {decibels(found.predicted_db)} in the median "
        f"({grade(found.predicted_db)}): so much is predicted for an attacker who knows {knows}"
        "what such images look like."
    )


def details(arm: Arm, found: Figures) -> list[tuple[str, str]]:
    """Say how recognisable, from whom, and when, as (question, answer)."""
    said = []
    if not math.isnan(found.median_db):
        how = (
            f"PSNR of the median image {decibels(found.median_db)}: {grade(found.median_db)}. "
            f"Best image: {decibels(found.best_db)}."
        )
        if not math.isnan(found.labels):
            how += f" The label, what an image shows, was inferred for {percent(found.labels)}."
        said.append(("How recognisable", how))
    said += _evidence(found)
    if found.doubtful:
        said.append(("Doubtful", f"{images(found.doubtful)}; most often: {found.doubt or '–'}"))
    if found.note:
        said.append(("Seen, and taken into account", found.note))
    if found.clients:
        said.append(("From whom", _who(found)))
    if len(found.rounds) > 1 and not math.isnan(found.first_db):
        said.append(("When", _when(found)))
    elif len(found.rounds) == 1:
        said.append(("When", f"One round was attacked: round {found.rounds[0]}."))
    if held := coverage_words(arm.coverage):
        more = more_rounds_words(arm.leakage, _epsilon(arm)) if len(arm.coverage) else ""
        more = f" {more[0].upper()}{more[1:]}." if more else ""
        said.append(("All rounds together", f"{held[0].upper()}{held[1:]}.{more}"))
    if could := _could(arm, found):
        said.append(("What more could be", could))
    failed = found.grades[-1] if found.grades else found.evidence.counts[-1]
    if found.reason and failed:
        said.append(
            ("Not recovered", f"{images(failed)}; the most frequent reason: {found.reason}")
        )
    return said


def _epsilon(arm: Arm) -> float | None:
    """Return epsilon over all rounds that the server saw; None without differential privacy."""
    try:
        return epsilon(DefenceSpec(arm.defence, arm.strength), int(arm.coverage["round"].max()))
    except (FedleakError, ValueError):  # a defence of strangers
        return None


def _who(found: Figures) -> str:
    exposed: Sequence[Exposure] = found.exposed
    total = len(found.clients)
    if found.evidence.total:
        return _whose(found)
    if not exposed:
        who = "the one attacked client" if total == 1 else f"all {total} attacked clients"
        return f"Of {who} no image was recognisable."
    if len(exposed) == total:
        most, least = exposed[0].recognisable, exposed[-1].recognisable
        each = images(most) if most == least else f"{least} to {images(most)}"
        if total == 1:
            return f"The one attacked client, with {each}."
        return f"All {total} attacked clients, with {each} each."
    first = ", ".join(f"client {c.client} ({c.recognisable})" for c in exposed[:3])
    return f"{len(exposed)} of {total} attacked clients; most of all {first}."


def _whose(found: Figures) -> str:
    """Say it where the true images are not known, and with them not who was spared."""
    total, exposed = len(found.clients), found.exposed
    if not exposed:
        return f"It is not known for any of the {total} attacked clients." if total > 1 else (
            "Not known."
        )  # fmt: skip
    again = ""
    if (n := len(found.rounds)) > 1:
        again = f" Over {n} rounds: an image that a client uses in several counts in each."
    counts = [c.recognisable + c.explained for c in exposed]
    if len(exposed) == total:
        least, most = min(counts), max(counts)
        each = images(most) if most == least else f"{least} to {images(most)}"
        if total == 1:
            return f"The one attacked client, with {each}.{again}"
        return f"All {total} attacked clients, with {each} each.{again}"
    first = ", ".join(f"client {c.client} ({n})" for c, n in zip(exposed[:3], counts, strict=False))
    return (
        f"At least {len(exposed)} of {total} attacked clients, most of all {first}. Of the others "
        f"it is not known.{again}"
    )


def _when(found: Figures) -> str:
    first, last = found.rounds[0], found.rounds[-1]
    capped = [min(x, ENOUGH_DB) for x in (found.first_db, found.last_db)]
    change = capped[1] - capped[0]
    trend = "stays about as high" if abs(change) < 2 else ("grows" if change > 0 else "falls")
    return (
        f"{len(found.rounds)} rounds were attacked, from {first} to {last}. The leakage {trend}: "
        f"{decibels(found.first_db)} in the median of round {first}, {decibels(found.last_db)} in "
        f"round {last}."
    )


def threat(study: Study, source: Source) -> list[str]:
    """Say what the server was assumed to know, see and do."""
    if source.kind == "attack":
        return ["The server kept the updates that it received, and attacked them later; what it "
                "is assumed to know of the training stands in the capture."]  # fmt: skip
    told = dig(study.scenario, "threat")
    if not isinstance(told, dict):
        said = ["The folder does not say what the server was assumed to know (no threat model "
                "in run.json)."]  # fmt: skip
        return [*said, _TWICE] if source.kind == "evaluation" else said
    summed = told.get("view") == "sum"
    said = [
        "It sees only the sum of all clients' updates, as under secure aggregation."
        if summed
        else "It sees the update of every single client, and the model that it sent."
    ]
    what = {
        "labels": "the labels of the images",
        "batch_size": "how many images are behind an update",
        "learning_rate": "the learning rate",
        "local_steps": "how long clients train",
        "public_images": "public images of the same kind",
        "buffers": "batch-normalisation statistics",
    }
    known = [text for key, text in what.items() if told.get(key) is True]
    unknown = [text for key, text in what.items() if told.get(key) is False]
    said.append(f"It may know: {', '.join(known) or 'nothing else'}.")
    said.append(f"It does not know: {', '.join(unknown) or 'nothing of this list is withheld'}.")
    if source.kind == "evaluation":
        said.append(_TWICE)
    elif not all(a.undefended for a in study.arms):
        said.append(
            "It knows the defence and its strength."
            if study.informed
            else "It does not know of the defence. A defence that is judged this way looks better "
            "than it is: repeat with threat.defence = true."
        )
    said.append(
        "It may change the model that it sends."
        if told.get("tamper") is True
        else "It is honest but curious: it changes nothing, and nobody notices."
    )
    return said


def threat_in_short(study: Study, source: Source) -> str:
    """Return the threat model in one sentence; empty where it is not known."""
    told = dig(study.scenario, "threat")
    if not isinstance(told, dict):
        return ""
    sees = "sees only the sum over clients" if told.get("view") == "sum" else (
        "sees the update of each client"
    )  # fmt: skip
    knows = "knows the defence, " if study.informed else "does not know of the defence, "
    if all(a.undefended for a in study.arms):
        knows = ""
    does = "may change the model it sends" if told.get("tamper") is True else (
        "changes nothing (honest but curious)"
    )  # fmt: skip
    return f"A server that {sees}, {knows}and {does}."


def label_of(source: Source, judged: Sequence[Judged]) -> str:
    """Return what is to be known of the numbers: simulated, and of how many seeds."""
    simulated = True if source.kind == "evaluation" else source.simulated
    known = "Simulated clients" if simulated else "Real updates"
    kind = "Not known whether simulated" if simulated is None else known
    if source.kind == "attack":
        return kind
    seeds = max((f.seeds for _, f in judged), default=1)
    return f"{kind} · {'one seed' if seeds == 1 else f'mean of {seeds} seeds'}"


def status_note(source: Source) -> str:
    """Return what is to be said of a run that did not finish."""
    status: Any = source.about.get("status")
    if status in (None, "finished"):
        return ""
    reason = str(source.about.get("reason") or "")
    said = {
        "running": "This run had not finished when the report was made (or it was killed)",
        "interrupted": "This run was interrupted",
        "failed": "This run failed",
    }.get(str(status), f"This run has the status {status}")
    return f"{said}{': ' + reason if reason else ''}. What was attacked until then is reported."
