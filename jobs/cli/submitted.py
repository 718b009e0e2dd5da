"""A command that was submitted to a cluster: `python -m aerial_seg.cli.submitted COMMAND ...`.

It is the entrypoint of a job. Before the command begins, it checks what the cluster can't do, within a second or two.
"""

import importlib.util
import json
import os
import platform
import sys
from argparse import Namespace
from typing import Any

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # where Ray tells a job its id and the metadata that it was submitted with
MODULES = ("numpy", "pyarrow", "rasterio", "torch", "safetensors", "duckdb", "albumentations", "ray")
OLDEST_PYTHON = (3, 11)


def main() -> int:
    """Run the command of this job. Returns its exit code, which is 2 if the cluster can't run it."""
    metadata = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("metadata") or {}
    problem = find_missing(metadata.get("python", ""))
    if problem is not None:
        print(f"seg: {problem}", flush=True)
        return 2
    from .main import carry_out
    from .parser import make_parser

    args = make_parser().parse_args(sys.argv[1:])
    args.folder, command = None, args.carry_out  # _prepare enters the folder

    def check_and_run(args: Namespace) -> int:
        _prepare(args, metadata)
        return int(command(args))

    args.carry_out = check_and_run
    return carry_out(args)


def find_missing(python: str) -> str | None:
    """Return a line that says what the cluster's Python lacks; None if it lacks nothing.

    `python` is the version on the machine that submitted.
    """
    here = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        return f"the cluster runs Python {here}, and {python} is where you submit from: 3.11 or later is needed"
    absent = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if absent:
        return (
            f"the cluster's Python {here} ({sys.executable}) has no {', '.join(absent)}: install aerial-seg with its "
            "dependencies on all nodes, for the Python that Ray runs in there"
        )
    return None


def _prepare(args: Namespace, metadata: dict[str, Any]) -> None:
    """Check the places of the command, take the bundle that came with it, and enter the folder it was submitted in."""
    from seg_core.run.lease import JOB_VARIABLE

    from ..submitting.packages import ORIGIN, SENT_BUNDLE
    from ..terminal import note
    from .places import BUNDLES, check_places

    os.environ[JOB_VARIABLE] = metadata.get("job_submission_id", "")
    there, here = metadata.get("python", ""), platform.python_version()
    if there.split(".")[:2] != here.split(".")[:2]:
        note(f"the cluster runs Python {here}, and you submit from {there}")
    folder = metadata.get("folder", os.getcwd())
    if SENT_BUNDLE.is_dir():
        from seg_core.storage.files import absolute

        origin = (SENT_BUNDLE / ORIGIN).read_text(encoding="utf-8")
        for name in BUNDLES:
            value = getattr(args, name, None)
            if value and absolute(value, folder) == origin:
                setattr(args, name, str(SENT_BUNDLE))
    check_places(args, folder, json.loads(metadata.get("outputs", "[]")))
    if os.path.isdir(folder):
        os.chdir(folder)


if __name__ == "__main__":
    sys.exit(main())
