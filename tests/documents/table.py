"""How the documents' commands are run here: what is shortened, and what runs elsewhere.

A command of the documents that is neither runnable nor named here fails its test. To add one:
a :class:`Shorter` where it would take minutes, an :class:`Elsewhere` where something else of
this repository runs it as it is, a placeholder in :mod:`tests.documents.folder` where the
reader has to fill in something.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shorter:
    """Where ``pattern`` is found in a command it is replaced, and ``add`` is appended."""

    pattern: str
    why: str
    replace: str | None = None
    add: str = ""


@dataclass(frozen=True)
class Elsewhere:
    """Not run here: ``file`` runs it, which is so as long as it has ``words``."""

    pattern: str
    file: str
    words: str


SHORTER = (
    Shorter(
        r"--log-json simulate demo",
        "two rounds have all events",
        "--log-json simulate demo --set federation.rounds=2",
    ),
    Shorter(r"federation\.rounds=20", "two rounds are enough", "federation.rounds=2"),
    Shorter(r"(?<= )--jobs \d+", "each process imports torch for seconds", "--jobs 1"),
    Shorter(r" --engine ray", "tests/simulations run on Ray", ""),
    Shorter(r"--device cuda", "most machines have none", "--device cpu"),
    Shorter(r"^ssh gpu ", "the other machine is this one", ""),
    Shorter(r"(?<=[ =])/shared/", "a folder that every node sees", "shared/"),
    Shorter(r"\bsteps=\d+", "far from converged is enough", "steps=2"),
    Shorter(r"data\.download=true", "no download", "data.name=folder --set data.root=FOLDER"),
    Shorter(r"^(fedleak simulate(?!.*--overwrite).*)", "alternatives, of which a reader runs one",
            r"\1 --overwrite"),
    Shorter(r"^fedleak simulate", "one round of two clients",
            add="--set federation.rounds=1 --set federation.clients=2 --set federation.fraction=1 "
                "--set data.max_test_images=20 --set metric.predict=none"),
    Shorter(r"^fedleak simulate (fedavg|femnist)(?!.*attack\.name=none)", "matched as a whole",
            add="--set attack.options.steps=2"),
    Shorter(r"^fedleak evaluate", "two defences, one round of two clients",
            add="""--set 'seeds=[0]' --set 'defences=["none", "noise:0.1"]' --set 'strengths={}' """
                "--set federation.rounds=1 --set federation.clients=2 --set attack.every=1 "
                "--set attack.clients=1 --set data.max_test_images=20 --set metric.predict=none"),
    Shorter(r"^fedleak evaluate.*scenario=cifar10", "Gauss-Newton under noise takes a minute",
            add="--set data.size=8"),
    Shorter(r"^fedleak (reconstruct|attack)(?!.*--batch-size)(?!.*--limit)", "one update",
            add="--limit 1"),
    Shorter(r"^fedleak reconstruct.*--batch-size (\d+)(?!.*--limit)", "one batch",
            add=r"--limit \1"),
    Shorter(r"^fedleak (reconstruct|attack).*--attack cosine(?!.*steps=)", "thousands of steps",
            add="--option steps=2"),
    Shorter(r"^(fedleak audit.*)torchvision\.models:resnet18", "minutes; my_net.py is a module too",
            r"\1my_net.py:make"),
    Shorter(r"^fedleak audit(?!.*--input-shape)", "small images",
            add="--input-shape 3,12,12"),
    Shorter(r"^fedleak audit(?!.*--references)", "one reference", add="--references 1"),
    Shorter(r"^fedleak audit(.*) --input-shape 1,28,28", "small images",
            r"fedleak audit\1 --input-shape 1,12,12"),
    Shorter(r"^fedleak paper(.*) --limit \d+", "one image", r"fedleak paper\1"),
    Shorter(r"^fedleak paper(.*) --slow-limit \d+", "one image", r"fedleak paper\1"),
    Shorter(r"^fedleak paper(?!.*--attack)", "the fast attack", add="--attack linear"),
    Shorter(r"^fedleak paper", "one image, one network, and nothing is kept",
            add="--limit 1 --slow-limit 1 --network cnn2-v1 --overwrite"),
)  # fmt: skip

#: The same for Python blocks, line by line.
SHORTER_PYTHON = (
    Shorter(r"num_rounds=\d+", "one round", "num_rounds=1"),
    Shorter(r"jobs=\d+", "each process imports torch for seconds", "jobs=1"),
    Shorter(r"\(3, 32, 32\)", "small images", "(3, 12, 12)"),
    Shorter(r"num_images=16\b", "two images", "num_images=2"),
    Shorter(r"batch_size=8\b", "two images", "batch_size=2"),
    Shorter(r"(load_sweep\(.*?)\[\"seeds=\[0\]\"\]", "two defences, one round of two clients",
            r"""\1['seeds=[0]', 'defences=["none", "noise:0.1"]', 'strengths={}', """
            "'federation.rounds=1', 'federation.clients=2', 'attack.every=1', "
            "'metric.predict=none']"),
)  # fmt: skip

ELSEWHERE = (
    Elsewhere(r"^(\.venv/bin/)?flwr run \. ", "tests/simulations/test_cli.py", "test_flwr_run"),
    Elsewhere(r"^flwr (list|log|stop)\b", "tests/simulations/test_cli.py", "flwr, \"list\""),
    Elsewhere(r"^make test$", ".ci/run", "make test"),
    Elsewhere(r"^make slow$", ".ci/run", "make slow"),
    Elsewhere(r"^make lint$", ".ci/run", "make lint"),
    Elsewhere(r"^make docs$", ".ci/run", "make docs"),
    Elsewhere(r"^make (install|format|bench|clean)$", "Makefile", "$(BIN)/"),
    Elsewhere(r"^(\.venv/bin/)?(ruff|mypy)\b", "Makefile", "ruff check"),
    Elsewhere(r"^(\.venv/bin/)?pre-commit\b", "tests/test_house.py", "pre-commit"),
    Elsewhere(r"^(\.venv/bin/)?mkdocs\b", "mkdocs.yml", "nav"),
    Elsewhere(r"^(\.venv/bin/)?(python -m )?pytest\b", ".ci/run", "make test"),
    Elsewhere(r"^(\.venv/bin/)?python -m build\b", "tests/test_package.py", '"build"'),
    Elsewhere(r"^(\.venv/bin/)?(python -m )?pip install\b", "Makefile", "pip install"),
    Elsewhere(r"^python3? -m venv\b", "Makefile", "-m venv"),
    Elsewhere(r"^(source|\.) \.venv/bin/activate$", "Makefile", "-m venv"),
    Elsewhere(r"^python -m docs\.\w+$", "docs/pictures.py", "__main__"),
    Elsewhere(r"^git (clone|switch|commit|checkout|diff|add|log|tag)\b", "CONTRIBUTING.md", "git"),
    Elsewhere(r"^(tensorboard|mlflow) ", "pyproject.toml", "mlflow-skinny"),
)  # fmt: skip

#: Documents whose commands depend on files of their own, and the tests that run them.
OWN_TESTS = {"docs/tutorials/": "tests/docs/test_tutorials.py"}


def own_test(document: str) -> str | None:
    """Return the file that tests a document by itself."""
    return next((t for d, t in OWN_TESTS.items() if document.startswith(d)), None)


def shortened(command: str) -> str:
    """Return a command as it is run here."""
    for rule in SHORTER:
        found = re.search(rule.pattern, command)
        if found is None:
            continue
        if rule.replace is not None:
            command = re.sub(rule.pattern, rule.replace, command)
        command = f"{command} {found.expand(rule.add)}".rstrip()
    return command


def shortened_python(block: str) -> str:
    """Return a Python block as it is run here."""
    for rule in SHORTER_PYTHON:
        block = re.sub(rule.pattern, rule.replace or "", block)
    return block


def elsewhere(command: str) -> Elsewhere | None:
    """Return what runs a command, where that is not this test."""
    return next((e for e in ELSEWHERE if re.search(e.pattern, command)), None)
