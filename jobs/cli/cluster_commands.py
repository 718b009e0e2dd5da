"""The commands that submit jobs to a cluster and manage them.

Each command is one function, which takes the parsed arguments, prints the results and returns the exit code.
"""

import logging
import os
from argparse import Namespace
from typing import Any

from seg_core.errors import SegError

from ..terminal import note, print_figures

UPLOAD_LOGGERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")


def _connect(address: str | None) -> Any:
    """A client of the cluster, which does not log each upload."""
    from ..submit import connect

    client = connect(address)
    for name in UPLOAD_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    return client


def submit(args: Namespace) -> int:
    """Run `seg submit`: submit a command as a job and follow its log."""
    from ..submit import submit as submit_job

    command = args.job[1:] if args.job[:1] == ["--"] else args.job
    if not command:
        raise SegError("submit: no command: use seg submit -- segment ...")
    args.parse(command)  # reports wrong usage here instead of in the job's log
    client = _connect(args.address)
    job_id = submit_job(client, command, os.getcwd(), args.name)
    if args.no_follow:
        print(job_id)
        return 0
    note(f"job {job_id}")
    return _follow(client, job_id)


def _follow(client: Any, job_id: str) -> int:
    from ..submit import exit_code, follow

    for text in follow(client, job_id):
        print(text, end="", flush=True)
    return exit_code(client, job_id)


def jobs(args: Namespace) -> int:
    """Run `seg jobs`: list the jobs of a cluster."""
    from ..submit import list_jobs

    listed = list_jobs(_connect(args.address))
    if args.json:
        print_figures({"jobs": listed}, as_json=True)
    for job in [] if args.json else listed:
        what = f"{job['name']}: {job['command']}" if job["name"] else job["command"]
        print(f"{job['id']}  {job['status']:<9}  {job['seconds'] or 0:>8.1f} s  {job['user'] or 'unknown'}  {what}")
        if job["progress"]:
            print(f"    {job['progress']}")
    return 0


def logs(args: Namespace) -> int:
    """Run `seg logs`: follow the log of a job."""
    from ..submit import job_info

    client = _connect(args.address)
    job_info(client, args.id)  # refuses an unknown id
    return _follow(client, args.id)


def stop(args: Namespace) -> int:
    """Run `seg stop`: stop a job."""
    from ..submit import stop as stop_job

    note(f"{args.id}: {stop_job(_connect(args.address), args.id)}")
    return 0
