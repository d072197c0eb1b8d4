"""What the page advises: the defences that help, and the commands to run next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedleak.report.numbers import Figures
from fedleak.report.sources import Source, Study
from fedleak.report.words import NBSP, Judged, decibels, percent
from fedleak.untrusted import dig, finite

__all__ = ["next_commands", "what_helps"]


def what_helps(study: Study, judged: Sequence[Judged], source: Source) -> list[str]:
    """Say which defence gives what at which accuracy, or what to run to find out."""
    rated = [j for j in judged if j[1].images and not math.isnan(j[1].recognisable)]
    tried = [j for j in rated if not j[0].undefended]
    base = next((f for a, f in rated if a.undefended), None)
    if not tried or len(rated) < 2:
        return _what_to_run(study, source)
    said = []
    least = min(tried, key=lambda j: (j[1].recognisable, _low(j[1].median_db)))
    said.append(
        f"Of {len(tried)} defences tried, {least[0].label} leaves least: "
        f"{_result(least[1])}{_cost(least[1], base)}."
        if len(tried) > 1
        else f"One defence was tried, {least[0].label}. It leaves {_result(least[1])}"
        f"{_cost(least[1], base)}."
    )
    kept = [j for j in tried if base and base.accuracy - j[1].accuracy <= 0.02]
    if kept:
        free = min(kept, key=lambda j: (j[1].recognisable, _low(j[1].median_db)))
        if free[0] is not least[0]:
            said.append(
                f"Of those that cost at most 2 points of accuracy, {free[0].label} leaves least: "
                f"{_result(free[1])}{_cost(free[1], base)}."
            )
    elif base and len(tried) > 1:
        said.append("None of them costs less than 2 points of accuracy.")
    if least[1].recognisable > 0.05:
        said.append("No defence tried brings recognisable images down to 5 % or fewer: stronger "
                    "ones, larger batches or secure aggregation are the next to try.")  # fmt: skip
    if gap := _gap(tried):
        said.append(gap)
    if source.kind == "run" and not study.informed:
        said.append(
            "The server did not know of the defences here. One that does may recover far more; "
            "this table is no ground to choose by (set threat.defence = true)."
        )
    return said


def _low(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _result(found: Figures) -> str:
    said = f"{percent(found.recognisable)} of the images recognisable"
    if not math.isnan(found.median_db):
        said += f", median {decibels(found.median_db)}"
    return said


def _cost(found: Figures, base: Figures | None) -> str:
    if math.isnan(found.accuracy):
        return ""
    said = f", at an accuracy of {100 * found.accuracy:.1f}{NBSP}%"
    if base is None or math.isnan(base.accuracy):
        return said
    points = 100 * (base.accuracy - found.accuracy)
    less = f"{points:.1f} points less" if points >= 0.05 else "no less"
    return f"{said} ({less} than without a defence)"


def _gap(tried: Sequence[Judged]) -> str:
    gaps = [(f.median_db - f.unaware_db, a, f) for a, f in tried if math.isfinite(f.unaware_db)]
    gaps = [g for g in gaps if math.isfinite(g[0])]
    if not gaps:
        return ""
    gap, arm, found = max(gaps, key=lambda g: g[0])
    if gap < 3:
        return ""
    return (
        f"Beware of tests by an attacker who does not know the defence: {arm.label} looks like "
        f"{decibels(found.unaware_db)} to that one, and leaves {decibels(found.median_db)} to one "
        "who does."
    )


def _what_to_run(study: Study, source: Source) -> list[str]:
    if source.kind == "attack":
        return ["One folder of updates cannot say which defence would help. In a simulation of "
                "this federation, fedleak evaluate does."]  # fmt: skip
    said = []
    if not study.informed and not all(a.undefended for a in study.arms):
        said.append(
            "The server did not know of the defence here. One that does may recover far more: "
            "judge the defence by that one (threat.defence = true)."
        )
    return [
        *said,
        "No defences were compared here. To see what each would leave, and cost in accuracy, run "
        "the commands under “What to run next”.",
    ]


def next_commands(study: Study, source: Source, shape: tuple[int, ...] | None) -> list[str]:
    """Return commands that would answer what this folder leaves open."""
    if source.kind == "attack":
        return ["fedleak evaluate noise-pruning"]
    import shlex

    scenario = study.scenario
    name = str(dig(scenario, "name", default="demo"))
    found = []
    if source.kind == "run":
        found.append("fedleak evaluate noise-pruning --set scenario=scenario.toml")
        if len(study.arms) < 2:
            compare = 'compare=["noise:0.3","prune:0.9"]'
            found.append(shlex.join(
                ["fedleak", "simulate", "scenario.toml", "--set", compare, "--set",
                 "threat.defence=true", "--out", f"results/runs/{name}-defences"]))  # fmt: skip
    model = dig(scenario, "model", "name")
    if isinstance(model, str) and shape is not None and source.audit is None:
        batch = finite(dig(scenario, "training", "batch_size")) or 1
        words = ["fedleak", "audit", "--model", model, "--input-shape", ",".join(map(str, shape)),
                 "--batch-size", f"{batch:.0f}", "--target", "15"]  # fmt: skip
        found.append(f"{shlex.join(words)} --out DIR/audit")
    return found
