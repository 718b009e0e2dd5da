"""Run commands on a Ray cluster, through Ray's job submission API."""

import asyncio
import getpass
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobInfo, JobStatus, JobSubmissionClient

import seg_core
from seg_core.environment import environment
from seg_core.errors import SegError
from seg_core.version import code_version

from .ray_session import AUTHENTICATION_ADVICE

PENDING_TIMEOUT = 300.0  # s; a job that needs resources that no node has stays pending for ever
AGENT_TIMEOUT = 30.0  # s; a node that has just started needs some time before it accepts jobs
START_MESSAGES = re.compile(r".*\sINFO job_manager\.py:\d+ -- |Running entrypoint for job ")
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of the dashboard at `address`, by default $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS or local.

    Raises SegError if no dashboard answers at the address, or if it asks for a token.
    """
    values = (os.environ.get(name, "") for name in ADDRESS_VARIABLES)
    address = address or next((value for value in values if value.startswith("http")), DEFAULT_ADDRESS)
    url = _make_url(address)
    try:
        with environment(dict.fromkeys(ADDRESS_VARIABLES)):  # they would override the given address
            client = JobSubmissionClient(url)
    except AuthenticationError as error:
        raise SegError(f"--address {address}: {AUTHENTICATION_ADVICE}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SegError(f"--address {address}: no Ray dashboard answers there") from error
    return client


def _make_url(address: str) -> str:
    """Return the URL of a dashboard whose scheme may be left out: Ray would try other protocols for half a minute."""
    scheme, colon, _ = address.partition("://")
    if not colon:
        return f"http://{address}"
    if scheme not in {"http", "https"}:
        raise SegError(
            f"--address {address}: not a Ray dashboard: use http://HOST:8265, which Ray names when it starts"
        )
    return address


def submit(client: JobSubmissionClient, command: Sequence[str], folder: str, name: str | None = None) -> str:
    """Submit `seg COMMAND...` as a job, which resolves relative paths against `folder`. Returns the job's id.

    `seg jobs` shows its name. The code is uploaded with the job. Its dependencies must be installed on the cluster's
    nodes.
    """
    metadata = {"command": shlex.join(command), "user": _this_user(), **({"name": name} if name else {})}
    with TemporaryDirectory() as package_folder:
        return _submit(client, command, folder, _copy_packages(package_folder), metadata)


def _this_user() -> str:
    """Return who submits, and from which machine."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user that has no name
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"


def _copy_packages(folder: str) -> list[str]:
    """Copy our packages into a folder under their import names, with their version. Returns the copies' paths."""
    sources = {"seg_core": Path(seg_core.__file__).parent, "aerial_seg": Path(__file__).parent}
    for name, source in sources.items():
        shutil.copytree(source, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
    Path(folder, "seg_core", "_version.py").write_text(f"version = {code_version()!r}\n", encoding="utf-8")
    return [str(Path(folder, name)) for name in sources]


def _submit(
    client: JobSubmissionClient, command: Sequence[str], folder: str, packages: list[str], metadata: dict[str, str]
) -> str:
    deadline = time.monotonic() + AGENT_TIMEOUT
    while True:
        try:
            return str(
                client.submit_job(
                    entrypoint=shlex.join(["python", "-P", "-m", "aerial_seg.cli.main", "-C", folder, *command]),
                    runtime_env={"py_modules": packages},
                    metadata=metadata,
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
    stream: Any = client.tail_job_logs(job_id)
    loop = asyncio.new_event_loop()
    try:
        while True:
            lines = loop.run_until_complete(anext(stream)).splitlines(keepends=True)
            yield "".join(line for line in lines if not START_MESSAGES.match(line))
    except StopAsyncIteration:
        pass
    finally:
        for task in asyncio.all_tasks(loop):  # a task remains if the loop was interrupted
            task.cancel()
            loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(stream.aclose())  # the stream was created outside the loop, which won't close it
        loop.close()


def _await_start(client: JobSubmissionClient, job_id: str) -> None:
    deadline = time.monotonic() + PENDING_TIMEOUT
    while client.get_job_status(job_id) == JobStatus.PENDING:
        if time.monotonic() > deadline:
            client.stop_job(job_id)
            raise SegError(f"{job_id}: not started after {PENDING_TIMEOUT:.0f} s: the cluster has no room for it")
        time.sleep(0.2)


def exit_code(client: JobSubmissionClient, job_id: str) -> int:
    """Wait until a job has ended, and return the exit code of its command: 1 if it was stopped or never ran."""
    while not (info := job_info(client, job_id)).status.is_terminal():
        time.sleep(0.2)
    return 1 if info.driver_exit_code is None else int(info.driver_exit_code)


def job_info(client: JobSubmissionClient, job_id: str) -> JobInfo:
    """Return the cluster's information about a job. Raises SegError for an unknown id."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        raise SegError(f"{job_id}: the cluster has no such job: see seg jobs") from error


def list_jobs(client: JobSubmissionClient) -> list[dict[str, Any]]:
    """Return what is known of each job submitted to the cluster, the newest job first.

    `started` is in UTC. `progress` is the last line of the log of a job that runs. What is not known is None.
    """
    jobs = sorted(client.list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
    return [_describe_job(client, job) for job in jobs if job.submission_id]


def _describe_job(client: JobSubmissionClient, job: Any) -> dict[str, Any]:
    metadata, started = job.metadata or {}, (job.start_time or 0) / 1000  # s since 1970
    return {
        "id": job.submission_id,
        "name": metadata.get("name"),
        "status": str(job.status),
        "user": metadata.get("user"),
        "started": datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if started else None,
        "seconds": round((job.end_time / 1000 if job.end_time else time.time()) - started, 1) if started else None,
        "progress": _last_line(client, job.submission_id) if job.status == JobStatus.RUNNING else None,
        "command": metadata.get("command", job.entrypoint),
    }


def _last_line(client: JobSubmissionClient, job_id: str) -> str | None:
    """Return the last line of a job's log, without Ray's own; None if there is none, or no more."""
    try:
        lines = client.get_job_logs(job_id).splitlines()
    except RuntimeError:  # the job was deleted meanwhile
        return None
    return next((line for line in reversed(lines) if line.strip() and not START_MESSAGES.match(line)), None)


def stop(client: JobSubmissionClient, job_id: str) -> str:
    """Stop a job and return its final status. Raises SegError for an unknown id."""
    while not (info := job_info(client, job_id)).status.is_terminal():
        # A pending job ignores a request to stop (ray-project/ray#58353), so the request is repeated.
        client.stop_job(job_id)
        time.sleep(0.5)
    return str(info.status)
