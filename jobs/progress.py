"""Progress on standard error: a terminal gets one line that is rewritten, a log gets a new line every 10 s."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from .terminal import format_message, logs_json, note

LOG_INTERVAL = 10.0  # s
TERMINAL_INTERVAL = 1.0  # s
CLEAR_LINE = "\r\x1b[K"  # moves a terminal's cursor to the beginning of the line and clears the line


class StatusLine:
    """A line that is shown again at regular intervals, so that a command that takes long is seen to be alive."""

    def __init__(
        self,
        line: Callable[[], str],
        stream: TextIO | None = None,
        figures: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.line, self.stream, self.figures = line, stream or sys.stderr, figures
        self.tty = self.stream.isatty() and not logs_json()
        self.interval = TERMINAL_INTERVAL if self.tty else LOG_INTERVAL
        # The first line is due after half of that time, since a command may have been at work before.
        self.shown_at = time.monotonic() - self.interval / 2
        self.lock, self.done = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._show_regularly, daemon=True)
        self.thread.start()

    @property
    def seconds_left(self) -> float:
        """Seconds until the next line is due."""
        return self.shown_at + self.interval - time.monotonic()

    def show(self) -> None:
        """Show the line as it is now."""
        with self.lock:
            self.shown_at = time.monotonic()
            line = self.line()
            text = f"{CLEAR_LINE}{line}" if self.tty else f"{format_message(line, **self.figures())}\n"
            print(text, end="", file=self.stream, flush=True)

    def note(self, line: str, **fields: Any) -> None:
        """Show a message that is not overwritten by the next line. `fields` are as in `terminal.note`."""
        with self.lock:
            self.shown_at = time.monotonic()
            text = f"{CLEAR_LINE}{line}" if self.tty else format_message(line, **fields)
            print(text, file=self.stream, flush=True)

    def end(self, last: str) -> None:
        """Stop showing the line. On a terminal, write `last`: a newline keeps the line, CLEAR_LINE removes it."""
        self.done.set()
        self.thread.join()
        if self.tty:
            print(last, end="", file=self.stream, flush=True)

    def _show_regularly(self) -> None:
        while not self.done.wait(max(0.0, self.seconds_left)):
            if self.seconds_left <= 0:
                self.show()


@contextmanager
def waiting(what: str, stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """Show `what` and the time since the block began, until it ends. Yields a function that sets a progress text."""
    started, progress = time.monotonic(), ""

    def report(text: str) -> None:
        nonlocal progress
        progress = f": {text}"

    status = StatusLine(lambda: f"{what}{progress} ... {format_duration(time.monotonic() - started)}", stream)
    try:
        yield report
    finally:
        status.end(CLEAR_LINE)


class Progress:
    """Shows the windows done, megapixels per second and the time left, timed from the start of the first worker."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.pixels, self.failed = total, 0, 0, 0
        self.created = self.started = time.time()
        self.missing: Callable[[], str] = str  # what the cluster lacks for the work, in words
        note(f"{total:,} windows to segment; starting workers ...")
        self.status = StatusLine(self._line, figures=self.figures)

    def update(self, windows: int, pixels: int, started: float, failed: int) -> None:
        """Count the windows, pixels and failed tiles that a worker has finished, and show the line if it is due.

        The worker began them at the time `started`, in seconds since 1970.
        """
        self.failed += failed
        self.started = min(self.started, started) if self.done else started
        self.pixels += pixels
        self.done += windows
        if self.status.tty or self.done == self.total or self.status.seconds_left <= 0:
            self.status.show()

    def end(self) -> None:
        """Stop showing progress, and keep the last line."""
        self.status.end("\n")

    def figures(self) -> dict[str, float | None]:
        """Return the figures by the names of `metrics.METRICS`. What is not known yet is None."""
        seconds = time.time() - self.started
        return {
            "windows_done": self.done,
            "windows_total": self.total,
            "tiles_failed": self.failed,
            "mpx_per_second": self.pixels / seconds / 1e6 if self.done else None,
            "seconds_left": seconds / self.done * (self.total - self.done) if self.done else None,
        }

    def _line(self) -> str:
        if missing := self.missing():
            return f"{self.done:,} of {self.total:,} windows, waiting for a node: {missing}"
        figures = self.figures()
        rate, left = figures["mpx_per_second"], figures["seconds_left"]
        if rate is None or left is None:
            waited = format_duration(time.time() - self.created)
            return f"0 of {self.total:,} windows, waiting for workers to finish the first part ... {waited}"
        line = f"{self.done:,} of {self.total:,} windows, {rate:.2f} Mpx/s, {format_duration(left)} left"
        return line + (f", {self.failed:,} tiles failed" if self.failed else "")


def format_duration(seconds: float) -> str:
    """Return a duration in seconds as h:mm:ss or m:ss."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
