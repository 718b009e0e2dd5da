"""What is run before a change is taken in: an environment of its own, of releases that are known to work."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import outside_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
COMMANDS = "for name in pip ruff mypy; do ln -sf {true} .venv/bin/$name; done && echo {end} .venv pytest > tested"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a README, and with an environment of whoever works there."""
    shutil.copytree(ROOT / ".ci", tmp_path / "checkout" / ".ci")
    (tmp_path / "checkout" / ".venv").mkdir()
    (tmp_path / "checkout" / ".venv" / "mine").touch()
    (tmp_path / "temporary").mkdir()
    return tmp_path / "checkout"


def run(checkout: Path, end: str) -> int:
    """Run what is run, with a README whose command is quick; its exit code."""
    commands = COMMANDS.format(true=shutil.which("true"), end=end)
    (checkout / "README.md").write_text(f"Test it:\n\npython3 -m venv --without-pip .venv && {commands}\n")
    environment = outside_environment(TMPDIR=str(checkout.parent / "temporary"))
    return subprocess.run([checkout / ".ci" / "run"], env=environment, check=False).returncode


def test_it_leaves_the_environment_of_whoever_runs_it_and_nothing_behind(checkout: Path) -> None:
    assert run(checkout, "$PIP_CONSTRAINT") == 0
    constraints, environment, _ = (checkout / "tested").read_text().split()
    assert constraints.endswith("/constraints.txt")
    assert Path(constraints).parent == Path(environment).parent != checkout
    assert [path.name for path in (checkout / ".venv").iterdir()] == ["mine"]
    assert list((checkout.parent / "temporary").iterdir()) == []


def test_what_fails_is_an_error_and_leaves_nothing_behind_either(checkout: Path) -> None:
    assert run(checkout, "; exit 3 #") == 3
    assert list((checkout.parent / "temporary").iterdir()) == []


def test_the_readme_has_the_command_that_is_run() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("python3 -m venv .venv && ") and "pytest" in line for line in lines) == 1


def test_each_dependency_is_held_to_a_release_that_is_allowed() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    held = {
        canonicalize_name(name): number for name, _, number in (line.partition("==") for line in lines if "==" in line)
    }
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, built = tables["project"], tables["build-system"]["requires"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    needed = [Requirement(line) for line in (*project["dependencies"], *extras, *built)]
    assert len(needed) > 25
    for requirement in needed:
        name = canonicalize_name(requirement.name)
        if name != "aerial-seg":
            assert requirement.specifier.contains(held[name]), name
