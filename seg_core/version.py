"""The version of this code, as runs and bundles record it."""

import subprocess
from functools import cache
from pathlib import Path


@cache
def code_version() -> str:
    """The version that was installed; in a checkout with the commit, and whether files have changed since."""
    try:
        from seg_core._version import version  # written when the package is built
    except ImportError:
        version = "0+unknown"
    commit = _describe_commit(Path(__file__).parents[1])
    return version if commit is None else f"{version.partition('+')[0]}+g{commit}"


def _describe_commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=.dirty", "--abbrev=9", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
