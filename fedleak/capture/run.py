"""Attack a capture: resumable, in one process, in several, or on Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from fedleak import deadline
from fedleak.attacks import resolve_device
from fedleak.capture.galleries import write_galleries
from fedleak.capture.jobs import Chunk, Result, Work, run_inline, run_processes, run_ray
from fedleak.capture.manifest import sha256
from fedleak.capture.reader import Capture, place_of
from fedleak.capture.store import Results
from fedleak.capture.table import write_table
from fedleak.errors import InvalidInputError
from fedleak.files import IMAGE, TEXT, read_bytes, refuse_links
from fedleak.images import SUFFIXES, image_files
from fedleak.lock import only_writer
from fedleak.workers import JobEngine, OnProgress, check_engine

#: Allowed for each update, where nothing else is said; that of ``attack.seconds`` in a simulation.
SECONDS = 600.0


@dataclass(frozen=True, eq=False)
class Attacked:
    """What came of a capture.

    Attributes
    ----------
    folder : Path
        Holds ``attacks.csv``, ``reconstructions.png``, ``pictures`` and ``results``.
    table : DataFrame
        One row for each image.
    skipped : int
        Updates that an earlier call had done.
    simulated : bool
        Whether the clients are simulated.
    gallery : DataFrame or None
        With ``memory``: one row for each distinct image that is held of a client.
    """

    folder: Path
    table: pd.DataFrame
    skipped: int
    simulated: bool
    gallery: pd.DataFrame | None = None


def attack_capture(
    folder: Path | str,
    attack: str = "hybrid",
    options: Mapping[str, Any] | None = None,
    out: Path | str | None = None,
    *,
    model: str | None = None,
    device: str = "auto",
    jobs: int = 1,
    engine: JobEngine = "local",
    threads: int = 1,
    together: int = 8,
    limit: int = 0,
    seconds: float = SECONDS,
    memory: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Attacked:
    """Attack what a server captured; go on where an earlier call stopped.

    The results are those of one process, whatever the number of jobs, the engine, and when
    it was stopped: what is attacked together depends on the places in the capture alone,
    and is done again unless all of it was.

    Parameters
    ----------
    folder : path
        A capture.
    attack : str
        Its name.
    options : mapping, optional
        The attack's own, of plain types; ``public`` is a folder of images.
    out : path, optional
        For the results; by default a folder in ``attacks`` of the capture, one for each
        attack with its options.
    model : str, optional
        How to make the model here; by default as the capture says.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    jobs : int
        Processes. With more than one, a script that calls this needs the usual
        ``if __name__ == "__main__":``.
    engine : {"local", "ray"}
        ``ray`` uses the cluster at ``RAY_ADDRESS`` where that is set.
    threads : int
        CPU threads of each process.
    together : int
        Updates attacked together, at most: more is faster on a GPU, and a kill costs more.
    limit : int
        Attack the first updates only; 0: all.
    seconds : float
        Allowed for each update; 0: no limit. What is attacked together has the sum. What the
        limit cuts short is the best until then, and ``doubtful``; it depends on the machine.
    memory : bool
        Put all rounds of each client together, in this process: a gallery of distinct images
        (:mod:`fedleak.capture.galleries`).
    overwrite : bool
        Forget what is done.
    on_progress : callable, optional

    Raises
    ------
    FedleakError
        If the capture, the attack or the folder cannot be used; nothing is attacked then.
    """
    check_engine(engine, jobs)
    for name, value, least in (("threads", threads, 1), ("together", together, 1),
                               ("limit", limit, 0)):  # fmt: skip
        if value < least:
            raise InvalidInputError(f"{name} must be at least {least}, not {value}")
    with deadline.limit(seconds):
        pass  # refuses what is no time
    capture = Capture(folder, model)
    chosen = dict(options or {})
    if "device" in chosen:
        raise InvalidInputError("give the device by --device, not as an option of the attack")
    if engine != "ray" or device == "auto":  # a cluster may have what this machine has not
        device = resolve_device(device).type
    where = str(capture.folder.resolve())
    spec = _absolute(capture.spec)
    work = Work(where, spec, attack, _plain(chosen), device, threads, float(seconds))
    work.make()  # refuses what it does not take
    settings = _settings(capture, work, together)
    place = _folder(capture, out, attack, settings)
    if out is None:
        refuse_links(place, below=capture.folder.resolve())
    with only_writer(place):
        shape = capture.manifest.model.input_shape
        results = Results(place, settings, shape, overwrite)
        chunks = list(_chunks(capture, capture.names()[: limit or None], together))
        todo, skipped = _plan(capture, results, chunks)
        finished, total = skipped, sum(len(c.names) for c in chunks)
        if on_progress is not None:
            on_progress(finished, total)
        for chunk, found in _run(work, todo, jobs, engine):
            results.save(chunk, found)
            finished += len(found)
            if on_progress is not None:
                on_progress(finished, total)
        stored = {n: _stored(results, n, c) for c in chunks for n in c.names}
        table = write_table(capture, attack, stored, results.folder)
        held = write_galleries(capture, work, stored, results.folder) if memory else None
    return Attacked(results.folder, table, skipped, capture.manifest.simulated, held)


def _run(
    work: Work, chunks: Sequence[Chunk], jobs: int, engine: JobEngine
) -> Iterator[tuple[Chunk, list[Result]]]:
    if not chunks:
        return iter(())
    if engine == "ray":
        return run_ray(work, chunks)
    return run_processes(work, chunks, jobs) if jobs > 1 else run_inline(work, chunks)


def _chunks(capture: Capture, names: Sequence[str], together: int) -> Iterator[Chunk]:
    """Cut at fixed places: a damaged or missing file moves no other update."""

    def place(name: str) -> tuple[str, int]:
        return name.partition("/")[0], place_of(name) // together

    for _, group in groupby(names, place):
        members = tuple(group)
        digest = hashlib.sha256()
        for name in members:
            content = _content(capture.folder / f"{name}.json")
            digest.update(f"{name} {sha256(content)}\n".encode())
        yield Chunk(members, digest.hexdigest())


def _content(record: Path) -> bytes:
    try:
        return read_bytes(record, TEXT)
    except OSError:  # missing, or no file: reading the update says so
        return b""


def _plan(capture: Capture, results: Results, chunks: Sequence[Chunk]) -> tuple[list[Chunk], int]:
    """Return what is left to do, and how many updates are done."""
    todo = [c for c in chunks if not _is_done(capture, results, c)]
    return todo, sum(len(c.names) for c in chunks) - sum(len(c.names) for c in todo)


def _is_done(capture: Capture, results: Results, chunk: Chunk) -> bool:
    for name in chunk.names:
        stored = results.load(name, chunk.digest)
        if stored is None or stored.retry == "crashed":
            return False
        if stored.retry == "damaged" and not capture.read(name).damaged:
            return False  # somebody copied it again
    return True


def _stored(results: Results, name: str, chunk: Chunk) -> Result:
    found = results.load(name, chunk.digest)
    if found is None:
        raise InvalidInputError(
            f"the result of {name!r} in {str(results.folder)!r} is gone; attack again"
        )
    return found


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options that a worker elsewhere can use: paths are absolute."""
    return {
        k: str(Path(v).resolve()) if k == "public" and isinstance(v, (str, Path)) else v
        for k, v in options.items()
    }


def _absolute(spec: str) -> str:
    where, colon, name = spec.rpartition(":")
    return f"{Path(where).resolve()}:{name}" if colon and where.endswith(".py") else spec


def _settings(capture: Capture, work: Work, together: int) -> dict[str, Any]:
    """Return what results must have in common to belong together."""
    from fedleak import __version__

    file = Path(work.model.rpartition(":")[0])
    code = read_bytes(file, TEXT) if file.suffix == ".py" and file.is_file() else None
    settings: dict[str, Any] = {
        "capture": capture.digest,
        "attack": work.attack,
        "options": {k: v for k, v in sorted(work.options.items()) if k != "public"},
        "model": file.name + work.model[len(str(file)) :] if file.suffix == ".py" else work.model,
        "model_code": None if code is None else sha256(code),
        "device": work.device,
        "threads": work.threads,
        "together": together,
        "seconds": work.seconds,
        "fedleak": __version__,
    }
    public = work.options.get("public")
    if public is not None:
        settings["public"] = _digest_images(Path(str(public)))
    return settings


def _digest_images(path: Path) -> str:
    """Return a checksum of the images in a folder."""
    files = image_files(path) if path.is_dir() else [path] if path.exists() else []
    if not files:
        raise InvalidInputError(f"--public {str(path)!r} has no images; known: {sorted(SUFFIXES)}")
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(hashlib.sha256(read_bytes(file, IMAGE)).digest())
        except OSError:  # reading it as an image says what is wrong with it
            digest.update(b"-")
    return digest.hexdigest()


def _folder(
    capture: Capture, out: Path | str | None, attack: str, settings: Mapping[str, Any]
) -> Path:
    if out is not None:
        return Path(out).absolute()
    key = sha256(json.dumps(settings, sort_keys=True, default=str).encode())[:8]
    return capture.folder.resolve() / "attacks" / f"{attack}-{key}"
