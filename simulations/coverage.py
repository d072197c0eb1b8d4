"""How much of each client's data set the server holds, round by round: scored with the truth.

Nothing flows back from here to the attack; its galleries are only read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fedleak.attacks import Dossier
from fedleak.plots import gallery
from fedleak.quality import decibels_between
from fedleak.results.format import GALLERY, plain
from simulations.partition import partitions, training_data
from simulations.scenario import Scenario

#: PSNR in dB that recovered images are counted from.
LEVELS = (20, 40, 60)


class Coverage:
    """Counts, of each client, the distinct images that were recovered by then.

    Parameters
    ----------
    scenario : Scenario
    """

    def __init__(self, scenario: Scenario):
        self.scenario = scenario
        self._used: dict[int, set[int]] = defaultdict(set)
        self._alone: dict[int, dict[int, float]] = defaultdict(dict)
        self._galleries: dict[int, tuple[Tensor, list[str]]] = {}

    def row(
        self, server_round: int, client: int, dossier: Dossier, rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return what the server holds of a client after a round, for ``coverage.csv``.

        Parameters
        ----------
        server_round, client : int
        dossier : Dossier
        rows : sequence of mapping
            What the round alone gave, one for each image that the client used.
        """
        alone = self._alone[client]
        for one in rows:
            self._used[client].add(one["image"])
            found = float(one.get("psnr_db", -math.inf))
            alone[one["image"]] = max(found, alone.get(one["image"], -math.inf))
        own = partitions(self.scenario)[client]
        held = dossier.gallery
        best: dict[int, float] = {}
        invented = 0
        captions = []
        if held:
            truth, _ = training_data(self.scenario).batch(own)
            made = torch.stack([h.image for h in held])
            scores, nearest = decibels_between(made, truth).max(1)
            for n, psnr in zip(nearest.tolist(), scores.tolist(), strict=True):
                invented += psnr < LEVELS[0]
                best[n] = max(psnr, best.get(n, -math.inf))
                captions.append("exact" if psnr > 90 else f"{psnr:.0f} dB")
            self._galleries[client] = made, captions
        known = [h.certainty_db for h in held if math.isfinite(h.certainty_db)]
        counts = {f"alone_{k}": sum(p >= k for p in alone.values()) for k in LEVELS}
        counts |= {f"together_{k}": sum(p >= k for p in best.values()) for k in LEVELS}
        return {
            "round": server_round, "client": client, "images": len(own),
            "used": len(self._used[client]), "held": len(held), **counts,
            "twice": len(held) - len(best), "invented": invented,
            "certainty_db": plain(median(known) if known else math.nan),
        }  # fmt: skip

    def draw(self, out: Path) -> None:
        """Draw what changed since the last call into ``gallery`` of a run's folder."""
        for client, (images, captions) in self._galleries.items():
            gallery(
                images, captions, out / GALLERY / f"client-{client:04d}.png",
                f"What the server holds of client {client} (simulated): {len(images)} images",
            )  # fmt: skip
        self._galleries.clear()
