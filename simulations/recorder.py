"""Everything a run leaves behind, written as it happens.

The recorder owns the truth: it alone knows which images a client used, and scores what
the attack made of them. Nothing flows back from here to the attack.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from fedleak.attacks import Reconstruction
from fedleak.capture import CaptureWriter, Update
from fedleak.capture.truth import write_truth
from fedleak.errors import InvalidInputError
from fedleak.files import flush, make_private, read_json, write_atomically
from fedleak.lock import is_empty
from fedleak.metric import SecurityMetric
from fedleak.provenance import commit, now, package_versions
from fedleak.quality import score_batch
from fedleak.results.folder import clear
from fedleak.results.format import (
    CAPTURES,
    COVERAGE,
    GALLERY,
    LEAKAGE,
    METRIC,
    RECONSTRUCTIONS,
    ROUNDS,
    RUN,
    TAMPERING,
    Table,
    plain,
)
from fedleak.results.pictures import Key, Picture, write_round
from fedleak.status import notes_text
from fedleak.stopping import Terminated
from fedleak.strategies import Leak
from simulations.coverage import Coverage
from simulations.partition import client_images, training_data
from simulations.prediction import UpdatePrediction
from simulations.scenario import Scenario
from simulations.tampering import TamperBook, wanted

#: Errors of a disk, or an allowance on it, that is full.
FULL = (errno.ENOSPC, errno.EDQUOT)
#: What a run writes; ``overwrite`` removes these and nothing else.
OUTPUTS = (
    LEAKAGE.file, ROUNDS.file, METRIC.file, TAMPERING.file, COVERAGE.file, RUN,
    "leakage_vs_rounds.png", "coverage_vs_rounds.png", "reconstructions.png", RECONSTRUCTIONS,
    CAPTURES, GALLERY, "tensorboard", "mlruns",
)  # fmt: skip


@dataclass(frozen=True)
class RoundScores:
    """What one round leaked; NaN where nothing was reconstructed or predicted.

    Attributes
    ----------
    images, reconstructed : int
        Attacked, and of these without failure.
    psnr_db_median, psnr_db_best, ssim_median : float
        Of the images that were reconstructed; an exact one has an infinite PSNR.
    labels_right : float
        Share of these whose label was inferred rightly.
    predicted_psnr_db : float
        Median of the metric's predictions.
    """

    images: int
    reconstructed: int
    psnr_db_median: float
    psnr_db_best: float
    ssim_median: float
    labels_right: float
    predicted_psnr_db: float


def prepare_folder(out: Path, overwrite: bool = False) -> None:
    """Make an empty output folder.

    Raises
    ------
    InvalidInputError
        If it holds anything and ``overwrite`` is not set, or is no folder.
    """
    try:
        if not is_empty(out):
            _clear(out, overwrite)
        make_private(out)
        probe = out / "run.json.new"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InvalidInputError(
            f"output folder {str(out)!r} cannot be used ({error}); choose another with --out"
        ) from error


def _clear(out: Path, overwrite: bool) -> None:
    if not overwrite:
        raise InvalidInputError(
            f"output folder {str(out)!r} is not empty; choose another with --out, or replace "
            "the earlier run with --overwrite"
        )
    try:
        about = read_json(out / RUN)
        arms = [str(a) for a in about["arms"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"output folder {str(out)!r} holds no earlier run (no run.json of fedleak), so "
            "--overwrite leaves it alone; choose another with --out"
        ) from error
    for folder in [out, *(out / Path(arm).name for arm in arms)]:
        clear(folder, OUTPUTS)


def about_run(scenario: Scenario, engine: str, arms: Sequence[str] = ()) -> dict[str, Any]:
    """Return what ``run.json`` says of a run that starts now, and of the arms in it."""
    return {
        "status": "running",
        "reason": "",
        "simulated": True,
        "engine": engine,
        "started": now(),
        "finished": None,
        "seed": scenario.seed,
        "arms": list(arms),
        "scenario": scenario.model_dump(mode="json"),
        "versions": package_versions(),
        "commit": commit(),
    }


def write_about(out: Path, about: Mapping[str, Any]) -> None:
    """Write ``run.json``; in the place of the old one where the disk is full."""
    text, file = (json.dumps(about, indent=2) + "\n").encode(), out / RUN
    try:
        write_atomically(file, text, durable=True)
    except OSError as error:
        if error.errno not in FULL or not file.is_file():
            raise
        with file.open("r+b") as old:
            old.write(text)
            old.truncate()


class Recorder:
    """Writes one run's tables and reconstructions.

    Parameters
    ----------
    out : Path
        An empty folder.
    scenario : Scenario
    engine : str
        Named in ``run.json``.
    """

    def __init__(self, out: Path, scenario: Scenario, engine: str):
        self.out, self.scenario = out, scenario
        self.partitions: Mapping[int, int] = {}
        self._scored: list[tuple[float, float, bool]] = []  # PSNR, SSIM, label right
        self._images = 0
        self.predict: UpdatePrediction | None = None
        self._predicted: list[float] = []
        self.book: TamperBook | None = None
        self._attack_seconds = 0.0
        self.coverage = Coverage(scenario)
        self._pictures: list[tuple[Key, Picture]] = []
        self._about = about_run(scenario, engine)
        make_private(out)
        write_about(self.out, self._about)
        for table in (LEAKAGE, ROUNDS, METRIC, *self._others()):
            table.start(out)

    def _others(self) -> list[Table]:
        """Return the tables that only some scenarios have."""
        scenario = self.scenario
        return [TAMPERING] * wanted(scenario) + [COVERAGE] * scenario.attack.memory

    def labels_of(self, server_round: int, node: int) -> list[int]:
        """Return a client's labels, for a server whose threat model grants them."""
        used = client_images(self.scenario, self.partitions[node], server_round)
        return training_data(self.scenario).batch(used)[1].tolist()

    def leak(self, leak: Leak) -> None:
        """Score a leak against the images that its clients used, and write a row for each."""
        self._attack_seconds += leak.seconds
        clients = [self.partitions.get(node, node) for node in leak.nodes]
        try:
            rows = self._score(leak, clients)
        except Exception as error:  # an image that cannot be read, a client that is not ours
            reason = f"{leak.reason or 'not scored'}: {type(error).__name__}: {error}"
            rows = [{"client": c, "status": "failed", "reason": reason} for c in clients]
        scenario, defence = self.scenario, self.scenario.defence
        book = self.book
        same = {
            "round": leak.server_round,
            "attack": scenario.attack.name if book is None else book.attack_on(leak.nodes),
            "defence": defence.name,
            "strength": defence.strength,
            "seconds": f"{leak.seconds:.4f}",
        }
        self._images += len(rows)
        if book is not None:
            book.score(rows)
        for row in rows:
            LEAKAGE.append(self.out, {**same, **row})
        if leak.dossier is not None and len(clients) == 1:
            held = self.coverage.row(leak.server_round, clients[0], leak.dossier, rows)
            COVERAGE.append(self.out, held)

    def _score(self, leak: Leak, clients: list[int]) -> list[dict[str, Any]]:
        """Return what is known of each image, by column.

        The images of a batch, or of all clients in a sum, come back in any order.
        """
        used, truth, labels = self.truth(clients, leak.server_round)
        made = leak.reconstruction
        images, found = (None, None) if made is None else (made.images, made.labels)
        predicted = added_up = [math.nan] * len(used)
        if leak.received and self.predict is not None:
            # The attack is over: only the score is told what the truth has to do with it.
            predicted = self.predict(leak.server_round, clients, truth, labels)
            added_up = self.predict.together
        self._predicted += [p for p in predicted if not math.isnan(p)]
        rows: list[dict[str, Any]] = []
        about = {} if made is None else {"fit": made.fit, "notes": notes_text(made.notes)}
        scored = score_batch(images, found, truth, labels)
        remembered = _remembered(leak, truth, labels)
        for n, ((client, image), true, one, psnr) in enumerate(
            zip(used, truth, scored, predicted, strict=True)
        ):
            row = {
                "psnr_together_db": plain(remembered[n]),
                "predicted_together_db": plain(added_up[n]),
                "client": client,
                "image": image,
                "predicted_psnr_db": plain(psnr),
                "label_true": one.label,
            }
            if one.image is None or one.quality is None:
                reason = leak.reason or "not reconstructed"
                rows.append({**row, "status": "failed", "reason": reason})
                continue
            rows.append({**row, **asdict(one.quality), "label_inferred": one.label_inferred,
                         "status": leak.status, "reason": leak.reason,
                         "certified": _certified(made, one.place), **about})  # fmt: skip
            right = one.label_inferred == one.label
            self._scored.append((one.quality.psnr_db, one.quality.ssim, right))
            made_of_it = one.image.float().numpy()
            picture = Picture(true.numpy(), made_of_it, one.quality.psnr_db)
            self._pictures.append(((client, image), picture))
        return rows

    def truth(
        self, clients: Sequence[int], server_round: int
    ) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
        """Return (client, image) of all that clients used in a round, the images, the labels."""
        used = [
            (client, i)
            for client in clients
            for i in client_images(self.scenario, client, server_round)
        ]
        images, labels = training_data(self.scenario).batch([i for _, i in used])
        return used, images, labels

    def round(
        self,
        number: int,
        row: Mapping[str, Any],
        metric: SecurityMetric | None = None,
        asked: Iterable[int] = (),
    ) -> RoundScores:
        """Write the reconstructions of one round, the metric of each layer, and its row."""
        self._write_pictures(number)
        for layer in metric.layers if metric else ():
            METRIC.append(self.out, {**vars(layer), "round": number})
        values = {
            **row,
            "round": number,
            "c_metric": metric.c if metric else math.nan,
            "c_normalised": metric.c_normalised if metric else math.nan,
            "predicted_psnr_db": median(self._predicted) if self._predicted else math.nan,
            "cramer_rao_db": math.nan if self.predict is None else self.predict.bound(number),
            "seconds_attack": f"{self._attack_seconds:.4f}",
        }
        if self.book is not None:
            for line in self.book.rows(number, self.partitions, asked):
                TAMPERING.append(self.out, line)
            flush(self.out / TAMPERING.file)
        # Last, and on the disk: a round that has its row has all the rest of it.
        for table in (LEAKAGE, METRIC):
            flush(self.out / table.file)
        ROUNDS.append(self.out, {c: plain(values[c]) for c in ROUNDS.columns})
        flush(self.out / ROUNDS.file)
        scores = self._scores()
        self._attack_seconds, self._predicted = 0.0, []
        self._images, self._scored = 0, []
        return scores

    def _write_pictures(self, number: int) -> None:
        if self._pictures:
            write_round(self.out, number, self._pictures)
            self._pictures = []

    def _scores(self) -> RoundScores:
        psnr, ssim, right = zip(*self._scored, strict=True) if self._scored else ((), (), ())
        known = [s for s in ssim if not math.isnan(s)]  # a tiny image has none
        return RoundScores(
            images=self._images,
            reconstructed=len(psnr),
            psnr_db_median=median(psnr) if psnr else math.nan,
            psnr_db_best=max(psnr, default=math.nan),
            ssim_median=median(known) if known else math.nan,
            labels_right=sum(right) / len(right) if right else math.nan,
            predicted_psnr_db=median(self._predicted) if self._predicted else math.nan,
        )

    def finish(self, error: BaseException | None = None) -> None:
        """Note that the run finished, or which error ended it."""
        self.coverage.draw(self.out)
        self._about |= ended(error)
        write_about(self.out, self._about)


def _remembered(leak: Leak, truth: Tensor, labels: Tensor) -> list[float]:
    """Return the PSNR of what the server makes of each image with all rounds before."""
    made = leak.together
    if made is None:
        return [math.nan] * len(truth)
    scored = score_batch(made.images, made.labels, truth, labels)
    return [math.nan if s.quality is None else s.quality.psnr_db for s in scored]


class TruthfulCapture(CaptureWriter):
    """A capture that keeps the true images beside it, which only scoring reads.

    Parameters
    ----------
    recorder : Recorder
        Knows the truth, and where the run is.
    model : nn.Module
        The scenario's, with any weights.
    """

    def __init__(self, recorder: Recorder, model: nn.Module):
        self._recorder, scenario = recorder, recorder.scenario
        images = training_data(scenario)
        super().__init__(
            recorder.out / CAPTURES, model, images.shape, scenario.model.name, images.classes,
            simulated=True,
        )  # fmt: skip

    def add(self, update: Update) -> str:
        name = super().add(update)
        self._keep_truth(name, update.server_round, update.nodes)
        return name

    def add_failure(self, server_round: int, nodes: tuple[int, ...], reason: str) -> str:
        name = super().add_failure(server_round, nodes, reason)
        self._keep_truth(name, server_round, nodes)
        return name

    def _keep_truth(self, name: str, server_round: int, nodes: tuple[int, ...]) -> None:
        clients = [self._recorder.partitions[node] for node in nodes]
        used, images, labels = self._recorder.truth(clients, server_round)
        write_truth(self.folder, name, used, images, labels)


def ended(error: BaseException | None = None) -> dict[str, Any]:
    """Return what ``run.json`` says of the end of a run: finished, or ended by ``error``."""
    status, reason = "finished", ""
    if isinstance(error, (Terminated, SystemExit)):  # Flower's own handler exits
        status, reason = "interrupted", "ended by SIGTERM"
    elif isinstance(error, KeyboardInterrupt):
        status, reason = "interrupted", "stopped by the user"
    elif error is not None:
        status, reason = "failed", f"{type(error).__name__}: {error}"
    return {"status": status, "reason": reason, "finished": now()}


def end_of(out: Path, error: BaseException) -> None:
    """Say of a run that still says it is running how it ended: its process had no time to."""
    try:
        about = read_json(out / RUN)
    except (OSError, ValueError):
        return  # it had not begun
    if about.get("status") == "running":
        write_about(out, {**about, **ended(error)})


def _certified(made: Reconstruction | None, place: int | None) -> int | str:
    """Return whether the attack itself proves an image, without the truth: empty, 1 or 0."""
    if made is None or not made.certified:
        return ""  # it has no proof
    return int(place is not None and made.certified[place])
