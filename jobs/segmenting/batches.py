"""Segment windows in batches of one size, and in smaller ones if the device runs out of memory.

loaded windows ─▶ batches ─▶ started, several at once on a GPU ─▶ finished ─▶ functions that make their rows
                                ▲                                   │
                                └── half of the batch; a single ◀───┘ out of memory
                                    window again, then halved
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from seg_core.grid import Window, chip_window, num_splits, round_up, split
from seg_core.run.plan import Part, ReadBlock, Settings, WindowTask
from seg_core.run.rows import Failure, PartialFailure, Row, failed_rows, tile_rows

from ..resources import ExecutionOptions
from .device import BatchRunner, StartedBatch, is_out_of_memory
from .guard import end_if_lost
from .reading import LoadedWindow, UnreadableWindow, WindowReader
from .seams import SeamChecker
from .writers import WindowRows

if TYPE_CHECKING:
    from seg_core.model.segmenter import Segmenter


class BatchSegmenter:
    """Segments windows in batches. If memory runs out, it continues with smaller batches or windows."""

    def __init__(
        self,
        settings: Settings,
        segmenter: "Segmenter",
        reader: WindowReader,
        seams: SeamChecker,
        window: int,
        execution: ExecutionOptions,
    ) -> None:
        self.settings, self.segmenter, self.reader, self.seams = settings, segmenter, reader, seams
        self.runner = BatchRunner(settings, segmenter, reader.clock)
        self.window = window  # px; side of the windows
        self.batch = execution.batch  # windows per batch; None until it is chosen
        self.compiles_at_once = execution.compiling == "yes"

    def infer(self, parts: Sequence[Part], side: int) -> Iterator[WindowRows]:
        """Read and segment the windows, of `side` px, of parts. Yields each when it is segmented."""
        if self.batch is None:
            self.batch = self.choose_batch([window for part in parts for window in split(part.window, side)])
        started: deque[StartedBatch | UnreadableWindow] = deque()
        with closing(self.reader.read_ahead(parts, side, self.batch)) as windows:
            for batch in self.batches(windows):
                started.append(batch if isinstance(batch, UnreadableWindow) else self.start(batch))
                while len(started) > self.segmenter.in_flight:
                    yield from self.finish(started.popleft())
                self.reader.add_threads()
        while started:
            yield from self.finish(started.popleft())

    def choose_batch(self, windows: Sequence[Window]) -> int:
        """Return how many of the largest windows to segment at once."""
        bundle = self.segmenter.bundle
        largest = max(windows, key=lambda window: window.num_pixels)
        chip = chip_window(largest, self.settings.halo, bundle.stride, bundle.min_chip)
        return self.segmenter.find_batch(bundle.bands, chip.height, chip.width)

    def batches(
        self, windows: Iterable[LoadedWindow | UnreadableWindow]
    ) -> Iterator[list[LoadedWindow] | UnreadableWindow]:
        """Group consecutive windows of one size to batches. Windows that can't be read are yielded one by one."""
        batch: list[LoadedWindow] = []
        for each in windows:
            is_full = len(batch) >= (self.batch or 1)
            if batch and (is_full or batch[0].task.window.shape != each.task.window.shape):
                yield batch
                batch = []
            if isinstance(each, LoadedWindow):
                batch.append(each)
                continue
            if batch:
                yield batch
                batch = []
            yield each
        if batch:
            yield batch

    def start(self, windows: Sequence[LoadedWindow], retried: bool = False) -> StartedBatch:
        """Start segmenting windows of one size together. `retried` says that a single window is tried again."""
        # Incomplete batches, such as the last one of a task, are rare.
        may_compile = not self.compiles_at_once or len(windows) >= (self.batch or 1)
        return self.runner.start(windows, may_compile, retried)

    def finish(self, batch: StartedBatch | UnreadableWindow) -> Iterator[WindowRows]:
        """Wait for the results of a batch. Yields its windows."""
        if isinstance(batch, UnreadableWindow):
            yield self.failed(batch)
            return
        results = self.runner.wait_for(batch)
        if isinstance(results, Exception):
            yield from self.retry_with_less(batch, results)
            return
        for (task, _), result in zip(batch.windows, results, strict=True):
            self.seams.check(task, result)
            make = partial(tile_rows, task.part.scene, task.window, self.settings.tile_size, result.figures)
            yield WindowRows(task.part, make)

    def retry_with_less(self, batch: StartedBatch, error: Exception) -> Iterator[WindowRows]:
        """Segment a failed batch again, with half as many windows at once, or a single window in pieces.

        If memory ran out, later batches and windows get smaller too.
        """
        end_if_lost(self.segmenter)
        self.segmenter.free_memory()
        windows, out_of_memory = batch.windows, is_out_of_memory(error)
        if len(windows) > 1:
            half = len(windows) // 2
            if out_of_memory:
                self.batch = half
            for first in range(0, len(windows), half):
                yield from self.finish(self.start(windows[first : first + half]))
        elif out_of_memory and not batch.retried:  # the batches before it have left the device by now
            yield from self.finish(self.start(windows, retried=True))
        else:
            task = windows[0].task
            yield WindowRows(task.part, partial(iter, self.smaller_rows(task, error)))

    def smaller_rows(self, task: WindowTask, error: Exception) -> list[Row]:
        """Segment a window that the device can't process in smaller ones. Returns their rows, or failed ones."""
        part, window, settings = task.part, task.window, self.settings
        half = round_up(max(window.shape) // 2, settings.tile_size)
        if not is_out_of_memory(error) or settings.context_exceeds_halo or half >= max(window.shape):
            reason = (str(error) or "out of memory").splitlines()[0]
            failure = Failure(type(error).__name__, f"{part.scene.uri}: {reason}")
            return list(failed_rows(part.scene, window, settings.tile_size, failure))
        self.window = min(self.window, half)
        return [row for smaller in split(window, half) for row in self.rows(part, smaller)]

    def rows(self, part: Part, window: Window) -> list[Row]:
        """Read and segment a single window, and return its rows."""
        (read,) = self.reader.read(ReadBlock(part, (window,)))
        batch = read if isinstance(read, UnreadableWindow) else self.start([read])
        return [row for each in self.finish(batch) for row in each.make()]

    def failed(self, window: UnreadableWindow) -> WindowRows:
        """Return failed rows for a window that can't be read. If only parts of it are damaged, try tile by tile."""
        part, at, size = window.task.part, window.task.window, self.settings.tile_size
        if isinstance(window.failure, PartialFailure) and num_splits(at, size) > 1:
            rows = [row for tile in split(at, size) for row in self.rows(part, tile)]
            return WindowRows(part, partial(iter, rows))
        return WindowRows(part, partial(failed_rows, part.scene, at, size, window.failure))
