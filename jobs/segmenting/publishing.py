"""Publish parts as soon as all of their windows are segmented, while others are being segmented.

windows ─▶ unfinished parts; rows of large ones are made early ─▶ writers ─▶ published parts, in order
"""

from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from functools import partial

from seg_core.grid import num_splits
from seg_core.run.check import Expected
from seg_core.run.fence import Store
from seg_core.run.ledger import EnteredPart, write_ledger
from seg_core.run.plan import Part
from seg_core.run.rows import Row

from ..resources import MAX_UNPUBLISHED_PARTS
from .guard import CrashGuard
from .stopwatch import Stopwatch
from .writers import MakeRows, PublishedPart, WindowRows, make_rows, publish_part

MAX_PENDING_WINDOWS = 32  # windows of a part; if it has more, making rows begins before all of them are segmented


class UnfinishedPart:
    """A part whose windows are not all segmented yet. It collects the functions that make their rows.

    For a part of more than `most` windows, rows are made before it is finished, so that masks do not fill the memory.
    """

    def __init__(self, num_windows: int, most: int, writers: Executor, clock: Stopwatch) -> None:
        self.missing, self.most, self.writers, self.clock = num_windows, most, writers, clock
        self.waiting: deque[MakeRows] = deque()
        self.making: list[Future[tuple[list[Row], float]]] = []

    def add(self, make: MakeRows) -> bool:
        """Add the function that makes the rows of a window. Returns whether this was the last window of the part."""
        self.waiting.append(make)
        self.missing -= 1
        if self.missing and len(self.waiting) == self.most:
            self.making.append(self.writers.submit(make_rows, self.waiting.popleft()))
            wait(self.making[:-MAX_PENDING_WINDOWS])
        return self.missing == 0

    def windows(self) -> list[MakeRows]:
        """Return the functions that make the rows of each window, or return those made before."""
        return [*map(self._rows_of, self.making), *self.waiting]

    def _rows_of(self, making: Future[tuple[list[Row], float]]) -> MakeRows:
        rows, seconds = making.result()
        self.clock.add("writing", seconds)
        return partial(iter, rows)


class Publisher:
    """Publishes the parts of a run in writers. These are threads, or with a GPU processes, which may lag behind."""

    def __init__(
        self,
        run: str,
        expected: Expected,
        writers: Executor,
        on_gpu: bool,
        guard: CrashGuard,
        clock: Stopwatch,
        store: Store,
    ) -> None:
        self.run, self.expected, self.writers, self.store = run, expected, writers, store
        self.on_gpu, self.guard, self.clock = on_gpu, guard, clock
        self.entered: list[EnteredPart] = []  # parts that are published, and not in the ledger yet

    def publish(
        self, windows: Iterable[WindowRows], side: int, interrupted: Container[str]
    ) -> Iterator[tuple[Part, PublishedPart]]:
        """Publish parts, whose windows have `side` px. Yields them when published, in the order of their last windows.

        An interrupted part is published before the next window is segmented, because that could crash the process.
        """
        publishing: deque[tuple[Part, Future[PublishedPart]]] = deque()
        for part, finished in self.finished_parts(windows, side):
            publishing.append((part, self.submit(part, finished)))
            may_wait = MAX_UNPUBLISHED_PARTS if self.on_gpu and part.key not in interrupted else 0
            while len(publishing) > may_wait:
                yield self.wait_for(*publishing.popleft())
        while publishing:
            yield self.wait_for(*publishing.popleft())

    def finished_parts(self, windows: Iterable[WindowRows], side: int) -> Iterator[tuple[Part, list[MakeRows]]]:
        """Yield each part as soon as its last window arrives, with the functions that make its rows."""
        most = MAX_PENDING_WINDOWS if self.on_gpu else 1
        unfinished: dict[str, UnfinishedPart] = {}
        for part, make in windows:
            if part.key not in unfinished:
                number = num_splits(part.window, side)
                unfinished[part.key] = UnfinishedPart(number, most, self.writers, self.clock)
            if unfinished[part.key].add(make):
                yield part, unfinished.pop(part.key).windows()

    def submit(self, part: Part, windows: Sequence[MakeRows]) -> Future[PublishedPart]:
        """Start making and publishing the rows of a part."""
        # A skipped window is remembered until the end of the task: a task that is repeated does all of its parts again.
        given_up = self.guard.given_up.get(part.key)
        return self.writers.submit(publish_part, self.run, part, windows, self.expected, given_up, self.store)

    def wait_for(self, part: Part, publishing: Future[PublishedPart]) -> tuple[Part, PublishedPart]:
        """Wait until a part is published."""
        published = publishing.result()
        self.guard.forget(part)
        self.clock.add("writing", published.seconds)
        if published.entered is not None:
            self.entered.append(published.entered)
        return part, published

    def end_task(self) -> None:
        """Enter the parts of a task into the ledger."""
        write_ledger(self.run, self.entered, self.expected, self.store)
        self.entered = []
