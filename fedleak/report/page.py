"""The page: everything that is known of a folder, escaped, in one file without a network."""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fedleak import __version__
from fedleak.errors import InvalidInputError
from fedleak.files import write_atomically
from fedleak.provenance import now
from fedleak.report import advice, words
from fedleak.report.chart_styles import looks
from fedleak.report.charts import (
    Chart,
    accuracy_chart,
    frontier_chart,
    leakage_chart,
    predicted_chart,
)
from fedleak.report.evidence import EVIDENCE
from fedleak.report.layers import Audited, audited, layers
from fedleak.report.numbers import GRADES, Figures, figures
from fedleak.report.pictures import BUDGET, Gallery, Tile, attack_pictures, gallery
from fedleak.report.sources import Arm, Source, Study, read_source
from fedleak.report.tampers import TamperRow, basis, sentences, tamper_rows
from fedleak.report.toml import to_toml
from fedleak.untrusted import dig
from fedleak.wording import fit_text, in_order

#: Name of the file in the folder that is reported.
NAME = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"
#: Rows of the table of clients.
_CLIENTS = 12

Judged = tuple[Arm, Figures]


@dataclass(frozen=True, eq=False)
class Section:
    """What the page says of one study."""

    title: str
    headline: str
    told: list[tuple[str, str]]
    data: str
    threat: list[str]
    helps: list[str]
    judged: list[Judged]
    subject: Judged
    hero: list[tuple[str, Tile]]
    gallery: Gallery | None
    leakage: Chart | None
    accuracy: Chart | None
    frontier: Chart | None
    predicted: Chart | None
    layers: list[dict[str, Any]]
    commands: list[str]
    tampers: list[TamperRow]
    tampers_told: list[str]
    tampers_basis: str


def write_report(folder: Path | str, out: Path | str | None = None) -> tuple[Path, str]:
    """Write the report of a folder.

    Parameters
    ----------
    folder : path
        Of ``fedleak simulate``, ``evaluate``, ``attack`` or ``audit --out``. What is missing
        in it or damaged is left out, and the page says so.
    out : path, optional
        The HTML file; by default ``report.html`` in the folder.

    Returns
    -------
    (Path, str)
        The file, and the verdict in one sentence, with what it is of.

    Raises
    ------
    InvalidInputError
        If the folder holds no results, or the file cannot be written.
    """
    source = read_source(Path(folder))
    text, headline = render(source)
    path = source.folder / NAME if out is None else Path(out)
    if path.is_dir():
        raise InvalidInputError(
            f"--out {str(path)!r} is a folder; name a file in it, as {str(path / NAME)!r}"
        )
    try:
        write_atomically(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise InvalidInputError(
            f"--out {str(path)!r} cannot be written ({error}); name another file with --out"
        ) from error
    return path, headline


def render(source: Source) -> tuple[str, str]:
    """Return the page, and its headline."""
    found = audited(source.audit) if source.audit is not None else None
    sections = [_section(s, source, f"s{n}-") for n, s in enumerate(source.studies)]
    headline = sections[0].headline if sections else found.headline if found else ""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        finalize=lambda value: in_order(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters |= {
        "db": words.decibels, "plain_db": words.plain_decibels, "percent": words.percent,
        "fit": fit_text, "sortable": _sortable, "figure": _figure,
    }  # fmt: skip
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    label = "predicted, no attack"
    if sections:
        label = words.label_of(source, [j for s in sections for j in s.judged])
    pictures, count = _attack_pictures(source)
    text = environment.get_template("report.html").render(
        source=source, sections=sections, headline=headline, audit=found, style=style,
        script=script, policy=policy(style, script), grades=GRADES,
        evidence=EVIDENCE, glossary=words.GLOSSARY,
        no_proof=words.NO_PROOF, label=label, clients_shown=_CLIENTS,
        status=words.status_note(source), provenance=_provenance(source), toml=_toml(source),
        repeat=_repeat(source), made=now()[:16].replace("T", " ") + " UTC", version=__version__,
        pictures=pictures, pictures_count=count,
    )  # fmt: skip
    return text, f"{headline} ({label})"


def policy(style: str, script: str) -> str:
    """Return a content security policy: this style, this script, images inside; nothing else."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest(style)}'; "
        f"script-src 'sha256-{digest(script)}'; base-uri 'none'; form-action 'none'"
    )


def _section(study: Study, source: Source, prefix: str) -> Section:
    judged = [(a, figures(a)) for a in study.arms]
    palette = looks(study.arms)
    subject = next((j for j in judged if j[0].undefended and j[1].images), judged[0])
    shown = gallery(study.arms, source.notes, BUDGET // len(source.studies))
    helps = advice.what_helps(study, judged, source)
    told = words.details(*subject)
    changed = tamper_rows(study)
    changed_told = sentences(changed)
    told += [("If the server changes the model", " ".join(changed_told[:2]))]
    told += [("By which server", words.threat_in_short(study, source)),
             ("What would help", " ".join(helps[:2]))]  # fmt: skip
    metric = next((a.metric for a, _ in judged if len(a.metric)), None)
    return Section(
        title=study.title,
        headline=words.headline(*subject, study.informed),
        told=[pair for pair in told if pair[1]],
        data=str(dig(study.scenario, "data", "name", default="")),
        threat=words.threat(study, source),
        helps=helps,
        judged=judged,
        subject=subject,
        hero=_hero(shown, judged),
        gallery=shown,
        leakage=leakage_chart(judged, palette, prefix),
        accuracy=accuracy_chart(judged, palette, prefix),
        frontier=frontier_chart(judged, palette, prefix),
        predicted=predicted_chart(judged, palette, prefix),
        layers=[] if metric is None else layers(metric),
        commands=advice.next_commands(study, source, _shape(study)),
        tampers=changed,
        tampers_told=changed_told,
        tampers_basis=basis(changed),
    )


def _hero(shown: Gallery | None, judged: list[Judged]) -> list[tuple[str, Tile]]:
    """Return the most telling pictures: one image under some defences, or three of one."""
    if shown is None:
        return []
    panel = next(p for p in shown.panels if p.number == shown.start)
    (_, truth), *rows = panel.rows
    if len(rows) == 1:
        pairs = list(zip(truth, rows[0][1], strict=True))[:2]
        return [
            (label, tile)
            for true, made in pairs
            for label, tile in (("true image", true), ("recovered", made))
        ]
    column = max(range(len(truth)), key=lambda n: sum(bool(row[n].src) for _, row in rows))
    order = [a.label for a, f in sorted(judged, key=lambda j: -_known(j[1].median_db))]
    by_label = {label: row[column] for label, row in rows}
    ranked = [label for label in order if label in by_label and by_label[label].src]
    last = len(ranked) - 1
    chosen = ranked if last < 3 else [ranked[0], ranked[last // 2], ranked[last]]
    return [("true image", truth[column]), *((name, by_label[name]) for name in chosen)]


def _known(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _shape(study: Study) -> tuple[int, ...] | None:
    """Return the shape of the images, from the first file of pictures."""
    from fedleak.results.pictures import files_by_round, read_round

    for arm in study.arms:
        for path in (p for f in arm.folders[:1] for p in list(files_by_round(f).values())[:1]):
            for picture in read_round(path, []).values():
                return tuple(int(n) for n in picture.truth.shape)
    return None


def _sortable(value: float | None) -> str:
    """Return a number for a script to sort by; empty where it is not known."""
    return (
        "" if value is None or math.isnan(value) else repr(float(value)).replace("inf", "Infinity")
    )


def _figure(value: float | None, digits: int = 0) -> str:
    """Return a number with thin spaces between thousands, or a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}".replace(",", "\u202f")


def _attack_pictures(source: Source) -> tuple[list[tuple[str, str]], int]:
    if source.kind != "attack":
        return [], 0
    return attack_pictures(source.studies[0].arms[0].folders[0])


def _provenance(source: Source) -> list[tuple[str, str]]:
    about = source.about
    command = {"run": "simulate", "evaluation": "evaluate"}.get(source.kind, source.kind)
    found = [("folder", source.name), ("made by", f"fedleak {command}")]
    for key in ("status", "engine", "seed", "started", "finished", "commit"):
        if about.get(key) is not None:
            found.append((key, str(about[key])))
    seeds = dig(about, "sweep", "seeds")
    if isinstance(seeds, list):
        found.append(("seeds", ", ".join(map(str, seeds))))
    versions = about.get("versions")
    if isinstance(versions, dict):
        found.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    if source.kind == "attack" and isinstance(about.get("attack"), dict):
        found += [(str(k), str(v)) for k, v in about["attack"].items()]
    return found


def _toml(source: Source) -> str:
    """Return the scenario or the sweep, as a file that repeats it."""
    table = source.about.get("scenario" if source.kind == "run" else "sweep")
    return to_toml(table) if isinstance(table, dict) else ""


def _repeat(source: Source) -> list[str]:
    """Return the commands that make these results again."""
    if source.kind == "run":
        engine = source.about.get("engine")
        given = ["--engine", str(engine)] if engine in ("inline", "ray") else []
        name = str(dig(source.about, "scenario", "name", default=source.name))
        run = ["fedleak", "simulate", "scenario.toml", *given, "--out", f"results/runs/{name}"]
        return [shlex.join(run), f"fedleak report {shlex.quote(f'results/runs/{name}')}"]
    if source.kind == "evaluation":
        name = str(dig(source.about, "sweep", "name", default=source.name))
        out = f"results/runs/{name}"
        return [
            shlex.join(["fedleak", "evaluate", "sweep.toml", "--out", out]),
            shlex.join(["fedleak", "report", out]),
        ]
    if source.kind == "attack":
        attack = str(dig(source.about, "attack", "attack", default="hybrid"))
        return [shlex.join(["fedleak", "attack", "captures", "--attack", attack])]
    return []


__all__ = ["NAME", "Audited", "render", "write_report"]
