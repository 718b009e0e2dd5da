"""What is known of the jobs of a cluster."""

import json
import re
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from seg_core.errors import SegError

START_MESSAGES = re.compile(r".*\sINFO job_manager\.py:\d+ -- |Running entrypoint for job ")
# What progress.Progress and training.log write.
WINDOWS_DONE = re.compile(
    r"(?P<done>[\d,]+) of (?P<total>[\d,]+) (?P<unit>windows), "
    r"(?P<mpx_s>[\d.]+) Mpx/s, (?P<left>[\d:]+) left(?:, (?P<failed>[\d,]+) tiles failed)?"
)
EPOCHS_DONE = re.compile(
    r"(?P<unit>epoch) (?P<done>\d+) of (?P<total>\d+): .*?(?P<mpx_s>[\d.]+) Mpx/s, (?P<left>[\d:]+) left"
)


def job_info(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """Return the cluster's information about a job. Raises SegError for an unknown id."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        raise SegError(f"{job_id}: the cluster has no such job: see seg jobs") from error


def list_jobs(client: JobSubmissionClient) -> list[dict[str, Any]]:
    """Return what is known of each job submitted to the cluster, as `describe_job` does, the newest job first."""
    submitted = [job for job in client.list_jobs() if job.submission_id]
    submitted.sort(key=lambda job: job.start_time or 0, reverse=True)
    return [describe_job(client, job) for job in submitted]


def describe_job(client: JobSubmissionClient, job: JobDetails) -> dict[str, Any]:
    """Return what is known of a job. What is not known is None.

    `started` is in UTC. `run` is the path that the job writes to, or the run that it reads, `bundle` the hash of the
    bundle that was sent with it, and `code` the version of our code. `line` is the last line of the log of a job that
    runs or has failed, and `progress` what the log of a job that runs says of its progress: `done` of `total` windows
    or epochs, `mpx_s`, the time left as text, and failed tiles.
    """
    metadata, started = job.metadata or {}, (job.start_time or 0) / 1000  # s since 1970
    running = job.status == JobStatus.RUNNING
    lines = read_log(client, str(job.submission_id)) if running else []
    failed = (job.message or "").strip().splitlines() if job.status == JobStatus.FAILED else []
    told = {name: metadata.get(name) for name in ("name", "user", "run", "bundle", "code")}
    return {
        "id": job.submission_id,
        "status": str(job.status),
        **told,
        "started": datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if started else None,
        "seconds": round((job.end_time / 1000 if job.end_time else time.time()) - started, 1) if started else None,
        "exit_code": job.driver_exit_code,
        "progress": find_progress(lines),
        "line": _plain_text(next(reversed(lines or failed), None)),
        "command": metadata.get("command", job.entrypoint),
    }


def read_log(client: JobSubmissionClient, job_id: str) -> list[str]:
    """Return the lines of a job's log that are not empty, without Ray's own; none if the job was deleted."""
    try:
        lines = client.get_job_logs(job_id).splitlines()
    except RuntimeError:
        return []
    return [line for line in lines if line.strip() and not START_MESSAGES.match(line)]


def find_progress(lines: list[str]) -> dict[str, Any] | None:
    """Return the progress that the last of some lines says; None if none does."""
    for line in reversed(lines):
        found = WINDOWS_DONE.search(line) or EPOCHS_DONE.search(line)
        if found is not None:
            told = found.groupdict()
            return {
                "done": _parse_number(told["done"]),
                "total": _parse_number(told["total"]),
                "unit": f"{told['unit'].removesuffix('s')}s",
                "mpx_s": float(told["mpx_s"]),
                "left": told["left"],
                "failed": _parse_number(told.get("failed") or "0"),
            }
    return None


def _plain_text(line: str | None) -> str | None:
    """Return the message of a line of a log that is a JSON object (--log-format json), and others as they are."""
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(line or "")["message"])
    return line


def _parse_number(text: str) -> int:
    return int(text.replace(",", ""))
