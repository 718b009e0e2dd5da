"""What the commands that export from a run print at their end."""

from argparse import Namespace
from typing import Any

from ..terminal import note, print_figures


def print_exported(args: Namespace, known: dict[str, Any], figures: dict[str, Any], meaning: str) -> int:
    """Print the figures of what was written, and how much of the run is not known. Returns the exit code.

    `known` is the summary of the run. `meaning` says what became of tiles that failed or are missing.
    """
    from seg_core.run.query import describe

    unknown = {name: known[name] for name in ("failed", "missing")}
    print_figures((figures if args.json else {"run": describe(known), **figures}) | unknown, args.json)
    number = sum(unknown.values())
    if number:
        note(f"{number:,} tiles failed or are not done yet: {meaning} (exit code 1)")
    return 1 if number else 0
