"""A document's steps, done in order in one folder, in this process."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import pandas as pd
import typer
from typer.testing import CliRunner

from fedleak.attacks import ATTACKS
from fedleak.client import LOSSES, OPTIMISERS
from fedleak.commands.app import app
from fedleak.data import DATASETS
from fedleak.defences import DEFENCES
from fedleak.models import MODELS
from fedleak.priors import PRIORS
from fedleak.status import reconstructed
from fedleak.systems import LAYERS
from fedleak.tampers import TAMPERS
from tests.documents import folder, table
from tests.documents.reading import ROOT, Step, cut, split, steps

REGISTRIES = (
    ATTACKS, DATASETS, DEFENCES, LAYERS, LOSSES, MODELS, OPTIMISERS, PRIORS, TAMPERS,
)  # fmt: skip
#: Run by the shell, in the folder of the document, and only there.
_HARMLESS = ("ls", "cat", "head", "tail", "mkdir", "cp", "mv", "test", "echo", "unzip")


class Walk:
    """The steps of a document, each done once, after those before it.

    Parameters
    ----------
    document : str
    place : Path
        An empty folder: what the reader's working folder would be.
    """

    def __init__(self, document: str, place: Path):
        self.steps, self.place = steps(document), place
        self.names = folder.namespace(document)
        self.environment: dict[str, str] = {}
        self.outcomes: list[BaseException | None] = []
        texts = [table.shortened(s.text) if s.language == "sh" else s.text for s in self.steps]
        folder.prepare(place, texts)

    def do(self, step: Step) -> None:
        """Do a step, and those before it that have not been done; raise what it raised."""
        place = self.steps.index(step)
        while len(self.outcomes) <= place:
            self.outcomes.append(self._outcome(self.steps[len(self.outcomes)]))
        if (outcome := self.outcomes[place]) is not None:
            raise outcome

    def _outcome(self, step: Step) -> BaseException | None:
        try:
            with self._inside():
                {"sh": self._command, "python": self._python, "toml": self._toml}[step.language](
                    step
                )
        except (Exception, SystemExit) as error:
            return error
        return None

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Be in the folder, and leave no trace in this process."""
        known = set(sys.modules)
        registries = [patch.dict(r._entries) for r in REGISTRIES]  # type: ignore[attr-defined]
        with contextlib.ExitStack() as stack:
            for change in registries:
                stack.enter_context(change)
            stack.enter_context(contextlib.chdir(self.place))
            stack.enter_context(patch.dict(os.environ, self.environment))
            stack.enter_context(patch.object(sys, "path", [str(self.place), *sys.path]))
            stack.enter_context(warnings.catch_warnings())
            importlib.invalidate_caches()
            try:
                yield
            finally:
                for name in set(sys.modules) - known:
                    file = getattr(sys.modules[name], "__file__", None)
                    if file and Path(file).is_relative_to(self.place):
                        del sys.modules[name]

    def _python(self, step: Step) -> None:
        if step.file:
            Path(step.file).write_text(step.text)
        code = compile(table.shortened_python(step.text), str(step.file or step.document), "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, self.names)

    def _toml(self, step: Step) -> None:
        """A sweep has defences by strengths; a package its entry points; a scenario the rest."""
        from simulations.evaluation.sweep import load_sweep
        from simulations.scenario import load_scenario

        file = Path(step.file or "block.toml")
        file.write_text(step.text)
        described = tomllib.loads(step.text)
        if "project" in described:
            groups = {r.group for r in REGISTRIES}
            assert set(described["project"]["entry-points"]) <= groups
        elif {"strengths", "defences", "seeds"} & set(described):
            assert load_sweep(file).cells()
        else:
            load_scenario(file)

    def _command(self, step: Step) -> None:
        if table.elsewhere(step.text) is None:
            self.run(table.shortened(step.text))

    def run(self, command: str) -> None:
        """Run one command, already shortened."""
        words, rest = cut(split(command))
        if words and re.match(r"\w+=", words[0]):  # NAME=VALUE before a command
            values = variables(words[:1])
            paths = values.get("PYTHONPATH", "").split(os.pathsep)
            with (
                patch.dict(os.environ, values),
                patch.object(sys, "path", [*filter(None, paths), *sys.path]),
            ):
                self.run(" ".join(shlex.quote(w) for w in words[1:]))
            return
        name = Path(words[0]).name
        if name == "export":
            self.environment |= variables(words[1:])
        elif name == "make":
            for line in recipe(words[1]):
                self.run(table.shortened(line))
        elif name == "fedleak" or words[1:3] == ["-m", "fedleak"]:
            printed = fedleak(words[1:] if name == "fedleak" else words[3:])
            _pass_on(printed, rest)
        elif name == "scp":
            missing = [w for w in words[1:-1] if not w.startswith("-") and not Path(w).exists()]
            assert not missing, f"{missing} are not there to be copied"
        elif name in ("python", "python3") and words[1].endswith(".py"):
            with patch.object(sys, "argv", words[1:]), contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(words[1], run_name="__main__")
        elif words[1:2] == ["-m"] and words[2].startswith("tests."):
            check_module(words[2], words[3:])
        elif name in _HARMLESS:
            subprocess.run(command, shell=True, check=True, capture_output=True, timeout=30)
        else:
            raise AssertionError(
                f"{command!r} is neither run nor in the table of tests/documents/table.py"
            )


def variables(words: list[str]) -> dict[str, str]:
    """Return what NAME=VALUE words set, with $NAME filled in."""
    return {name: os.path.expandvars(value) for name, value in (w.split("=", 1) for w in words)}


def fedleak(arguments: list[str]) -> dict[str, str]:
    """Run the command line in this process; return what it printed, by stream: 1 and 2."""
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError(f"fedleak {shlex.join(arguments)}") from done.exception
    assert done.exit_code == 0, f"fedleak {shlex.join(arguments)}: {done.output}"
    if "--json" in arguments:
        assert any(json.loads(text) for text in _objects(done.stdout))
    if "--out" in arguments:
        out = Path(arguments[arguments.index("--out") + 1])
        assert out.is_file() or any(out.iterdir()), f"nothing in {out}"
        _some_leak(out, arguments)
    return {"1": done.stdout, "2": done.stderr}


def _objects(text: str) -> list[str]:
    """Return the JSON objects of an output: one, or one a line."""
    return text.splitlines() if text.startswith("{") and text.count("\n{") else [text]


def _some_leak(out: Path, arguments: list[str]) -> None:
    """A documented simulation whose every attack is refused would be a bad example."""
    found = out / "leakage.csv"
    if arguments[0] == "simulate" and found.is_file():
        rows = pd.read_csv(found)
        assert not len(rows) or reconstructed(rows).any(), rows["reason"].iloc[0]


def _pass_on(printed: dict[str, str], rest: list[str]) -> None:
    """Write what a command printed, by stream, to where it goes."""
    while rest and rest[0] != "|":
        if "&" in rest[0]:  # 2>&1
            rest = rest[1:]
            continue
        Path(rest[1]).write_text(printed["2" if rest[0].startswith("2") else "1"])
        rest = rest[2:]
    if rest and shutil.which(rest[1]):
        subprocess.run(
            shlex.join(rest[1:]), shell=True, input=printed["1"], text=True, check=True,
            capture_output=True, timeout=30,
        )  # fmt: skip


def recipe(target: str) -> list[str]:
    """Return the commands of a Makefile's target, which may only need others."""
    makefile = (ROOT / "Makefile").read_text()
    found = re.search(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)*)", makefile, re.MULTILINE)
    assert found is not None, f"the Makefile has no target {target!r}"
    return [line.strip().replace("$(BIN)/", "") for line in found[1].splitlines()]


def check_options(arguments: list[str]) -> None:
    """Check a command line of ``fedleak`` as click parses it, without running it."""
    command: Any = typer.main.get_command(app)
    flags = {o for p in command.params for o in p.opts} | {"--help"}
    while arguments and arguments[0].startswith("-"):
        assert arguments[0] in flags, f"fedleak has no {arguments[0]}"
        arguments = arguments[1:]
    if not arguments:
        return
    name = arguments[0]
    assert name in command.commands, f"there is no command 'fedleak {name}'"
    chosen = command.commands[name]
    try:
        chosen.make_context(name, list(arguments[1:]), resilient_parsing=False)
    except click.exceptions.Exit:  # --help
        return


def check_module(module: str, arguments: list[str]) -> None:
    """Check that a module of the tests runs, and has the options that it is given."""
    help_ = io.StringIO()
    with (
        patch.object(sys, "argv", [module, "--help"]),
        contextlib.redirect_stdout(help_),
        contextlib.suppress(SystemExit),
    ):
        runpy.run_module(module, run_name="__main__")
    known = set(re.findall(r"(?<!\w)--[\w-]+", help_.getvalue()))
    wrong = [a for a in arguments if a.startswith("--") and a.split("=")[0] not in known]
    assert known, f"python -m {module} has no options"
    assert not wrong, f"python -m {module} has no {wrong}"
