"""Read many files in child processes, because Arrow's C++ code may crash on a damaged file instead of raising.

    items ─ batches ─▶ children, each with threads ─ results in order ─▶ results
                          └─ crashed: a new child takes the rest of the batch, item by item

The children are new processes, not forks, and never import the caller's main module.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from seg_core.errors import SegError
from seg_core.threads import count_cpus

BATCH_SIZE = 250  # items that are sent to a child at once
ITEMS_PER_CHILD = 2000  # items that justify another child, which takes half a second to start, and some 150 MB
MAX_CHILDREN = 4
CHILD_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from seg_core.run.isolated import serve; serve()"
# Other signals, such as the kernel's when memory runs out, have nothing to do with the file.
CRASH_CODES = {-number for number in (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)}

T = TypeVar("T")
R = TypeVar("R")


def for_each_isolated(
    function: Callable[[T], R], crashed: Callable[[T], R], items: Sequence[T], threads: int | None
) -> Iterator[R]:
    """Run `map(function, items)` in child processes, with `crashed(item)` as the result of an item that crashes one.

    The function must be picklable. Each child calls it in `threads` threads (None: ThreadPoolExecutor's default). If
    the function raises, the exception comes in place of its result. Raises SegError if a process ends in another way.
    """
    batches = [items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE)]
    started: list[_Child] = []
    idle: list[_Child] = []

    def call_child(batch: Sequence[T]) -> list[R]:
        try:
            child = idle.pop()
        except IndexError:
            child = _Child()
            started.append(child)
        results: list[R] = child.call(function, batch, threads)
        if len(results) == len(batch):
            idle.append(child)
        return results

    def process(batch: Sequence[T]) -> list[R]:
        results = call_child(batch)
        for item in batch[len(results) :]:
            results += call_child([item]) or [crashed(item)]
        return results

    pool = ThreadPoolExecutor(min(MAX_CHILDREN, count_cpus(), 1 + len(items) // ITEMS_PER_CHILD))
    try:
        for results in pool.map(process, batches):
            yield from results
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in started:
            child.end()
        pool.shutdown()


class _Child:
    """A child process that calls functions on request."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-c", CHILD_CODE, json.dumps(sys.path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 - our own

    def call(self, function: Callable[[T], Any], items: Sequence[T], threads: int | None) -> list[Any]:
        """Return the results for the items in order: if the process crashes, only those that it sent before.

        Raises the first exception of the function, and SegError if the process ends without a crash.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        results: list[Any] = []
        try:
            pickle.dump((function, items, threads), self.process.stdin)
            self.process.stdin.flush()
            while len(results) < len(items):
                result, error = pickle.load(self.process.stdout)  # noqa: S301 - this program wrote it
                if error is not None:
                    raise error
                results.append(result)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            code = self.process.wait()
            if code not in CRASH_CODES:
                raise SegError(
                    f"{sys.executable}: a process that reads files of the run ended with exit code {code}"
                ) from error
        return results

    def end(self) -> None:
        """Kill the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()


def serve() -> None:
    """Run as a child: read requests from standard input until it is closed, and write results to standard output."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its children
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an expected crash leaves no core file behind
    requests, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    devnull = os.open(os.devnull, os.O_WRONLY)  # for messages of C++ code that crashes
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    # In several threads, rasterio can't keep back this warning about arrays in memory while it resamples them.
    warnings.filterwarnings("ignore", "Dataset has no geotransform")
    while True:
        try:
            function, items, threads = pickle.load(requests)  # noqa: S301 - this program wrote it
        except EOFError:
            return
        with ThreadPoolExecutor(threads) as pool:
            for result in pool.map(partial(_try, function), items):
                pickle.dump(result, results)
                results.flush()


def _try(function: Callable[[T], R], item: T) -> tuple[R | None, Exception | None]:
    try:
        return function(item), None
    except Exception as error:
        return None, error
