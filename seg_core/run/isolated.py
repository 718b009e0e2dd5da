"""Read many files in child processes: over a damaged file, Arrow's C++ code may crash its process instead of raising.

    items ─ batches ─▶ children, each with threads ─ answers in order ─▶ results
                          └─ crashed: a new child takes what is left of the batch, item by item

The children are started afresh, not forked, and never import the caller's main module.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from seg_core.errors import SegError

BATCH = 250  # items: what is sent to a child at once
ITEMS_PER_CHILD = 2000  # items that justify another child: each takes half a second to start, and some 150 MB
CHILDREN = 4  # at most
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from seg_core.run.isolated import serve; serve()"
# Other signals, such as the kernel's when memory runs out, say nothing about the file.
CRASHES = {-number for number in (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)}

T = TypeVar("T")
R = TypeVar("R")


def for_each_isolated(
    function: Callable[[T], R], crashed: Callable[[T], R], items: Sequence[T], threads: int | None
) -> Iterator[R]:
    """`map(function, items)` in child processes, and `crashed(item)` for an item that crashes its process.

    The function must be picklable. Each child calls it in `threads` threads (None: as many as suit the cores). An
    exception that it raises comes where its result would have come. Raises SegError if a process ends otherwise.
    """
    batches = [items[at : at + BATCH] for at in range(0, len(items), BATCH)]
    started: list[_Child] = []
    idle: list[_Child] = []

    def ask(some: Sequence[T]) -> list[R]:
        try:
            child = idle.pop()
        except IndexError:
            child = _Child()
            started.append(child)
        answers: list[R] = child.ask(function, some, threads)
        if len(answers) == len(some):
            idle.append(child)
        return answers

    def work(batch: Sequence[T]) -> list[R]:
        answers = ask(batch)
        for item in batch[len(answers) :]:
            answers += ask([item]) or [crashed(item)]
        return answers

    pool = ThreadPoolExecutor(min(CHILDREN, os.cpu_count() or 1, 1 + len(items) // ITEMS_PER_CHILD))
    try:
        for answers in pool.map(work, batches):
            yield from answers
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in started:
            child.end()
        pool.shutdown()


class _Child:
    """A process that calls functions on request."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-c", START, json.dumps(sys.path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 - our own

    def ask(self, function: Callable[[T], Any], items: Sequence[T], threads: int | None) -> list[Any]:
        """The results for some items, in their order; where the process crashes, only those that it has sent before.

        Raises what the function raises first, and SegError where the process ends without a crash.
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
            if code not in CRASHES:
                raise SegError(f"{sys.executable}: a process that reads files of the run ended with {code}") from error
        return results

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()


def serve() -> None:
    """Be a child: answer requests from standard input on standard output until it is closed."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its children
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash that is expected leaves no file behind
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    silent = os.open(os.devnull, os.O_WRONLY)  # for what C++ writes when it crashes
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    while True:
        try:
            function, items, threads = pickle.load(requests)  # noqa: S301 - this program wrote it
        except EOFError:
            return
        with ThreadPoolExecutor(threads) as pool:
            for answer in pool.map(partial(_try, function), items):
                pickle.dump(answer, answers)
                answers.flush()


def _try(function: Callable[[T], R], item: T) -> tuple[R | None, Exception | None]:
    try:
        return function(item), None
    except Exception as error:
        return None, error
