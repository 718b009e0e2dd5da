"""Run commands on a Ray cluster, through Ray's job submission API."""

import asyncio
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobInfo, JobStatus, JobSubmissionClient

import seg_core
from seg_core.errors import SegError
from seg_core.version import code_version

from .ray_session import AUTHENTICATION_ADVICE

PENDING_SECONDS = 300.0  # a job that asks for what no node has stays pending for ever
AGENT_SECONDS = 30.0  # a node that has just started takes a while before it takes jobs
STARTING = re.compile(r".*\sINFO job_manager\.py:\d+ -- |Running entrypoint for job ")
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's dashboard at `address`, $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS, or this machine's."""
    named = (os.environ.get(name, "") for name in VARIABLES)
    address = address or next((each for each in named if each.startswith("http")), DEFAULT_ADDRESS)
    try:
        with _without(*VARIABLES):  # which would win over what was said
            client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise SegError(f"--address {address}: {AUTHENTICATION_ADVICE}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SegError(f"--address {address}: no Ray dashboard answers there") from error
    return client


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Leave variables out of the environment of this process meanwhile."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def submit(client: JobSubmissionClient, command: Sequence[str], folder: str) -> str:
    """Start `seg COMMAND...` on the cluster, relative paths taken from `folder`. Returns the job's id.

    The code travels with the job; what it depends on must be installed on the cluster's nodes.
    """
    with TemporaryDirectory() as folder_of_packages:
        return _submit(client, command, folder, _copy_packages(folder_of_packages))


def _copy_packages(folder: str) -> list[str]:
    """Copies of our packages, under the names that they are imported by, which say what version they are of."""
    sources = {"seg_core": Path(seg_core.__file__).parent, "aerial_seg": Path(__file__).parent}
    for name, source in sources.items():
        shutil.copytree(source, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
    Path(folder, "seg_core", "_version.py").write_text(f"version = {code_version()!r}\n", encoding="utf-8")
    return [str(Path(folder, name)) for name in sources]


def _submit(client: JobSubmissionClient, command: Sequence[str], folder: str, packages: list[str]) -> str:
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return str(
                client.submit_job(
                    entrypoint=shlex.join(["python", "-P", "-m", "aerial_seg.cli.main", "-C", folder, *command]),
                    runtime_env={"py_modules": packages},
                    metadata={"command": shlex.join(command)},
                )
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def follow(client: JobSubmissionClient, job: str) -> Iterator[str]:
    """The log of a job as it grows, until the job has ended, without the lines in which Ray says that it starts it.

    Raises SegError where it does not start.
    """
    _await_start(client, job)
    stream: Any = client.tail_job_logs(job)
    loop = asyncio.new_event_loop()
    try:
        while True:
            lines = loop.run_until_complete(anext(stream)).splitlines(keepends=True)
            yield "".join(line for line in lines if not STARTING.match(line))
    except StopAsyncIteration:
        pass
    finally:
        for task in asyncio.all_tasks(loop):  # that was interrupted
            task.cancel()
            loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(stream.aclose())  # which the loop does not know of: it was begun outside
        loop.close()


def _await_start(client: JobSubmissionClient, job: str) -> None:
    deadline = time.monotonic() + PENDING_SECONDS
    while client.get_job_status(job) == JobStatus.PENDING:
        if time.monotonic() > deadline:
            client.stop_job(job)
            raise SegError(f"{job}: not started after {PENDING_SECONDS:.0f} s: the cluster has no room for it")
        time.sleep(0.2)


def exit_code(client: JobSubmissionClient, job: str) -> int:
    """The code that a finished job's command ended with; 1 where it was stopped or never ran."""
    while not (info := details(client, job)).status.is_terminal():
        time.sleep(0.2)
    return 1 if info.driver_exit_code is None else int(info.driver_exit_code)


def details(client: JobSubmissionClient, job: str) -> JobInfo:
    """What the cluster knows of a job. Raises SegError for an unknown id."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        raise SegError(f"{job}: the cluster knows no such job: see seg jobs") from error


def listing(client: JobSubmissionClient) -> list[dict[str, Any]]:
    """All jobs submitted to the cluster, the newest first."""
    found = sorted(client.list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
    return [
        {
            "id": job.submission_id,
            "status": str(job.status),
            "seconds": round(((job.end_time or time.time() * 1000) - (job.start_time or 0)) / 1000, 1),
            "command": (job.metadata or {}).get("command", job.entrypoint),
        }
        for job in found
        if job.submission_id
    ]


def stop(client: JobSubmissionClient, job: str) -> str:
    """Stop a job and say how it ended. Raises SegError for an unknown id."""
    while not (info := details(client, job)).status.is_terminal():
        # A pending job takes no notice of being told to stop (ray-project/ray#58353), so it is told until it does.
        client.stop_job(job)
        time.sleep(0.5)
    return str(info.status)
