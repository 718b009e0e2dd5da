"""The commands that submit jobs to a cluster and manage them.

Each command is one function, which takes the parsed arguments, prints the results and returns the exit code.
"""

import os
import shlex
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from seg_core.errors import JobError, SegError

from ..terminal import note, print_figures

if TYPE_CHECKING:
    from ..submit import Submission

HERE_ONLY = ("submit", "jobs", "logs", "stop", "resume", "view")


def submit(args: Namespace) -> int:
    """Run `seg submit`: submit a command as a job and follow its log."""
    command = args.job[1:] if args.job[:1] == ["--"] else args.job
    if not command:
        raise SegError("submit: no command: use seg submit -- segment ...")
    wanted = _check(args, command)
    from ..submitting.dashboard import connect

    return _submit(args, connect(args.address), wanted)


def _check(args: Namespace, command: list[str], folder: str | None = None) -> "Submission":
    """Check a command, and find out what the job needs to know of it. Wrong usage ends the process.

    `folder` is the one that the command runs in. By default, it is where this process is, or what -C names from there.
    """
    parsed = args.parse(command)
    if parsed.command in HERE_ONLY:
        raise SegError(f"submit: seg {parsed.command} is for this machine: leave out seg submit --")
    if getattr(parsed, "address", None):
        raise SegError(
            f"--address {parsed.address}: a job runs on the cluster that it is submitted to: put the dashboard's "
            "--address before --"
        )
    for flag in ("debug", "no_sign_request"):
        if getattr(args, flag) and not getattr(parsed, flag):
            command = [*command, f"--{flag.replace('_', '-')}"]
    if args.log_format != parsed.log_format == "text":
        command = [*command, "--log-format", args.log_format]
    from seg_core.model.bundle import read_bundle
    from seg_core.storage.files import absolute

    from ..submit import Submission
    from .places import existing_folders, find_local_bundle, find_run

    folder = folder or absolute(parsed.folder or ".")
    bundle = find_local_bundle(parsed, folder)
    return Submission(
        command=command,
        folder=folder,
        name=args.name,
        run=find_run(parsed, folder),
        bundle=bundle,
        bundle_hash=read_bundle(bundle).hash if bundle else None,
        outputs=existing_folders(parsed, folder),
        num_cpus=args.num_cpus,
        num_gpus=args.num_gpus,
    )


def _submit(args: Namespace, client: Any, submission: "Submission") -> int:
    from ..submit import submit as submit_job
    from ..submitting.dashboard import check_version

    check_version(client)
    job_id = submit_job(client, submission)
    if args.no_follow:
        _print_job(client, job_id) if args.json else print(job_id)
        return 0
    note(f"job {job_id}")
    code = _follow(args, client, job_id)
    if code == 0 and submission.run and _is_elsewhere(submission.run):
        note(f"{submission.run}: is on the cluster and not on this machine: read it there, or share the folder")
    return code


def _is_elsewhere(run: str) -> bool:
    """Whether this machine does not see a result."""
    from seg_core.storage.files import is_remote

    return not is_remote(run) and not os.path.exists(run)


def _follow(args: Namespace, client: Any, job_id: str) -> int:
    """Print the log of a job until it ends. Returns its exit code. With --json, the log goes to standard error."""
    from ..submit import LOST_ERRORS, exit_code, follow

    try:
        for text in follow(client, job_id):
            print(text, end="", flush=True, file=sys.stderr if args.json else sys.stdout)
        code = exit_code(client, job_id)
    except KeyboardInterrupt as stopped:
        shown, ended = _command(args, "logs", job_id, "--follow"), _command(args, "stop", job_id)
        stopped.args = (f"the job goes on: {shown} shows it again, {ended} ends it",)
        raise
    except BrokenPipeError:  # who reads our output has gone, and not the cluster
        raise
    except LOST_ERRORS as error:
        raise JobError(
            f"{job_id}: the cluster no longer answers ({error}): what is done stays: submit the same command again "
            "when the cluster is back, and it goes on"
        ) from error
    if args.json:
        _print_job(client, job_id)
    return code


def _command(args: Namespace, *words: str) -> str:
    """Return another command of `seg` for the same cluster."""
    return shlex.join(["seg", *words, *(["--address", args.address] if args.address else [])])


def _print_job(client: Any, job_id: str) -> None:
    from ..submitting.jobs import describe_job, job_info

    print_figures(describe_job(client, job_info(client, job_id)), as_json=True)


def jobs(args: Namespace) -> int:
    """Run `seg jobs`: list the jobs of a cluster."""
    from ..submitting.dashboard import connect
    from ..submitting.jobs import list_jobs

    listed = list_jobs(connect(args.address))
    if args.json:
        print_figures({"jobs": listed}, as_json=True)
    for job in [] if args.json else listed:
        for line in _describe(job):
            print(line)
    return 0


def _describe(job: dict[str, Any]) -> list[str]:
    """Return the lines on a job: what it is, and what is known of its run and progress."""
    what = f"{job['name']}: {job['command']}" if job["name"] else job["command"]
    lines = [f"{job['id']}  {job['status']:<9}  {job['seconds'] or 0:>8.1f} s  {job['user'] or 'unknown'}  {what}"]
    facts = [f"since {job['started']}"] if job["started"] else []
    facts += [f"run {job['run']}"] if job["run"] else []
    facts += [f"bundle {job['bundle'][:8]}"] if job["bundle"] else []
    lines += [f"    {', '.join(facts)}"] if facts else []
    progress = job["progress"]
    if progress:
        failed = f", {progress['failed']:,} tiles failed" if progress["failed"] else ""
        lines.append(
            f"    {progress['done']:,} of {progress['total']:,} {progress['unit']}, {progress['mpx_s']:.2f} Mpx/s, "
            f"{progress['left']} left{failed}"
        )
    elif job["line"]:
        lines.append(f"    {job['line']}")
    return lines


def logs(args: Namespace) -> int:
    """Run `seg logs`: print the log of a job, or follow it to its end."""
    from ..submitting.dashboard import connect
    from ..submitting.jobs import describe_job, job_info, read_log

    client = connect(args.address)
    job = job_info(client, args.id)  # refuses an unknown id
    if args.follow:
        return _follow(args, client, args.id)
    lines = read_log(client, args.id)
    if args.json:
        print_figures({**describe_job(client, job), "log": lines}, as_json=True)
    for line in [] if args.json else lines:
        print(line)
    return 0


def stop(args: Namespace) -> int:
    """Run `seg stop`: stop a job."""
    from ..submit import describe_reserved
    from ..submit import stop as stop_job
    from ..submitting.dashboard import connect

    client = connect(args.address)
    status = stop_job(client, args.id)
    if status == "PENDING":
        raise JobError(
            f"{args.id}: waits for the cluster to start it{describe_reserved(client, args.id)}, and can't be stopped "
            "before: Ray gives it up 15 minutes after it was submitted"
        )
    kept = f": what is done stays: {_command(args, 'resume', args.id)} goes on" if status == "STOPPED" else ""
    note(f"{args.id}: {status}{kept}")
    if args.json:
        _print_job(client, args.id)
    return 0


def resume(args: Namespace) -> int:
    """Run `seg resume`: submit the command of a job again, under its name."""
    from ..submitting.dashboard import connect
    from ..submitting.jobs import job_info

    client = connect(args.address)
    job = job_info(client, args.id)
    metadata = job.metadata or {}
    if not job.status.is_terminal():
        shown, ended = _command(args, "logs", args.id, "--follow"), _command(args, "stop", args.id)
        raise SegError(f"{args.id}: is {job.status}: {shown} shows it, {ended} ends it")
    if "folder" not in metadata:
        raise SegError(f"{args.id}: was not submitted by seg submit: submit its command with seg submit")
    args.name = metadata.get("name")
    for name in ("num_cpus", "num_gpus"):
        setattr(args, name, float(metadata[name]) if name in metadata else None)
    return _submit(args, client, _check(args, shlex.split(metadata["command"]), metadata["folder"]))
