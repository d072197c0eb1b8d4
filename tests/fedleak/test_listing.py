"""``fedleak list``: names, one line each, and what other packages add or break."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from typer.testing import CliRunner

from fedleak.attacks import ATTACKS
from fedleak.commands.app import app
from fedleak.commands.listing import KINDS, entries, summary
from fedleak.defences import DEFENCES
from fedleak.errors import UnknownNameError
from fedleak.models import MODELS
from fedleak.priors import PRIORS


def test_everything_is_described() -> None:
    for kind in ("attacks", "defences", "models", "priors", "scenarios", "sweeps"):
        for entry in entries(kind):
            assert entry.summary not in ("", "(not described)"), entry
            assert not entry.broken
            assert "\n" not in entry.summary
            assert "``" not in entry.summary


def test_the_names_are_those_of_the_registries() -> None:
    for kind, registry in (("attacks", ATTACKS), ("models", MODELS), ("priors", PRIORS)):
        listed = {e.name for e in entries(kind)}
        assert set(registry) <= listed
    defences = {e.name: e.unit for e in entries("defences")}
    assert set(defences) == {"none", *DEFENCES}
    assert "root mean square" in defences["noise"]


def test_another_package_adds_one_and_breaks_another(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        "theirs": EntryPoint("theirs", "torch.nn:Tanh", "fedleak.attacks"),
        "gone": EntryPoint("gone", "no_such_module:Attack", "fedleak.attacks"),
    }
    monkeypatch.setattr(ATTACKS, "_points", points)
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))
    found = {e.name: e for e in entries("attacks")}
    assert found["theirs"].package == "torch.nn"
    assert found["theirs"].summary
    assert "ModuleNotFoundError: No module named 'no_such_module'" in found["gone"].broken
    assert found["hybrid"].package == "fedleak"
    done = CliRunner().invoke(app, ["list", "attacks"], env={"COLUMNS": "100"})
    assert done.exit_code == 0
    assert "broken: ModuleNotFoundError" in done.stdout
    assert "hybrid-paper" in done.stdout


def test_one_line_of_a_docstring() -> None:
    class Bare(Exception):
        pass

    def cited() -> None:
        """Do as ``this`` (Abbeel et al. 2016). And more."""

    assert summary(cited) == "Do as this (Abbeel et al. 2016)"
    assert summary(Bare) == "(not described)"  # not that of its base
    Bare.summary = "Explicit"  # type: ignore[attr-defined]
    assert summary(Bare) == "Explicit"


def test_json_and_a_kind_that_does_not_exist() -> None:
    found = json.loads(CliRunner().invoke(app, ["list", "priors", "--json"]).stdout)
    assert [e["name"] for e in found["priors"]] == list(PRIORS)
    with pytest.raises(UnknownNameError, match="did you mean 'defences'"):
        entries("defense")
    assert set(KINDS) >= {"attacks", "datasets", "sweeps"}


@pytest.mark.slow
def test_the_librarys_own_need_no_flower() -> None:
    code = (
        "import sys; from fedleak.commands.listing import entries\n"
        "for k in ('attacks', 'defences', 'models', 'priors', 'datasets'): entries(k)\n"
        "print([m for m in ('flwr', 'ray', 'simulations') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
