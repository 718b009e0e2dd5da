"""What is under way, on standard error: a line that is rewritten on a terminal, one every 10 s in a log."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

LOG_SECONDS = 10.0
TERMINAL_SECONDS = 1.0
CLEAR = "\r\x1b[K"  # has a terminal go back to the beginning of its line, and clear it


class Ticker:
    """Shows a line whenever nothing has been shown for a while: nobody should have to guess whether a command lives."""

    def __init__(self, line: Callable[[], str], stream: TextIO | None = None) -> None:
        self.line, self.stream = line, stream or sys.stderr
        self.tty = self.stream.isatty()
        self.period = TERMINAL_SECONDS if self.tty else LOG_SECONDS
        self.shown, self.lock, self.done = time.monotonic(), threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True)
        self.thread.start()

    @property
    def rest(self) -> float:
        """Seconds until the next line is due."""
        return self.shown + self.period - time.monotonic()

    def show(self) -> None:
        """Show the line as it is now."""
        with self.lock:
            self.shown = time.monotonic()
            text = f"{CLEAR}{self.line()}" if self.tty else f"{self.line()}\n"
            print(text, end="", file=self.stream, flush=True)

    def note(self, line: str) -> None:
        """Show a line that stays."""
        with self.lock:
            self.shown = time.monotonic()
            print(f"{CLEAR}{line}" if self.tty else line, file=self.stream, flush=True)

    def end(self, last: str) -> None:
        """Show no more lines; on a terminal `last` is written behind, or over, the one that stands there."""
        self.done.set()
        self.thread.join()
        if self.tty:
            print(last, end="", file=self.stream, flush=True)

    def _tick(self) -> None:
        while not self.done.wait(max(0.0, self.rest)):
            if self.rest <= 0:
                self.show()


@contextmanager
def waiting(what: str, stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """Show what is waited for and for how long, until the block ends. Yields a function that adds how far it is."""
    began, further = time.monotonic(), ""

    def say(text: str) -> None:
        nonlocal further
        further = f": {text}"

    ticker = Ticker(lambda: f"{what}{further} ... {clock(time.monotonic() - began)}", stream)
    try:
        yield say
    finally:
        ticker.end(CLEAR)


class Progress:
    """Windows done of planned, megapixels a second and the time left, counted from when the first worker began."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.pixels, self.failed = total, 0, 0, 0
        self.created = self.started = time.time()
        print(f"{total:,} windows to segment; starting workers ...", file=sys.stderr, flush=True)
        self.ticker = Ticker(self._line)

    def update(self, windows: int, pixels: int, started: float, failed: int) -> None:
        """Count work that a worker has finished, begun at the time `started`, and show where all of it stands.

        So many of its tiles failed.
        """
        self.failed += failed
        self.started = min(self.started, started) if self.done else started
        self.pixels += pixels
        self.done += windows
        if self.ticker.tty or self.done == self.total or self.ticker.rest <= 0:
            self.ticker.show()

    def end(self) -> None:
        """Leave the last line standing."""
        self.ticker.end("\n")

    def _line(self) -> str:
        if not self.done:
            waited = clock(time.time() - self.created)
            return f"0 of {self.total:,} windows, waiting for workers to finish the first part ... {waited}"
        seconds = time.time() - self.started
        left = seconds / self.done * (self.total - self.done)
        rate = self.pixels / seconds / 1e6
        line = f"{self.done:,} of {self.total:,} windows, {rate:.2f} Mpx/s, {clock(left)} left"
        return line + (f", {self.failed:,} tiles failed" if self.failed else "")


def clock(seconds: float) -> str:
    """A duration as 1:02:03 or 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
