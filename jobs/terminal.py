"""Terminal output and stop signals: figures go to standard output, messages to standard error."""

import json
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, NoReturn

# rasterio warns at each read of a scene without georeference. The command line says so itself, once a scene.
NOT_GEOREFERENCED = "Dataset has no geotransform|The given matrix is equal to Affine.identity"
_owned: ContextVar[bool] = ContextVar("_owned", default=False)
TABLE_ROWS = 100  # of a table, at most
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_log_fields: dict[str, Any] | None = None  # in each line if messages are JSON objects; None: they are plain text


class Terminated(KeyboardInterrupt):
    """The process has received SIGTERM."""


class RayEnded(KeyboardInterrupt):
    """An essential process of the Ray that this command started has ended unexpectedly."""


@contextmanager
def command_line(log_format: str = "text") -> Iterator[None]:
    """The process belongs to the command line for the time of a command.

    The library's log messages are lines on standard error. Code that is called from another program's process, such as
    a notebook, leaves messages to that program's logging. With the format `json`, each message is a JSON object.
    """
    global _log_fields  # noqa: PLW0603 - threads write messages too, and they have no context of their own
    _log_fields = {} if log_format == "json" else None
    log, handler = logging.getLogger("seg_core"), _Lines(logging.WARNING)
    before = log.propagate
    token = _owned.set(True)
    log.addHandler(handler)
    log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", NOT_GEOREFERENCED)
            yield
    finally:
        log.removeHandler(handler)
        log.propagate = before
        _owned.reset(token)
        _log_fields = None


def owns_process() -> bool:
    """Whether this process is the command line's, so that its standard error may be redirected."""
    return _owned.get()


class _Lines(logging.Handler):
    """Writes each message as a line on what standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage(), level=record.levelname.lower())


@contextmanager
def stoppable(final: bool = False) -> Iterator[None]:
    """Raise KeyboardInterrupt at the first Ctrl-C, or Terminated at the first SIGTERM, within the block.

    Further signals are ignored, so that they don't interrupt the clean-up: until the block ends, or until the process
    ends if `final`. A signal that was ignored before the block stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOP_SIGNALS}
    handle_stops()
    try:
        yield
    finally:
        stopped = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        for number, handler in earlier.items():
            if not (stopped and (final or handler is _stop)):
                signal.signal(number, handler)


def handle_stops() -> None:
    """Install the handlers of `stoppable` for Ctrl-C and SIGTERM, also in place of a library's own handlers."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)


def restore_handlers() -> None:
    """Install the signal handlers known to Python again, since C++ code may have reset them unseen by Python."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.getsignal(number) or signal.SIG_DFL)


def ignore_stops() -> None:
    """Ignore Ctrl-C and SIGTERM."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, _: object) -> NoReturn:
    ignore_stops()
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """Print figures as one JSON object, or as one line per figure."""
    if as_json:
        print(json.dumps(figures))
        return
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        print(f"{name:<{width}}  {format_value(value)}")


def format_value(value: object) -> str:
    """Return a value as text for people."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if isinstance(value, float) else str(value)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows with the same keys as a table, below a line of the keys."""
    widths = {name: max(len(name), *(len(format_value(row[name])) for row in rows)) for name in rows[0]}
    print("  ".join(f"{name:>{width}}" for name, width in widths.items()))
    for row in rows:
        print("  ".join(f"{format_value(row[name]):>{width}}" for name, width in widths.items()))


def note(line: str, **fields: Any) -> None:
    """Print a message to standard error. `fields` are further facts, which only messages as JSON show."""
    print(format_message(line, **fields), file=sys.stderr, flush=True)


def format_message(line: str, **fields: Any) -> str:
    """Return a message as it is, or as a JSON object with its time (UTC), its level, its text and the fields."""
    if _log_fields is None:
        return line
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "level": "info", "message": line, **_log_fields, **fields})


def logs_json() -> bool:
    """Whether messages are JSON objects."""
    return _log_fields is not None


def add_log_field(name: str, value: object) -> None:
    """Have all further messages of this command say something, such as the run that they are about."""
    if _log_fields is not None:
        _log_fields[name] = value
