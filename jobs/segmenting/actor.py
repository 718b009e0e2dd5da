"""The process that segments parts on one device.

    readers ─ chips ─▶ device, several batches under way ─ answers ─▶ writers: rows, then the part's file ─▶ receipt

Readers are threads: GDAL and Arrow release the interpreter's lock. So are writers on a CPU; beside a GPU they are
processes.
"""

import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Any, TypeAlias

from seg_core.errors import ReadError, StoreUnavailableError
from seg_core.grid import Window, chip_window, num_splits, round_up, split
from seg_core.inference.windows import (
    compare_across_border,
    may_be_in_places,
    stage_windows,
    start_windows,
)
from seg_core.run.attempts import Attempt, claim_interrupted, mark_done, mark_started, mark_window
from seg_core.run.fence import PLAIN, Store
from seg_core.run.plan import Part, ReadBlock, Settings, WindowTask
from seg_core.run.rows import Failure, PartialFailure, Row, failed_rows, tile_rows
from seg_core.run.sizing import chip_memory, choose_read_blocks, enough_readers, fit_window, gpu_share
from seg_core.threads import prefetch

from ..resources import MAX_UNPUBLISHED_PARTS, ActorResources, ExecutionOptions
from .bottleneck import Stopwatch
from .writers import MakeRows, PublishedPart, make_rows, make_writers, publish_part

if TYPE_CHECKING:
    from seg_core.model.segmenter import DeviceChip, Pending, WindowResult

MAX_PENDING_WINDOWS = 32  # windows of a part, beyond which rows are begun to be made before all of it is segmented
# s that a thread may keep the interpreter from the one that gives a GPU its work; by default 50 times that.
GPU_SWITCH_INTERVAL = 1e-4
WINDOWS_TO_COUNT_READERS = 4  # windows for each reading thread, by which it is found how many threads must read
# Receipts that are passed on together beside a GPU: each time costs the process that starts its work 2 ms.
RECEIPTS_TOGETHER = 8

Chips: TypeAlias = "list[tuple[WindowTask, DeviceChip]]"  # of windows of one size
Unreadable: TypeAlias = tuple[WindowTask, Failure]


class PartSegmenter:
    """An actor with a model: reads the windows of its parts ahead in threads, segments them, publishes the rows."""

    def __init__(
        self,
        model: str,
        out: str,
        settings: Settings,
        window: int,
        resources: ActorResources,
        execution: ExecutionOptions,
        session: str,
        watched: frozenset[str] = frozenset(),
        store: Store = PLAIN,
    ) -> None:
        # torch and OpenCV come late, so that the driver doesn't pay for them.
        import cv2
        import torch

        from seg_core.model.segmenter import Segmenter

        torch.set_num_threads(resources.threads)
        cv2.setNumThreads(1)
        sys.setswitchinterval(GPU_SWITCH_INTERVAL)
        self.segmenter = Segmenter(model, execution.device, precision=settings.precision, compiling=execution.compiling)
        self.out, self.settings, self.planned, self.session, self.store = out, settings, window, session, store
        # Smaller ones once the device's memory has run out.
        self.gpu_memory = gpu_share(self.segmenter.memory, resources.num_gpus)
        self.window = fit_window(window, execution.window, settings, self.segmenter.bundle, self.gpu_memory)
        self.resources, self.batch, self.at_once = resources, execution.batch, execution.compiling == "yes"
        self.watched = watched
        self.seams: dict[str, Future[tuple[int, int]]] = {}  # of watched parts: see compare_across_border
        self.watchers = ThreadPoolExecutor(resources.writers)
        self.on_cpu = 0  # windows that the device has not decoded
        self.readers = resources.readers_to(settings.decode)
        self.turns = threading.Semaphore(self.readers)
        self.stood_still = False  # threads that read, while the network was compiled for a batch that is under way
        self.begun: set[str] = set()  # parts that are said to be at work
        self.given_up: dict[str, Attempt] = {}  # of those in which a window is
        self.writers = make_writers(resources.writers, processes=self.segmenter.on_gpu)
        self.model = self.segmenter.bundle.hash
        self.name, self.clock = uuid.uuid4().hex, Stopwatch()
        self.segmenter.decoder.at_work = partial(self.clock.on, "decoding")

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        """The receipts of the parts of a batch of lists of parts."""
        parts = [Part.from_row(row) for rows in batch["parts"] for row in rows]
        receipts = self.segment_parts(parts)
        # Groups never depend on time: of a task that is tried again Ray drops as many as it has got.
        together = 1  # the first one soon, for it says what the run is made by
        try:
            while known := list(islice(receipts, together)):
                yield {"receipts": [known]}
                together = RECEIPTS_TOGETHER if self.segmenter.on_gpu else 1
        except BrokenExecutor:  # a writing process was killed, as for want of memory: as if it had been this one
            os._exit(1)

    def segment_parts(self, parts: Sequence[Part]) -> Iterator[Row]:
        """Segment and publish parts; yields a receipt for each."""
        started = time.time()
        publishing: deque[tuple[Part, Future[PublishedPart]]] = deque()
        careful = claim_interrupted(self.out, [part.key for part in parts], self.session, self.store)
        self.begun |= set(careful)
        if careful:  # to look at a neighbour could end the process in another window's name
            self.watched -= {part.key for part in parts}
        for part, windows in self.parts_windows(parts, careful):
            publishing.append((part, self.publish(part, windows)))
            # What a careful part has come to must be known before another window can end the process.
            beside = MAX_UNPUBLISHED_PARTS if self.segmenter.on_gpu and part.key not in careful else 0
            while len(publishing) > beside:
                yield (receipt := self.receipt(*publishing.popleft(), started))
                started = receipt["ended"]
        for each in publishing:
            yield (receipt := self.receipt(*each, started))
            started = receipt["ended"]
        for key in self.given_up:
            mark_done(self.out, key, self.store)
        self.given_up.clear()

    def parts_windows(
        self, parts: Sequence[Part], careful: Mapping[str, Attempt]
    ) -> Iterator[tuple[Part, list[MakeRows]]]:
        """Each part with what makes the rows of its windows."""
        size, most = self.window, MAX_PENDING_WINDOWS if self.segmenter.on_gpu else 1
        # Nothing is read ahead beside a careful part: it could end the process in the name of that one's window.
        for is_careful, stretch in groupby(parts, lambda part: part.key in careful):
            alike = list(stretch)
            made = self.infer_carefully(alike, size, careful) if is_careful else self.infer(alike, size)
            for part in alike:
                windows: deque[MakeRows] = deque()
                early: list[Future[tuple[list[Row], float]]] = []  # so that a large part's masks don't fill the memory
                for _ in range(num_splits(part.window, size)):
                    if len(windows) == most:
                        early.append(self.writers.submit(make_rows, windows.popleft()))
                        wait(early[:-MAX_PENDING_WINDOWS])
                    windows.append(next(made))
                yield part, [*map(self.made, early), *windows]

    def made(self, early: "Future[tuple[list[Row], float]]") -> MakeRows:
        """What gives the rows of a window that were made before."""
        rows, seconds = early.result()
        self.clock.add("writing", seconds)
        return partial(iter, rows)

    def publish(self, part: Part, windows: Sequence[MakeRows]) -> Future[PublishedPart]:
        """Begin to make the rows of a part, and to publish them."""
        # Until the task is done, which does all of its parts again if it must, those in which a window is stay known.
        given_up = self.given_up.get(part.key)
        return self.writers.submit(publish_part, self.out, part, windows, self.model, given_up, self.store)

    def receipt(self, part: Part, publishing: Future[PublishedPart], started: float) -> Row:
        """What the driver is told of a part, once it is published."""
        published = publishing.result()
        self.begun.discard(part.key)
        self.clock.add("writing", published.seconds)
        seam = self.seams.pop(part.key, None)
        pixels, differing = (0, 0) if seam is None or seam.exception() else seam.result()
        on_cpu, self.on_cpu = self.on_cpu, 0
        return {
            "windows": num_splits(part.window, self.planned),
            "pixels": part.window.height * part.window.width,
            "failed": published.failed,
            "seam_pixels": pixels,
            "seam_differing": differing,
            "started": started,
            "ended": max(started, published.ended),
            **self.clock.take(),
            "on_cpu": on_cpu,
            "exact": self.segmenter.exact,
            "actor": self.name,
            "readers": self.readers,
        }

    def infer(self, parts: Sequence[Part], size: int) -> Iterator[MakeRows]:
        """What makes the rows of windows of that size: for each part as many as it has, in any order."""
        if self.batch is None:
            self.batch = self.choose_batch([window for part in parts for window in split(part.window, size)])
        memory = chip_memory(self.resources.memory, self.gpu_memory)
        # Beside those that are read, as many wait for a GPU's JPEG engine as it takes at once.
        at_once = self.readers + (self.segmenter.decodes_together if self.settings.decode == "device" else 0)
        read_blocks, depth = choose_read_blocks(
            parts, size, self.settings, self.segmenter.bundle, memory, at_once, self.batch
        )
        flying: deque[Iterator[MakeRows]] = deque()
        with ThreadPoolExecutor(depth) as readers:
            chips = chain.from_iterable(prefetch(readers, self.read, read_blocks, depth))
            for batch in self.batches(
                zip(chain.from_iterable(block.tasks for block in read_blocks), chips, strict=True)
            ):
                flying.append(self.failure_rows(*batch) if isinstance(batch, tuple) else self.start(batch))
                while len(flying) > self.segmenter.in_flight:
                    yield from flying.popleft()
                self.let_read(depth)
        for each in flying:
            yield from each

    def let_read(self, most: int) -> None:
        """Let more threads read at once, up to so many, where the last windows show that the model waits for them."""
        seconds = None if self.stood_still else self.clock.lap(WINDOWS_TO_COUNT_READERS * self.readers)
        if seconds is not None:
            more = min(enough_readers(self.readers, self.resources.cores, **seconds), most) - self.readers
            if more > 0:
                self.turns.release(more)
                self.readers += more

    def choose_batch(self, windows: Sequence[Window]) -> int:
        """How many of the largest windows to segment at once."""
        bundle = self.segmenter.bundle
        largest = max(windows, key=lambda window: window.height * window.width)
        chip = chip_window(largest, self.settings.halo, bundle.stride)
        return self.segmenter.find_batch(bundle.bands, chip.height, chip.width)

    def batches(self, chips: "Iterable[tuple[WindowTask, DeviceChip | Failure]]") -> "Iterator[Chips | Unreadable]":
        """Windows that follow each other and are of one size; those that can't be read alone."""
        batch: Chips = []
        for job, chip in chips:
            if batch and (len(batch) >= (self.batch or 1) or batch[0][0].window.shape != job.window.shape):
                yield batch
                batch = []
            if isinstance(chip, Failure):
                yield from [batch] if batch else []
                batch = []
                yield job, chip
            else:
                batch.append((job, chip))
        if batch:
            yield batch

    def read(self, block: ReadBlock) -> "Sequence[DeviceChip | Failure]":
        """The chip of each window of a block, or why it can't be read."""
        part, windows = block.part, block.windows
        if part.key not in self.begun:  # several threads may say so, each before it reads
            mark_started(self.out, part.key, self.session, self.store)
            self.begun.add(part.key)
        try:
            return stage_windows(block, self.settings, self.segmenter, partial(self.reading, len(windows)))
        except ReadError as error:
            kind = PartialFailure if may_be_in_places(error, self.settings) else Failure
            failure = kind(type(error).__name__, str(error), error.attempts)
            of_all = isinstance(error, StoreUnavailableError) and not part.sources  # else it may be some windows' alone
        except Exception as error:  # whatever a damaged file makes of its reader: the other windows go on
            self.end_if_lost()
            failure, of_all = Failure(type(error).__name__, f"{part.scene.uri}: {error}"), False
        if of_all or len(windows) == 1:
            return [failure] * len(windows)
        return [found for window in windows for found in self.read(ReadBlock(part, (window,)))]

    @contextmanager
    def reading(self, windows: int) -> Iterator[None]:
        """A turn of a thread that reads, which is counted."""
        with self.turns, self.clock.on("reading", windows):
            yield

    def failure_rows(self, job: WindowTask, failure: Failure) -> Iterator[MakeRows]:
        """What makes the rows of a window that can't be read; where it is damaged in places, tile by tile."""
        part, window, size = job.part, job.window, self.settings.tile_size
        if isinstance(failure, PartialFailure) and num_splits(window, size) > 1:
            yield partial(iter, [row for tile in split(window, size) for row in self.rows(part, tile)])
        else:
            yield partial(failed_rows, part.scene, window, size, failure)

    def start(self, batch: Chips, again: bool = False) -> Iterator[MakeRows]:
        """Begin to segment a batch; what makes the rows of each of its windows, once the device is done with it.

        A single window that does not fit beside others is tried `again`, once.
        """
        try:
            chips, window = [chip for _, chip in batch], batch[0][0].window
            # Batches of fewer windows, such as the last ones of a task, are rare.
            may_compile = not self.at_once or len(chips) >= (self.batch or 1)
            pending = start_windows(chips, window, self.settings, self.segmenter, may_compile)
        except (RuntimeError, MemoryError) as error:  # torch's, of memory too, are RuntimeErrors
            error = error.with_traceback(None)  # whose frames hold what the device held
            return self.retry_with_less(batch, error, again)
        self.stood_still |= pending.compiled
        return self.finish(batch, pending, again)

    def finish(self, batch: Chips, pending: "Pending", again: bool) -> Iterator[MakeRows]:
        """Wait for a batch that was started; yields what makes the rows of each of its windows."""
        if pending.compiled:
            self.clock.new_lap()
            self.stood_still = False
        try:
            answers = pending.result()
        except RuntimeError as error:
            yield from self.retry_with_less(batch, error.with_traceback(None), again)
            return
        self.clock.add("model", pending.seconds, len(batch))
        self.on_cpu += sum(not chip.decoded for _, chip in batch)
        for (task, _), answer in zip(batch, answers, strict=True):
            part, window = task.part, task.window
            if part.key in self.watched and window.origin == part.window.origin:
                self.check_seam(part, window, answer)
            yield partial(tile_rows, part.scene, window, self.settings.tile_size, answer.figures)

    def retry_with_less(self, batch: Chips, error: Exception, again: bool) -> Iterator[MakeRows]:
        """Segment a batch that is too much for the device: half as many windows at once from here on, or smaller."""
        self.end_if_lost()
        self.segmenter.free_memory()
        if len(batch) == 1:
            if _is_of_memory(error) and not again:
                yield from self.start(batch, again=True)  # those that were begun before it have left the device
            else:
                yield partial(iter, list(self.smaller_rows(batch[0][0].part, batch[0][0].window, error)))
            return
        half = len(batch) // 2
        if _is_of_memory(error):
            self.batch = half
        for first in range(0, len(batch), half):
            yield from self.start(batch[first : first + half])

    def end_if_lost(self) -> None:
        """End the process where it has lost its device: a new one takes its parts up, and finds the cause."""
        if self.segmenter.is_lost():
            os._exit(1)

    def check_seam(self, part: Part, window: Window, answer: "WindowResult") -> None:
        """Find how well the window fits its neighbour; a GPU goes on meanwhile.

        Where the neighbour can't be read its own rows will say so.
        """
        looking = self.watchers.submit(compare_across_border, part, window, answer, self.settings, self.segmenter)
        self.seams[part.key] = looking
        if not self.segmenter.on_gpu:
            wait([looking])

    def rows(self, part: Part, window: Window) -> Iterable[Row]:
        """The rows of a window that is segmented at once, with no other beside it."""
        job = WindowTask(part, window)
        (chip,) = self.read(ReadBlock(part, (window,)))
        segmented = self.failure_rows(job, chip) if isinstance(chip, Failure) else self.start([(job, chip)])
        return [row for make_rows in segmented for row in make_rows()]

    def smaller_rows(self, part: Part, window: Window, error: Exception) -> Iterator[Row]:
        """The rows of a window that is too much for the device: of windows half as wide, from here on."""
        settings = self.settings
        half = round_up(max(window.height, window.width) // 2, settings.tile_size)
        if not _is_of_memory(error) or settings.context_exceeds_halo or half >= max(window.height, window.width):
            failure = Failure(
                type(error).__name__, f"{part.scene.uri}: {(str(error) or 'out of memory').splitlines()[0]}"
            )
            yield from failed_rows(part.scene, window, settings.tile_size, failure)
            return
        self.window = min(self.window, half)
        for smaller in split(window, half):
            yield from self.rows(part, smaller)

    def infer_carefully(self, parts: Sequence[Part], size: int, careful: Mapping[str, Attempt]) -> Iterator[MakeRows]:
        """What `infer` yields, of parts over which a process died."""
        for part in parts:
            for window in split(part.window, size):
                yield partial(iter, self.careful_rows(part, window, careful[part.key]))

    def careful_rows(self, part: Part, window: Window, attempt: Attempt) -> Iterable[Row]:
        """The rows of a window of a part over which a process died: failed ones where it is the window's fault."""
        name = f"{window.row_off} {window.col_off}"
        if attempt.is_deadly(name):
            text = f"{part.scene.uri}: to read or segment this window ended the process"
            failure = Failure("Crash", text, attempt.deaths[name])
            self.given_up[part.key] = attempt
            return list(failed_rows(part.scene, window, self.settings.tile_size, failure))
        mark_window(self.out, part.key, attempt, name, self.store)
        return self.rows(part, window)


def _is_of_memory(error: Exception) -> bool:
    return "memory" in str(error).lower() or isinstance(error, MemoryError)
