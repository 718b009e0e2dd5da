"""Read windows ahead of the model in threads. GDAL releases the interpreter's lock.

blocks of windows ─▶ as many threads as keep the model busy ─▶ loaded windows, or failures
                       └─ --readers N: each waits for a task ─┘
"""

import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ray.exceptions import WorkerCrashedError

from seg_core.errors import ReadError, StoreUnavailableError
from seg_core.imagery.jpeg_library import find_decoders
from seg_core.inference.windows import may_be_partial, read_pixels, stage_windows
from seg_core.run.plan import Part, ReadBlock, Settings, WindowTask
from seg_core.run.rows import Failure, PartialFailure
from seg_core.run.sizing import chip_memory, choose_read_blocks, enough_readers, gpu_share
from seg_core.threads import prefetch

from ..resources import ActorResources
from .guard import CrashGuard, end_if_lost
from .reading_tasks import MAX_ATTEMPTS, TaskReader
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from seg_core.model.device_chips import DeviceChip
    from seg_core.model.segmenter import Segmenter

WINDOWS_TO_COUNT_READERS = 4  # windows per reading thread, from whose times the number of threads is chosen


class LoadedWindow(NamedTuple):
    """A window whose chip is ready for the device."""

    task: WindowTask
    chip: "DeviceChip"


class UnreadableWindow(NamedTuple):
    """A window that can't be read, and why."""

    task: WindowTask
    failure: Failure


class WindowReader:
    """Reads windows ahead, in few threads at first, and in more if the model waits for them."""

    def __init__(
        self,
        settings: Settings,
        segmenter: "Segmenter",
        resources: ActorResources,
        guard: CrashGuard,
        clock: Stopwatch,
    ) -> None:
        self.settings, self.segmenter, self.resources = settings, segmenter, resources
        self.guard, self.clock = guard, clock
        self.tasks = TaskReader() if resources.reading_tasks else None
        # Threads that may read at once, or wait for a task that reads.
        self.num_threads = resources.reading_tasks or resources.initial_readers(settings.decode)
        self.turns = threading.Semaphore(self.num_threads)
        self.depth = 0  # blocks that are being read or wait for the model; more threads would be useless

    @property
    def decoders(self) -> dict[str, str]:
        """What decodes what is read, with versions: see `find_decoders`."""
        return (self.tasks and self.tasks.decoders) or find_decoders()

    def read_ahead(
        self, parts: Sequence[Part], side: int, batch: int
    ) -> Generator[LoadedWindow | UnreadableWindow, None, None]:
        """Yield the windows, of `side` px, of parts in order, while the next ones are being read.

        At least a batch of windows is read ahead, if memory allows.
        """
        blocks, self.depth = choose_reading(
            parts, side, self.settings, self.segmenter, self.resources, self.num_threads, batch
        )
        with ThreadPoolExecutor(self.depth) as pool:
            for windows in prefetch(pool, self.read, blocks, self.depth):
                yield from windows

    def read(self, block: ReadBlock) -> list[LoadedWindow | UnreadableWindow]:
        """Read the windows of a block together. If the block can't be read, read its windows one by one."""
        self.guard.mark_started(block.part)
        try:
            turn = partial(self.turn, len(block.windows))
            chips = stage_windows(block, self.settings, self.segmenter, turn, self.tasks or read_pixels)
            return [LoadedWindow(*each) for each in zip(block.tasks, chips, strict=True)]
        except ReadError as error:
            kind = PartialFailure if may_be_partial(error, self.settings) else Failure
            failure = kind(type(error).__name__, str(error), error.attempts)
            # If a store is unavailable, the other windows of the block would fail too, unless they are in other files.
            concerns_all = isinstance(error, StoreUnavailableError) and not block.part.sources
        except WorkerCrashedError:
            text = f"{block.part.scene.uri}: reading this window crashed the process"
            failure, concerns_all = Failure("Crash", text, MAX_ATTEMPTS), False
        except Exception as error:  # reading damaged files raises errors of any type; the other windows go on
            end_if_lost(self.segmenter)
            failure, concerns_all = Failure(type(error).__name__, f"{block.part.scene.uri}: {error}"), False
        if concerns_all or len(block.windows) == 1:
            return [UnreadableWindow(task, failure) for task in block.tasks]
        alone = (ReadBlock(block.part, (window,)) for window in block.windows)
        return [window for each in alone for window in self.read(each)]

    @contextmanager
    def turn(self, windows: int) -> Iterator[None]:
        """Wait until this thread may read, and measure the time that it takes for this number of windows."""
        with self.turns, self.clock.on("reading", windows):
            yield

    def add_threads(self) -> None:
        """Let more threads read at once if the times of the last windows show that the model waits for them.

        The number of tasks stays as it was asked for.
        """
        if self.tasks is not None:
            return
        times = self.clock.lap(WINDOWS_TO_COUNT_READERS * self.num_threads)
        if times is not None:
            enough = enough_readers(
                self.num_threads, self.resources.cores, times.reading, times.reading_cpu, times.model
            )
            more = min(enough, self.depth) - self.num_threads
            if more > 0:
                self.turns.release(more)
                self.num_threads += more


def choose_reading(
    parts: Sequence[Part],
    side: int,
    settings: Settings,
    segmenter: "Segmenter",
    resources: ActorResources,
    threads: int,
    batch: int = 1,
) -> tuple[list[ReadBlock], int]:
    """Return the blocks in which an actor reads parts with windows of `side` px, and how many blocks to read ahead.

    In addition to those that threads read, as many blocks may wait for a GPU's JPEG engine as it decodes in one call.
    """
    memory = chip_memory(resources.memory, gpu_share(segmenter.memory, resources.num_gpus))
    at_once = threads + (segmenter.decodes_together if settings.decode == "device" else 0)
    return choose_read_blocks(parts, side, settings, segmenter.bundle, memory, at_once, batch)
