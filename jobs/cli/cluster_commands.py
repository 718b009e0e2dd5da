"""Commands on jobs of a cluster: from parsed arguments to the job, and from its result to the terminal.

One function a command; each returns the exit code.
"""

import logging
import os
from argparse import Namespace
from typing import Any

from seg_core.errors import SegError

from ..terminal import note, show

UPLOAD_LOGGERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")


def _connect(address: str | None) -> Any:
    """A client of the cluster, which does not log each upload."""
    from ..submit import connect

    client = connect(address)
    for name in UPLOAD_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    return client


def submit(args: Namespace) -> int:
    """`seg submit`."""
    from ..submit import submit as send

    command = args.job[1:] if args.job[:1] == ["--"] else args.job
    if not command:
        raise SegError("submit: no command: say seg submit -- segment ...")
    args.parse(command)  # wrong use shows here, not in a log far away
    client = _connect(args.address)
    job = send(client, command, os.getcwd())
    if args.no_follow:
        print(job)
        return 0
    note(f"job {job}")
    return _follow(client, job)


def _follow(client: Any, job: str) -> int:
    from ..submit import exit_code, follow

    for text in follow(client, job):
        print(text, end="", flush=True)
    return exit_code(client, job)


def jobs(args: Namespace) -> int:
    """`seg jobs`."""
    from ..submit import listing

    found = listing(_connect(args.address))
    if args.json:
        show({"jobs": found}, as_json=True)
    for job in [] if args.json else found:
        print(f"{job['id']}  {job['status']:<9}  {job['seconds']:>8.1f} s  {job['command']}")
    return 0


def logs(args: Namespace) -> int:
    """`seg logs`."""
    from ..submit import details

    client = _connect(args.address)
    details(client, args.id)
    return _follow(client, args.id)


def stop(args: Namespace) -> int:
    """`seg stop`."""
    from ..submit import stop as end

    note(f"{args.id}: {end(_connect(args.address), args.id)}")
    return 0
