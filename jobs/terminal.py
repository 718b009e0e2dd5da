"""What commands say: figures on standard output, messages on standard error."""

import json
import sys
from collections.abc import Sequence
from typing import Any


class Terminated(KeyboardInterrupt):
    """The process was told to end by SIGTERM."""


def show(figures: dict[str, Any], as_json: bool) -> None:
    """Print figures: one JSON object, or a line each."""
    if as_json:
        print(json.dumps(figures))
        return
    wide = max(map(len, figures), default=0)
    for name, value in figures.items():
        print(f"{name:<{wide}}  {text(value)}")


def text(value: object) -> str:
    """A value as a person reads it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if isinstance(value, float) else str(value)


def show_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print figures that have the same names, a line each below their names."""
    wide = {name: max(len(name), *(len(text(row[name])) for row in rows)) for name in rows[0]}
    print("  ".join(f"{name:>{wide[name]}}" for name in wide))
    for row in rows:
        print("  ".join(f"{text(row[name]):>{wide[name]}}" for name in wide))


def note(line: str) -> None:
    """A message, on standard error."""
    print(line, file=sys.stderr, flush=True)
