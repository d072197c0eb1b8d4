"""Run scenarios: in this process, or on Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedleak.errors import FedleakError, InvalidInputError, UnknownNameError
from fedleak.events import take_over
from fedleak.lock import only_writer
from fedleak.results.format import (
    COVERAGE,
    COVERAGE_OF_ARMS,
    LEAKAGE,
    LEAKAGE_OF_TAMPERS,
    ROUNDS,
    ROUNDS_OF_ARMS,
    ROUNDS_OF_TAMPERS,
)
from fedleak.stopping import terminable
from fedleak.workers import Crash, run_processes, tell
from simulations.scenario import Scenario
from simulations.sections import Defence, Tamper

if TYPE_CHECKING:
    from simulations.server_app import Progress

Engine = Literal["inline", "ray"]
ENGINES = ("inline", "ray")

# Before Flower is imported: nothing is reported to anyone, and nothing is looked up.
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _setting in _QUIET.items():
    os.environ.setdefault(_name, _setting)


_verbose = False


def quiet_flower(verbose: bool | None = None) -> None:
    """Show Flower's own log, and Ray's, only if ``verbose``; errors always. None: as before."""
    global _verbose
    _verbose = verbose = _verbose if verbose is None else verbose
    from flwr.common.logger import FLOWER_LOGGER  # sets a level of its own when imported

    FLOWER_LOGGER.setLevel(logging.INFO if verbose else logging.ERROR)
    take_over(FLOWER_LOGGER)


@dataclass(frozen=True)
class Arm:
    """One defence of a run, with or without tampering, and where its results are.

    Attributes
    ----------
    defence : Defence
    out : Path
    tamper : Tamper
    label : str
        Both, as one word.
    """

    defence: Defence
    out: Path
    tamper: Tamper = field(default_factory=Tamper)
    label: str = "none"


#: ``on_progress(arm, progress)`` after every round.
OnArmProgress = Callable[[Arm, Any], None]


def simulate(
    scenario: Scenario,
    out: Path | str | None = None,
    engine: Engine = "inline",
    overwrite: bool = False,
    on_progress: OnArmProgress | None = None,
    client_app: Any = None,
    capture: bool = False,
    log_to: Sequence[str] = (),
    jobs: int = 1,
) -> list[Arm]:
    """Run a scenario, and each defence it compares, and write the results.

    Parameters
    ----------
    scenario : Scenario
    out : path, optional
        Output folder, by default ``results/runs/<name>``. With defences to compare, each
        has a folder of its own in it, and the tables and plots in it overlay them.
    engine : {"inline", "ray"}
        ``ray`` uses the cluster at ``RAY_ADDRESS`` where that is set.
    overwrite : bool
        Replace an earlier run in ``out``.
    on_progress : callable, optional
        ``(arm, Progress)`` after every round.
    client_app : ClientApp, optional
        Clients of your own in place of :mod:`simulations.client_app`.
    capture : bool
        Keep every update that is attacked in ``captures`` of each arm's folder, and the
        true images beside, for :func:`fedleak.capture.run.attack_capture`.
    log_to : sequence of {"tensorboard", "mlflow"}
        Trackers that are told of every round beside, each an extra of the same name.
    jobs : int
        Defences that run at once, each in a process of its own, ``inline``.

    Returns
    -------
    list of Arm
        In the order they ran.

    Raises
    ------
    FedleakError
        If the scenario cannot run; nothing has been written then.
    """
    if engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES)
    if jobs < 1 or (jobs > 1 and (engine == "ray" or client_app is not None)):
        raise InvalidInputError(
            f"jobs={jobs}: processes beside each other, from 1, are for engine 'inline' and the "
            "clients of the scenario"
        )
    from simulations.recorder import prepare_folder
    from simulations.server_app import check
    from simulations.trackers import check_trackers

    check_trackers(log_to)
    folder = Path(out) if out is not None else Path("results/runs") / scenario.name
    folder = folder.absolute()
    check(scenario, capture)
    with only_writer(folder), terminable():
        prepare_folder(folder, overwrite)
        return _run_arms(scenario, folder, engine, on_progress, client_app, capture, log_to, jobs)


def _run_arms(
    scenario: Scenario,
    folder: Path,
    engine: Engine,
    on_progress: OnArmProgress | None,
    client_app: Any,
    capture: bool,
    log_to: Sequence[str],
    jobs: int,
) -> list[Arm]:
    """Run each defence in a folder that is ours."""
    from simulations.recorder import about_run, end_of, ended, write_about

    variants = scenario.variants()
    arms = [
        Arm(v.defence, folder if len(variants) == 1 else folder / v.label, v.tamper, v.label)
        for v in variants
    ]
    if len(arms) == 1:
        _run_arm(arms[0], scenario, engine, on_progress, client_app, capture, folder, log_to)
        return arms
    about = about_run(scenario, engine, [arm.label for arm in arms])
    write_about(folder, about)
    pairs = list(zip(arms, variants, strict=True))
    try:
        if jobs > 1:
            _run_beside(pairs, folder, min(jobs, len(arms)), on_progress, capture, log_to)
        else:
            for arm, own in pairs:
                _run_arm(arm, own, engine, on_progress, client_app, capture, folder, log_to)
    except BaseException as error:
        for arm in arms:
            end_of(arm.out, error)
        write_about(folder, {**about, **ended(error)})
        raise
    finally:
        combine([a for a in arms if (a.out / ROUNDS.file).is_file()], folder)
    write_about(folder, {**about, **ended()})
    return arms


def _run_beside(
    pairs: list[tuple[Arm, Scenario]],
    folder: Path,
    jobs: int,
    on_progress: OnArmProgress | None,
    capture: bool,
    log_to: Sequence[str],
) -> None:
    """Run arms in processes, which share the processor's threads; each rounds as it would alone."""
    import torch

    threads = max(1, torch.get_num_threads() // jobs)
    function = partial(_in_a_process, folder, capture, tuple(log_to), threads, _verbose)

    def told(pair: tuple[Arm, Scenario], progress: Any) -> None:
        if on_progress is not None:
            on_progress(pair[0], progress)

    for (arm, _), found in run_processes(function, pairs, jobs, told):
        if isinstance(found, FedleakError):
            raise found
        if isinstance(found, Crash):
            raise RuntimeError(f"the run of {arm.label} broke off: {found.reason}")


def _in_a_process(
    folder: Path,
    capture: bool,
    log_to: Sequence[str],
    threads: int,
    verbose: bool,
    pair: tuple[Arm, Scenario],
) -> FedleakError | None:
    import torch

    torch.set_num_threads(threads)
    quiet_flower(verbose)
    arm, own = pair
    try:
        _run_arm(arm, own, "inline", lambda arm, made: tell(made), None, capture, folder, log_to)
    except FedleakError as error:  # as it is: for the one who asked
        return error
    return None


def _run_arm(
    arm: Arm,
    scenario: Scenario,
    engine: Engine,
    on_progress: OnArmProgress | None,
    client_app: Any,
    capture: bool,
    folder: Path,
    log_to: Sequence[str],
) -> None:
    from simulations.client_app import ScenarioApp
    from simulations.recorder import FULL, Recorder
    from simulations.server_app import build_server_app
    from simulations.trackers import Trackers

    trackers = Trackers(log_to, folder, scenario)
    recorder = Recorder(arm.out, scenario, engine)

    def report(progress: Progress) -> None:
        trackers.round(progress)
        if on_progress is not None:
            on_progress(arm, progress)

    server = build_server_app(scenario, recorder, report, capture)
    client = client_app or ScenarioApp(scenario.model_dump_json())
    run = run_inline if engine == "inline" else _run_ray
    try:
        run(server, client, scenario.federation.clients)
    except BaseException as error:
        recorder.finish(error)
        trackers.end(arm.out, finished=False)
        if isinstance(error, OSError) and error.errno in FULL:
            raise InvalidInputError(
                f"the disk is full ({error}): make room, or choose another with --out; the "
                f"rounds that are finished are kept in {str(arm.out)!r}"
            ) from error
        raise
    recorder.finish()
    from fedleak.plots import plot_run  # seaborn takes seconds to import

    plot_run(arm.out)
    trackers.end(arm.out, finished=True)


def run_inline(server: Any, client: Any, clients: int) -> None:
    """Run a Flower server with its clients in this process."""
    from flwr.app import Context, RecordDict

    from simulations.grid import InlineGrid

    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    server(InlineGrid(client, clients), context)


def _run_ray(server: Any, client: Any, clients: int) -> None:
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from simulations.grid import WindowGrid

    # Flower runs the server in a thread and reports only that it failed: keep the reason.
    raised: list[BaseException] = []
    wrapped = ServerApp()

    @wrapped.main()
    def main(grid: Any, context: Any) -> None:
        try:
            server(WindowGrid(grid), context)
        except BaseException as error:
            raised.append(error)
            raise

    # What quiet_flower was told holds for Ray as well.
    verbose = _verbose
    backend: dict[str, Any] = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {
            "log_to_driver": verbose,
            "logging_level": "info" if verbose else "error",
        },
    }
    try:
        run_simulation(wrapped, client, num_supernodes=clients, backend_config=backend)
    except BaseException as error:
        if raised:
            raise raised[0] from error
        raise RuntimeError(f"Flower's simulation on Ray failed: {error}") from error


def combine(arms: list[Arm], folder: Path) -> None:
    """Write the arms' tables as one, and plots that overlay them."""
    import pandas as pd

    from fedleak.plots import plot_run

    if not arms:
        return
    leakage, rounds = [], []
    for arm in arms:
        leakage.append(pd.read_csv(arm.out / LEAKAGE.file))
        table = pd.read_csv(arm.out / ROUNDS.file)
        rounds.append(table.assign(defence=arm.defence.name, strength=arm.defence.strength))
    by, of_leakage, of_rounds = "defence", LEAKAGE, ROUNDS_OF_ARMS
    if any(arm.tamper.made is not None for arm in arms):
        # A defence has two: of an honest server, and of one that tampers.
        by, of_leakage, of_rounds = "arm", LEAKAGE_OF_TAMPERS, ROUNDS_OF_TAMPERS
        for arm, *tables in zip(arms, leakage, rounds, strict=True):
            for table in tables:
                table["arm"] = arm.label
    held = [
        pd.read_csv(arm.out / COVERAGE.file).assign(defence=arm.label)
        for arm in arms
        if (arm.out / COVERAGE.file).is_file()
    ]
    if held:
        COVERAGE_OF_ARMS.write(folder, pd.concat(held))
    of_leakage.write(folder, pd.concat(leakage))
    of_rounds.write(folder, pd.concat(rounds))
    plot_run(folder, [arm.out for arm in arms], by)
