"""The places that a command reads and writes: what a submitted job must find on its cluster."""

import os
import re
import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from seg_core.errors import SegError
from seg_core.model.bundle import BUILT_IN_NAME, HEADER
from seg_core.storage.files import absolute, check_writable, exists, expand, is_remote

# By the names that the parser gives them, with the option that names them.
INPUTS = {
    "scenes": "",
    "run": "",
    "before": "",
    "after": "",
    "target": "",
    "data": "--data ",
    "model": "--model ",
    "begin_from": "--from ",
    "config": "--config ",
    "labels": "--labels ",
    "aoi": "--aoi ",
    "areas": "--areas ",
}
OUTPUTS = {
    "out": "--out ",
    "work": "--work ",
    "per_image": "--per-image ",
    "figures": "--figures ",
    "rasters": "--rasters ",
}
BUNDLES = ("model", "begin_from", "target")  # those of the inputs that may be bundles
SHARED_ADVICE = "use a place that all nodes of the cluster share, or s3://"


def find_local_bundle(args: Namespace, folder: str) -> str | None:
    """Return the absolute path of the bundle on this machine that a command names; None if it names no such bundle."""
    for name in BUNDLES:
        value = getattr(args, name, None)
        if value and value != BUILT_IN_NAME and not is_remote(value):
            path = absolute(value, folder)
            if os.path.isfile(f"{path}/{HEADER}"):
                return path
    return None


def find_run(args: Namespace, folder: str) -> str | None:
    """Return where a command writes its results, or else the run that it reads; None if there is neither."""
    path = getattr(args, "out", None) or getattr(args, "run", None)
    return absolute(path, folder) if path else None


def existing_folders(args: Namespace, folder: str) -> list[str]:
    """Return the folders on this machine, one per local output, that exist and are to hold the output."""
    local = (path for _, path in _places(args, OUTPUTS, folder) if not is_remote(path))
    return sorted({str(next(each for each in Path(path).parents if each.is_dir())) for path in local})


def check_places(args: Namespace, folder: str, folders: list[str]) -> None:
    """Check that this node can read what a command reads, and write what it writes.

    `folders` are those that hold the outputs on the machine that the command was submitted from. Raises SegError for
    the first place that cannot be used, and says that it is the cluster that cannot use it.
    """
    node = f"node {socket.gethostname()} of the cluster"
    for option, path in _places(args, INPUTS, folder):
        try:
            found = exists(path) or (bool(re.search(r"[*?\[]", path)) and bool(expand(path)))
        except (SegError, OSError) as error:
            raise SegError(f"{option}{error} ({node} has tried it)") from error
        if not found:
            advice = "" if is_remote(path) else f": {SHARED_ADVICE}"
            raise SegError(f"{option}{path}: no such file or folder for {node}{advice}")
        if not is_remote(path) and os.path.exists(path) and not os.access(path, os.R_OK):
            raise SegError(f"{option}{path}: {node} may not read it")
    for option, path in _places(args, OUTPUTS, folder):
        _check_output(option, path, node, folders)


def _check_output(option: str, path: str, node: str, folders: list[str]) -> None:
    above = next((each for each in folders if f"{path}/".startswith(f"{each.rstrip('/')}/")), None)
    if not is_remote(path) and above is not None and not os.path.isdir(above):
        raise SegError(f"{option}{path}: {node} has no folder {above}: {SHARED_ADVICE}")
    if not os.path.exists(path):
        try:
            check_writable(path)
        except (SegError, OSError) as error:
            raise SegError(f"{option}{error} ({node} has tried it)") from error


def _places(args: Namespace, names: dict[str, str], folder: str) -> Iterator[tuple[str, str]]:
    """Yield the option and the absolute path of each place that a command names."""
    for name, option in names.items():
        value = getattr(args, name, None)
        for path in value if isinstance(value, list) else [value] if value else []:
            if not (name in BUNDLES and path == BUILT_IN_NAME):
                yield option, absolute(path, folder)
