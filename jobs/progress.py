"""A progress line on standard error: one that is rewritten on a terminal, one now and then in a log."""

import sys
import time

LOG_SECONDS = 10.0


class Progress:
    """Windows done of planned, megapixels a second and the time left, counted from when the first worker began."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.pixels, self.failed = total, 0, 0, 0
        self.shown = self.started = time.time()
        self.tty = sys.stderr.isatty()
        print(f"{total:,} windows to segment; starting workers ...", file=sys.stderr, flush=True)

    def update(self, windows: int, pixels: int, started: float, failed: int) -> None:
        """Count work that a worker has finished, begun at the time `started`, and show where all of it stands.

        So many of its tiles failed.
        """
        self.failed += failed
        self.started = min(self.started, started) if self.done else started
        self.done += windows
        self.pixels += pixels
        if self.tty or self.done == self.total or time.time() - self.shown >= LOG_SECONDS:
            self.shown = time.time()
            print(self._line(), file=sys.stderr, end="" if self.tty else "\n", flush=True)

    def end(self) -> None:
        """Leave the last line standing."""
        if self.tty:
            print(file=sys.stderr)

    def _line(self) -> str:
        seconds = time.time() - self.started
        left = seconds / self.done * (self.total - self.done)
        rate = self.pixels / seconds / 1e6
        line = f"{self.done:,} of {self.total:,} windows, {rate:.2f} Mpx/s, {clock(left)} left"
        line += f", {self.failed:,} tiles failed" if self.failed else ""
        return f"\r\x1b[K{line}" if self.tty else line


def clock(seconds: float) -> str:
    """A duration as 1:02:03 or 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
