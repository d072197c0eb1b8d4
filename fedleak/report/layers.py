"""What each layer tells: of the run's own metric, and of an audit that lies beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedleak.metric.verdict import LIMITS
from fedleak.untrusted import dig, finite, rows
from fedleak.wording import grade


@dataclass(frozen=True, eq=False)
class Audited:
    """``audit.json`` in words and rows."""

    headline: str
    told: list[str]
    layers: list[dict[str, Any]]
    advice: list[dict[str, Any]]
    target: float | None
    about: list[tuple[str, str]]


def layers(metric: pd.DataFrame) -> list[dict[str, Any]]:
    """Return of each layer how much of its input the update determines, over the rounds."""
    found = []
    for name, own in metric.groupby("name", sort=False):
        unknowns, rank = own["unknowns"].dropna(), own["rank"].dropna()
        if not len(unknowns) or not len(rank):
            continue
        low, high, total = float(rank.min()), float(rank.max()), float(unknowns.max())
        found.append({
            "name": name, "kind": own["kind"].iloc[0], "unknowns": total,
            "rank": f"{low:.0f}" if low == high else f"{low:.0f}–{high:.0f}",
            "share": min(1.0, max(0.0, low / total)) if total > 0 else math.nan,
        })  # fmt: skip
    return found


def audited(found: dict[str, Any]) -> Audited:
    """Put ``audit.json`` into words; what is missing in it is left out."""
    psnr, prior = finite(found.get("predicted_psnr_db")), finite(found.get("prior_db"))
    defence = str(found.get("defence", "none"))
    under = "without a defence" if defence == "none" else f"under {defence}"
    model = str(found.get("model", "the model"))
    if psnr is None:
        headline = f"The audit of {model} {under} gives no prediction."
    else:
        headline = (
            f"From one update of {model} {under}, a server can be expected to recover "
            f"{grade(psnr)}: {psnr:.1f} dB."
        )
    told = [] if prior is None else [f"{prior:.1f} dB can be guessed without any update."]
    error = finite(found.get("error_db"))
    if error:
        told.append(f"The prediction is known to about {error:.1f} dB.")
    each = [_layer(x) for x in rows(dig(found, "attribution", "layers"))]
    if each:
        most = max(each, key=lambda x: (round(_low(x["withheld_db"]), 1), _low(x["alone_db"])))
        told.append(
            f"Layer {most['name']} tells most: without it {_number(most['withheld_db'])} dB less "
            "are recovered."
        )
    elif found.get("why_no_attribution"):
        told.append(f"No attribution to layers: {found['why_no_attribution']}.")
    target = finite(found.get("target_db"))
    advice = [
        {"what": str(a.get("what", "")), "db": finite(a.get("predicted_psnr_db")),
         "reached": a.get("reached") is True, "cost": str(a.get("cost", ""))}
        for a in rows(found.get("advice"))
    ]  # fmt: skip
    keys = ("model", "input_shape", "batch_size", "defence", "prior", "references", "seed")
    about = [(k.replace("_", " "), str(found[k])) for k in keys if k in found]
    return Audited(headline, [*told, LIMITS], each, advice, target, about)


def _layer(row: dict[str, Any]) -> dict[str, Any]:
    numbers = ("entries", "alone_db", "withheld_db", "pruned_db", "noised_db")
    return {"name": str(row.get("name", "?")), **{k: finite(row.get(k)) for k in numbers}}


def _low(value: float | None) -> float:
    return -math.inf if value is None else value


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
