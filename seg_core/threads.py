"""Work in threads: compute results before they are needed, read many files, or combine calls of many threads."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

NUM_FILE_THREADS = 32  # threads that read files: an object store's latency costs more than its transfer
# Number of files after which threads are replaced: Arrow's memory for a thread grows with each footer that it reads.
FILES_PER_POOL = 1000
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of this process's control group: microseconds, and per how many
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # bytes

T = TypeVar("T")
R = TypeVar("R")


def count_cpus() -> int:
    """How many CPUs this process may use: in a container, a pod or a batch job, these are fewer than there are.

    Both the mask of the scheduler and the quota of the control group (version 2) are obeyed.
    """
    mask = getattr(os, "sched_getaffinity", None)  # not everywhere
    cpus = len(mask(0)) if mask else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # there is no such file, or it says `max`
        quota, period = map(int, CPU_QUOTA.read_text().split())
        cpus = min(cpus, math.ceil(quota / period))
    return max(1, cpus)


def count_memory() -> int:
    """How much memory there is for this process, in bytes: in a container or a pod, it is less than the machine has.

    The limit of the control group (version 2) is obeyed.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # there is no such file, or it says `max`
        memory = min(memory, int(MEMORY_LIMIT.read_text()))
    return memory


def prefetch(pool: Executor, function: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """Yield `map(function, items)` with up to `depth` results computed or stored ahead of the current one.

    An exception of the function is raised in place of its result. Memory is bounded by `depth`.
    """
    rest = iter(items)
    waiting: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(rest, depth))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()


def for_each(function: Callable[[T], R], items: Iterable[T], threads: int | None = NUM_FILE_THREADS) -> Iterator[R]:
    """Yield `map(function, items)`, computed in threads, for a function that reads a Parquet file.

    Memory does not grow with the number of items.
    """
    rest = iter(items)
    while chunk := list(islice(rest, FILES_PER_POOL)):
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(function, chunk)


class CallBatcher(Generic[T, R]):
    """A function of a list that many threads call with one item each.

    The function runs in a thread of its own. Items that arrive while it runs are combined in the next call, up to
    `most` of them. If that call fails, each item is tried alone, so that only the faulty ones fail.
    """

    def __init__(self, function: Callable[[Sequence[T]], Sequence[R]], most: int) -> None:
        self.function, self.most = function, most
        self.waiting: deque[tuple[T, Future[R]]] = deque()
        self.thread = ThreadPoolExecutor(1)

    def __call__(self, item: T) -> R:
        """Return the function's result for the item, or raise its exception."""
        future: Future[R] = Future()
        self.waiting.append((item, future))
        self.thread.submit(self._call_waiting)
        try:
            return future.result()
        finally:
            del future  # it holds the error, whose traceback holds this frame

    def _call_waiting(self) -> None:
        """Call the function with the items that wait. There may be none left."""
        taken = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.most))]
        groups = [taken] if taken else []
        while groups:
            group = groups.pop()
            try:
                results = list(zip(group, self.function([item for item, _ in group]), strict=True))
            except Exception as error:
                if len(group) == 1:
                    group[0][1].set_exception(error.with_traceback(None))  # the traceback's frames hold all items
                else:
                    groups += [[waiting] for waiting in group]
            else:
                for (_, future), result in results:
                    future.set_result(result)
