"""The command line `seg`. Each command imports its modules when it runs, so that `--help` is quick."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from seg_core.errors import JobError, SegError
from seg_core.storage.s3 import ANONYMOUS

from ..terminal import RayEnded, Terminated, command_line, note, stoppable
from .parser import make_parser

JOB_COMMANDS = {"submit", "jobs", "logs", "stop", "resume"}  # which ask a dashboard
RAY_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
RAY_TOKEN_FILE = "~/.ray/auth_token"  # noqa: S105 - its path
# These hide Ray's own messages, which --debug shows. Ray reads them at import, which comes after they are set.
QUIET_RAY_ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
}
RESUMABLE = "; the same command goes on from here"
ADVICE_WHEN_STOPPED = {"segment": RESUMABLE, "train": RESUMABLE}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code.

    The codes are 0: all done; 1: finished, but something failed; 2: wrong usage or refused input.
    """
    return carry_out(make_parser().parse_args(argv))


def carry_out(args: argparse.Namespace) -> int:
    """Run the command of parsed arguments. Returns the exit code."""
    _set_environment(args)
    with stoppable(final=True), command_line(args.log_format):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        if args.folder is not None:
            _change_folder(args.folder)
        return int(args.carry_out(args))
    except BrokenPipeError:  # the program that reads our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        advice = ADVICE_WHEN_STOPPED.get(args.command, "")
        note(f"seg: {str(stop) or 'stopped'}{advice}", level="warning")
        if isinstance(stop, RayEnded):
            os._exit(1)  # on a normal exit Ray would wait for the process that has ended
        return 143 if isinstance(stop, Terminated) else 130
    except SegError as error:
        if args.debug:
            traceback.print_exc()
        note(f"seg: {error}", level="error")
        return 1 if isinstance(error, JobError) else 2
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        more = "" if args.debug else " (--debug shows more)"
        note(f"seg: {type(error).__name__}: {lines[-1]}{more}", level="error")
        return 1


def _set_environment(args: argparse.Namespace) -> None:
    if not args.debug:
        for name, value in QUIET_RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    # A thread that asks Ray for something after it has ended would start another Ray.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    # Ray's clients would not send it otherwise. A command that joins a cluster must have the mode of the cluster.
    if args.command in JOB_COMMANDS and (
        any(os.environ.get(name) for name in RAY_TOKENS) or os.path.exists(os.path.expanduser(RAY_TOKEN_FILE))
    ):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if args.no_sign_request:
        os.environ[ANONYMOUS] = "YES"  # inherited by all processes that read files


def _change_folder(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise SegError(
            f"-C {folder}: no such folder on this machine: name the folder that relative paths start from"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
