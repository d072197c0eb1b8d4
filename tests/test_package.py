"""The wheel and the source archive, used as somebody without the checkout uses them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedleak", "strategies", "simulations")


def run(*command: object, cwd: Path) -> str:
    """Run a command that knows nothing of this checkout; return what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GIT_"))}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with both archives; the wheel is made from the source archive."""
    source = tmp_path_factory.mktemp("source")
    forget = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in PACKAGES:  # a copy: building leaves folders behind
        shutil.copytree(ROOT / name, source / name, ignore=forget)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=source)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ``bin`` of an environment with the wheel, and our own dependencies."""
    place = tmp_path_factory.mktemp("project")
    # Somebody's own project, which has its environment inside and is not where fedleak is from.
    run("git", "init", "--quiet", cwd=place)
    run("git", "-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "-", "--allow-empty",
        cwd=place)  # fmt: skip
    venv.create(place / ".venv", with_pip=False)
    binaries = place / ".venv" / "bin"
    found = run(binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
                cwd=place)  # fmt: skip
    # Named last, so that the wheel comes first; the editable install in it is not followed.
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(found.strip(), "dependencies.pth").write_text("\n".join(ours))
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", binaries / "python", "install", "--quiet",
        "--no-deps", "--no-index", "--disable-pip-version-check", wheel, cwd=place)  # fmt: skip
    return binaries


def shipped() -> set[str]:
    """Return all files of the packages: there are none that are not to be shipped."""
    files = (f for p in PACKAGES for f in (ROOT / p).rglob("*") if f.is_file())
    return {str(f.relative_to(ROOT)) for f in files if "__pycache__" not in f.parts}


def test_both_archives_have_every_file(built: Path) -> None:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if ".dist-info/" not in n}
        assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())
    assert held == shipped()
    with tarfile.open(source) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert shipped() | {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_the_version_is_stated_in_one_place(installed: Path, tmp_path: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(installed / "fedleak", "--version", cwd=tmp_path).strip() == f"fedleak {version}"
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_modules_are_those_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import fedleak, strategies, simulations, simulations.tables as s, pathlib;"
        "print(fedleak.__file__, strategies.__file__, simulations.__file__, s.SHIPPED);"
        "[print(m.__name__) for m in (fedleak, strategies, simulations)"
        " if not pathlib.Path(m.__file__).with_name('py.typed').is_file()]"
    )
    first, *untyped = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert all(Path(f).is_relative_to(installed.parent) for f in first.split()), first
    assert not untyped


def test_a_federation_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    run(
        installed / "fedleak", "simulate", "demo", "--set", "federation.rounds=1",
        "--set", "federation.clients=2", cwd=tmp_path,
    )  # fmt: skip
    folder = tmp_path / "results" / "runs" / "demo"
    assert (folder / "leakage_vs_rounds.png").is_file()
    about = json.loads((folder / "none" / "run.json").read_text())
    assert about["commit"] is None
    assert about["versions"]["fedleak"] in (ROOT / "pyproject.toml").read_text()


def test_help_and_import_load_no_torch() -> None:
    """They answer at once: names are imported when they are asked for."""
    code = (
        "import sys, fedleak, fedleak.commands.app; "
        "assert 'torch' not in sys.modules and 'flwr' not in sys.modules; "
        "import fedleak.terms; assert fedleak.Terms is fedleak.terms.Terms; "
        "assert callable(fedleak.laboratory.reconstruct); assert 'score' in dir(fedleak); "
        "assert not hasattr(fedleak, 'nothing_of_ours')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
