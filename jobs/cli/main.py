"""The command line `seg`. What a command needs is imported when the command runs, so that `--help` is quick."""

import argparse
import os
import sys
from collections.abc import Sequence

from seg_core.errors import JobError, SegError
from seg_core.storage.s3 import ANONYMOUS

from ..terminal import RayEnded, Terminated, command_line, stoppable
from .parser import make_parser

# These hide Ray's own messages, which --debug shows. Ray reads them when it is imported, which is later.
QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
}
RESUMES, RUNS_ON = "; the same command goes on from here", "; the job goes on without us: seg stop ends it"
GOES_ON = {"segment": RESUMES, "train": RESUMES, "submit": RUNS_ON, "logs": RUNS_ON}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0: all done; 1: finished, but something failed; 2: wrong use or refused input."""
    args = make_parser().parse_args(argv)
    _set_environment(args)
    with stoppable(final=True), command_line():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        if args.folder is not None:
            _enter(args.folder)
        return int(args.carry_out(args))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        print(f"seg: {str(stop) or 'stopped'}{GOES_ON.get(args.command, '')}", file=sys.stderr, flush=True)
        if isinstance(stop, RayEnded):
            os._exit(1)  # at the end of the process Ray would wait for what has ended
        return 143 if isinstance(stop, Terminated) else 130
    except SegError as error:
        if args.debug:
            raise
        print(f"seg: {error}", file=sys.stderr)
        return 1 if isinstance(error, JobError) else 2
    except Exception as error:
        if args.debug:
            raise
        lines = str(error).strip().splitlines() or [""]
        print(f"seg: {type(error).__name__}: {lines[-1]} (--debug shows more)", file=sys.stderr)
        return 1


def _set_environment(args: argparse.Namespace) -> None:
    if not args.debug:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
    if args.no_sign_request:
        os.environ[ANONYMOUS] = "YES"  # inherited by all processes that read


def _enter(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise SegError(f"-C {folder}: no such folder on this machine: relative paths are taken from it") from error


if __name__ == "__main__":
    sys.exit(main())
