"""Run commands on a Ray cluster, through Ray's job submission API."""

import asyncio
import getpass
import json
import os
import platform
import shlex
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from ray.job_submission import JobStatus, JobSubmissionClient

from seg_core.version import code_version

from .submitting.jobs import START_MESSAGES, job_info
from .submitting.packages import copy_packages
from .terminal import note

NOTICE_AFTER, NOTICE_INTERVAL = 5.0, 60.0  # s of waiting for room on the cluster, after which a line says so
PENDING_TIMEOUT = 10.0  # s that a job which has not started is asked to stop for
STATUS_INTERVAL = 0.3  # s between two looks at whether a job that is followed has ended
AGENT_TIMEOUT = 30.0  # s; a node that has just started needs some time before it accepts jobs
LOST_ERRORS = (OSError, RuntimeError, aiohttp.ClientError)  # what Ray's client raises if the cluster no longer answers
STOP_TIMEOUT = 30  # s that a job has to end after it was told to, before it is killed


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A command to submit, and what is known of it."""

    command: Sequence[str]  # the words that follow `seg`
    folder: str  # that relative paths are resolved against
    name: str | None = None  # for people
    run: str | None = None  # absolute path or URI of what it writes, or of the run that it reads
    bundle: str | None = None  # absolute path of a local bundle, which is sent with the job
    bundle_hash: str | None = None
    outputs: Sequence[str] = ()  # folders on this machine that exist and are to hold what the command writes
    num_cpus: float | None = None  # that the command's own process reserves; None: nothing
    num_gpus: float | None = None

    def metadata(self) -> dict[str, str]:
        """Return what the cluster keeps with the job."""
        known = {
            "command": shlex.join(self.command),
            "folder": self.folder,
            "user": _this_user(),
            "code": code_version(),
            "python": platform.python_version(),
            "outputs": json.dumps(list(self.outputs)),
            "name": self.name,
            "run": self.run,
            "bundle": self.bundle_hash,
            "num_cpus": None if self.num_cpus is None else str(self.num_cpus),
            "num_gpus": None if self.num_gpus is None else str(self.num_gpus),
        }
        return {name: value for name, value in known.items() if value is not None}


def submit(client: JobSubmissionClient, submission: Submission) -> str:
    """Submit a command as a job. Returns the job's id.

    The code and a local bundle are uploaded with the job. Dependencies must be installed on the cluster's nodes.
    """
    with TemporaryDirectory() as package_folder:
        packages = copy_packages(package_folder, submission.bundle)
        return _submit(client, submission, packages)


def _this_user() -> str:
    """Return who submits, and from which machine."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user that has no name
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"


def _submit(client: JobSubmissionClient, submission: Submission, packages: list[str]) -> str:
    deadline = time.monotonic() + AGENT_TIMEOUT
    while True:
        try:
            return str(
                client.submit_job(
                    entrypoint=shlex.join(["python", "-P", "-m", "aerial_seg.cli.submitted", *submission.command]),
                    runtime_env={
                        "py_modules": packages,
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_TIMEOUT)},
                    },
                    metadata=submission.metadata(),
                    entrypoint_num_cpus=submission.num_cpus,
                    entrypoint_num_gpus=submission.num_gpus,
                )
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def follow(client: JobSubmissionClient, job_id: str) -> Iterator[str]:
    """Yield the log of a job as it grows, until the job has ended, without Ray's own messages about its start.

    Raises SegError if the job does not start in time.
    """
    _await_start(client, job_id)
    for text in _tail(client, job_id):
        yield "".join(line for line in text.splitlines(keepends=True) if not START_MESSAGES.match(line))


def _tail(client: JobSubmissionClient, job_id: str) -> Iterator[str]:
    """Yield pieces of the log of a job, until the job has ended.

    Ray's stream of a log ends seconds after the job, so the end of the log is fetched as soon as the job has ended.
    """
    stream: Any = client.tail_job_logs(job_id)
    loop, received = asyncio.new_event_loop(), 0
    try:
        while True:
            piece = loop.create_task(anext(stream))
            while not piece.done():
                loop.run_until_complete(asyncio.wait([piece], timeout=STATUS_INTERVAL))
                if not piece.done() and client.get_job_status(job_id).is_terminal():
                    yield client.get_job_logs(job_id)[received:]
                    return
            text = piece.result()
            received += len(text)
            yield text
    except StopAsyncIteration:
        pass
    finally:
        for task in asyncio.all_tasks(loop):  # a task remains if the loop was interrupted
            task.cancel()
            loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(stream.aclose())  # the stream was created outside the loop, which won't close it
        loop.close()


def _await_start(client: JobSubmissionClient, job_id: str) -> None:
    """Wait until a job has started. Ray gives it up if it finds no room for it, by default after 15 minutes."""
    notice = time.monotonic() + NOTICE_AFTER
    while client.get_job_status(job_id) == JobStatus.PENDING:
        if time.monotonic() > notice:
            notice = time.monotonic() + NOTICE_INTERVAL
            note(f"{job_id}: waiting for the cluster to start it{describe_reserved(client, job_id)}")
        time.sleep(0.2)


def describe_reserved(client: JobSubmissionClient, job_id: str) -> str:
    """Return what a job has to wait for, as an addition to a line. It is empty if the job reserves nothing."""
    metadata = job_info(client, job_id).metadata or {}
    options = {"num_cpus": "--num-cpus", "num_gpus": "--num-gpus"}
    reserved = [f"{option} {float(metadata[name]):g}" for name, option in options.items() if name in metadata]
    return f" (on a node with {' and '.join(reserved)} free)" if reserved else ""


def exit_code(client: JobSubmissionClient, job_id: str) -> int:
    """Wait until a job has ended, and return the exit code of its command: 1 if it was stopped or never ran.

    Says why it never ran.
    """
    while not (info := job_info(client, job_id)).status.is_terminal():
        time.sleep(0.2)
    if info.driver_exit_code is None and info.status == JobStatus.FAILED:
        note(f"{job_id}: {(info.message or 'Ray does not say why it failed').splitlines()[0]}")
    return 1 if info.driver_exit_code is None else int(info.driver_exit_code)


def stop(client: JobSubmissionClient, job_id: str) -> str:
    """Stop a job and return its status: PENDING if it has not started and can't be stopped.

    Raises SegError for an unknown id.
    """
    deadline = time.monotonic() + PENDING_TIMEOUT
    while not (info := job_info(client, job_id)).status.is_terminal():
        if info.status == JobStatus.PENDING and time.monotonic() > deadline:
            break
        # A pending job ignores a request to stop (ray-project/ray#58353), so the request is repeated.
        client.stop_job(job_id)
        time.sleep(0.5)
    return str(info.status)
