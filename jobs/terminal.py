"""What commands say: figures on standard output, messages on standard error."""

import json
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

# rasterio warns at each read of a scene without georeference. The command line says so itself, once a scene.
NOT_GEOREFERENCED = "Dataset has no geotransform|The given matrix is equal to Affine.identity"
_owned: ContextVar[bool] = ContextVar("_owned", default=False)
STOPS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM has asked the process to end."""


class RayEnded(KeyboardInterrupt):
    """A Ray that was started here has ended by itself."""


@contextmanager
def command_line() -> Iterator[None]:
    """The process belongs to the command line for the time of a command.

    The library's log messages are lines on standard error. Code that is called from another program's process, such as
    a notebook, leaves messages to that program's logging.
    """
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


def owns_process() -> bool:
    """Whether this process is the command line's, so that its standard error may be redirected."""
    return _owned.get()


class _Lines(logging.Handler):
    """Writes each message as a line on what standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def stoppable(final: bool = False) -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C and Terminated for SIGTERM, but only for the first of them.

    What is cleaned up after it is not interrupted by the next: until the block ends, or the process if it is `final`. A
    signal that was ignored before stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOPS}
    handle_stops()
    try:
        yield
    finally:
        stopped = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        for number, handler in before.items():
            if not (stopped and (final or handler is _stop)):
                signal.signal(number, handler)


def handle_stops() -> None:
    """Handle Ctrl-C and SIGTERM as `stoppable` does, also where a library has put a handler of its own in its place."""
    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)


def restore_handlers() -> None:
    """Have the handlers that Python knows of in place again: other code resets them where Python does not see it."""
    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            signal.signal(number, signal.getsignal(number) or signal.SIG_DFL)


def ignore_stops() -> None:
    """Ignore Ctrl-C and SIGTERM."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, _: object) -> NoReturn:
    ignore_stops()
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


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
