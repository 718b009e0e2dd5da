"""How long a query may take, for a program that can't be stopped by Ctrl-C alone, such as a server."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import duckdb

AGAIN = 0.05  # s between interrupts: one that comes before a query has begun has no effect


class Limit:
    """Interrupts a query when its time is over, or when it is told to. It is for one query."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.is_passed = False  # whether the query was interrupted
        self._stop, self._done = Event(), Event()

    def stop(self) -> None:
        """Interrupt the query now, from any thread."""
        self._stop.set()

    @contextmanager
    def applied(self, connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
        """Watch what the connection does within the block."""
        watcher = Thread(target=self._watch, args=(connection,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._done.set()
            self._stop.set()
            watcher.join()

    def _watch(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._stop.wait(self.seconds)
        while not self._done.wait(AGAIN):
            self.is_passed = True
            connection.interrupt()
