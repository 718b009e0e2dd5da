"""Commands on jobs of a cluster: from parsed arguments to the job, and from its result to the terminal.

One function a command; each returns the exit code.
"""

import os
from argparse import Namespace
from typing import Any

from seg_core.errors import SegError

from ..terminal import note, show


def submit(args: Namespace) -> int:
    """`seg submit`."""
    from ..submit import connect
    from ..submit import submit as send

    command = args.job[1:] if args.job[:1] == ["--"] else args.job
    if not command:
        raise SegError("submit: no command: say seg submit -- segment ...")
    args.parse(command)  # wrong use shows here, not in a log far away
    client = connect(args.address)
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
    from ..submit import connect, listing

    found = listing(connect(args.address))
    if args.json:
        show({"jobs": found}, as_json=True)
    for job in [] if args.json else found:
        print(f"{job['id']}  {job['status']:<9}  {job['seconds']:>8.1f} s  {job['command']}")
    return 0


def logs(args: Namespace) -> int:
    """`seg logs`."""
    from ..submit import connect, details

    client = connect(args.address)
    details(client, args.id)
    return _follow(client, args.id)


def stop(args: Namespace) -> int:
    """`seg stop`."""
    from ..submit import connect
    from ..submit import stop as end

    note(f"{args.id}: {end(connect(args.address), args.id)}")
    return 0
