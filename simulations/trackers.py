"""A run's numbers and pictures in TensorBoard or MLflow, beside the tables.

A tracker that fails is dropped with one warning; the run goes on.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedleak.errors import InvalidInputError, UnknownNameError
from fedleak.events import warn
from simulations.scenario import Scenario, flatten

#: Pictures that a run leaves behind.
_PICTURES = ("leakage_vs_rounds.png", "reconstructions.png")


class Tracker(ABC):
    """One run of one arm in another program's format."""

    @abstractmethod
    def round(self, number: int, values: dict[str, float]) -> None:
        """Log the finite numbers of a round."""

    @abstractmethod
    def picture(self, path: Path) -> None:
        """Log a PNG."""

    @abstractmethod
    def end(self, finished: bool) -> None:
        """Close what is open."""


class TensorBoard(Tracker):
    """Event files in ``tensorboard/ARM`` of the run's folder."""

    def __init__(self, folder: Path, arm: str, scenario: Scenario):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard" / arm))
        text = json.dumps(scenario.model_dump(mode="json"), indent=2)
        self._writer.add_text("scenario (simulated)", f"```json\n{text}\n```")
        self._round = 0

    def round(self, number: int, values: dict[str, float]) -> None:
        self._round = number
        for name, value in values.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()  # to be looked at while the run goes on

    def picture(self, path: Path) -> None:
        import matplotlib.image as image

        pixels = image.imread(path)[..., :3]
        self._writer.add_image(path.stem, pixels, self._round, dataformats="HWC")

    def end(self, finished: bool) -> None:
        self._writer.close()


class MLflow(Tracker):
    """A run of the experiment that the scenario names: in ``mlruns`` of the run's folder.

    Where ``MLFLOW_TRACKING_URI`` is set, it is there instead.
    """

    def __init__(self, folder: Path, arm: str, scenario: Scenario):
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (folder / "mlruns").as_uri()
            # MLflow 3 asks for it: the folder needs neither a server nor a database.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        # A client, not mlflow.log_...: with Ray the server runs in a thread of its own.
        self._client, self._metric = MlflowClient(tracking_uri=uri), Metric
        known = self._client.get_experiment_by_name(scenario.name)
        experiment = (
            self._client.create_experiment(scenario.name) if known is None else known.experiment_id
        )
        self._run = self._client.create_run(experiment, run_name=arm).info.run_id
        settings = {**flatten(scenario), "defence": str(scenario.defence.spec)}
        params = [Param(k, str(v)) for k, v in settings.items() if str(v)]
        tags = [RunTag("fedleak.simulated", "true"), RunTag("fedleak.folder", str(folder))]
        self._client.log_batch(self._run, params=params, tags=tags)
        self._client.log_dict(self._run, scenario.model_dump(mode="json"), "scenario.json")

    def round(self, number: int, values: dict[str, float]) -> None:
        import time

        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, number) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def picture(self, path: Path) -> None:
        self._client.log_artifact(self._run, str(path))

    def end(self, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")


#: Trackers by name, and the module that the extra of the same name installs.
TRACKERS: dict[str, tuple[Callable[[Path, str, Scenario], Tracker], str]] = {
    "mlflow": (MLflow, "mlflow"),
    "tensorboard": (TensorBoard, "torch.utils.tensorboard"),
}


def check_trackers(names: Sequence[str]) -> None:
    """Find out before a run whether it can be tracked.

    Raises
    ------
    UnknownNameError, InvalidInputError
        If there is no such tracker, or its extra is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UnknownNameError("tracker", name, TRACKERS)
        try:
            importlib.import_module(TRACKERS[name][1])
        except ImportError as error:
            raise InvalidInputError(
                f"--log-to {name} needs a package that is not installed ({error}): pip install "
                f'"fedleak[{name}]", or leave it out'
            ) from error


class Trackers:
    """The trackers of one arm; none of them can end the run.

    Parameters
    ----------
    names : sequence of str
    folder : Path
        Of the run; the arms share what is in it.
    scenario : Scenario
        Of the arm.
    """

    def __init__(self, names: Sequence[str], folder: Path, scenario: Scenario):
        self._trackers: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            make = TRACKERS[name][0]
            try:
                self._trackers[name] = make(folder, scenario.defence.spec.label, scenario)
            except Exception as error:
                self._drop(name, error)

    def _each(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # a server that is away, a disk that is full, ...
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._trackers.pop(name, None)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        warn(f"{name} is not told any more of this run, which goes on: {reason}", tracker=name)

    def round(self, progress: Any) -> None:
        """Log a round: ``progress`` is a :class:`simulations.server_app.Progress`."""
        values = {"accuracy": progress.accuracy, "loss": progress.loss, **vars(progress.scores)}
        finite = {k: float(v) for k, v in values.items() if math.isfinite(v)}
        self._each("round", progress.server_round, finite)

    def end(self, out: Path, finished: bool) -> None:
        """Log the pictures in the arm's folder, and close."""
        for name in _PICTURES:
            if finished and (out / name).is_file():
                self._each("picture", out / name)
        self._each("end", finished)
