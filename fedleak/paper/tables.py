"""The comparison as tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import t as student

from fedleak.paper.cells import AttackSpec
from fedleak.wording import CEILING_DB


def mean_and_width(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % confidence interval (Student's t).

    The width is NaN for one value, and both are for none.
    """
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return (float(x[0]) if len(x) else math.nan), math.nan
    width = float(student.ppf(0.975, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()), width


def cell_text(rows: pd.DataFrame, column: str, digits: int) -> str:
    """Return ``"25.5 ± 2.1 (10)"``; of none ``"failed"`` or ``""``.

    Fewer than three values get no interval: it would be wider than the scale.
    """
    if rows.empty:
        return ""
    ok = rows.loc[rows["status"] == "ok", column].astype(float)
    values = ok.clip(upper=CEILING_DB).dropna()
    if values.empty:
        return "failed"
    mean, width = mean_and_width(values.tolist())
    spread = "" if len(values) < 3 else f" ± {width:.{digits}f}"
    failed = "" if len(values) == len(rows) else f" of {len(rows)}"
    return f"{mean:.{digits}f}{spread} ({len(values)}{failed})"


def select(table: pd.DataFrame, network: str, spec: AttackSpec) -> pd.DataFrame:
    """Return the rows of one cell."""
    return table[
        (table["network"] == network)
        & (table["attack"] == spec.name)
        & (table["options"] == spec.text)
    ]


def markdown(
    table: pd.DataFrame,
    networks: Sequence[str],
    attacks: Sequence[AttackSpec],
    metric: Mapping[str, int | None],
    command: str,
) -> str:
    """Return ``paper.md``: PSNR and SSIM of every attack on every network, and what failed."""
    parts = [
        "# Attacks on the networks of the paper\n",
        "Simulated: undefended float32 gradients of one image each, labels not known to the "
        "attacker. Each cell: mean ± half the width of the 95 % confidence interval (Student's t) "
        "over images where there are at least three, and in brackets how many images. c(M) is the "
        "paper's security metric. Attacks with fewer images have seen the first ones. PSNR has "
        "peak 1; an exact reconstruction counts "
        f"as {CEILING_DB:.0f} dB.\n",
    ]
    parts.append("## PSNR in dB\n\n" + _grid(table, networks, attacks, metric, "psnr_db", 1))
    parts.append("## SSIM\n\n" + _grid(table, networks, attacks, metric, "ssim", 3))
    shared = _seen_by_all(table, networks, attacks)
    if set(shared) < set(table["image"]):
        part = table[table["image"].isin(shared)]
        listed = ", ".join(str(name) for name in shared)
        parts.append(
            f"## PSNR in dB on the images that every attack has seen\n\nThese are: {listed}.\n\n"
            + _grid(part, networks, attacks, metric, "psnr_db", 1)
        )
    failed = table[table["status"] != "ok"]
    if len(failed):
        parts.append("## Failed\n\n" + "\n".join(_failures(failed)) + "\n")
    parts.append(f"```sh\n{command}\n```\n")
    return "\n".join(parts)


def _grid(
    table: pd.DataFrame,
    networks: Sequence[str],
    attacks: Sequence[AttackSpec],
    metric: Mapping[str, int | None],
    column: str,
    digits: int,
) -> str:
    """Return one table: a row for each network, a column for each attack."""
    head = ["network", "c(M)", *(a.label for a in attacks)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for network in networks:
        cells = [cell_text(select(table, network, a), column, digits) for a in attacks]
        c = metric.get(network)
        lines.append("| " + " | ".join([network, "" if c is None else str(c), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _seen_by_all(
    table: pd.DataFrame, networks: Sequence[str], attacks: Sequence[AttackSpec]
) -> list[str]:
    """Return the images that lie in every cell, in order."""
    cells = [set(select(table, n, a)["image"]) for n in networks for a in attacks]
    return [name for name in dict.fromkeys(table["image"]) if all(name in c for c in cells)]


def _failures(failed: pd.DataFrame) -> list[str]:
    groups = failed.groupby(["network", "attack", "options", "reason"], sort=False)
    return [
        f"- {network}, {attack}{':' if options else ''}{options}, "
        f"{len(rows)} image{'s' if len(rows) > 1 else ''}: {reason}"
        for (network, attack, options, reason), rows in groups
    ]
