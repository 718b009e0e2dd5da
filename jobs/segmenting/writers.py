"""The workers that make the rows of parts and publish them: threads, or with a GPU processes.

The threads of a process share one interpreter. Making rows needs it for longer than anything else, and would delay the
thread that feeds the GPU.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from typing import NamedTuple

from seg_core.run.attempts import Attempt, mark_done, mark_window
from seg_core.run.check import Expected
from seg_core.run.fence import PLAIN, Store
from seg_core.run.ledger import EnteredPart, describe_part
from seg_core.run.plan import Part
from seg_core.run.rows import Row
from seg_core.run.tables import write_part

MakeRows = Callable[[], Iterable[Row]]  # makes the rows of one window; must be picklable for processes


class WindowRows(NamedTuple):
    """The function that makes the rows of a window, whether segmented or failed, and the part of the window."""

    part: Part
    make: MakeRows


class PublishedPart(NamedTuple):
    """The result of publishing a part."""

    failed: int  # tiles
    ended: float  # s since 1970
    seconds: float  # spent on it
    entered: EnteredPart | None  # what the ledger will say of it


def make_writers(number: int, processes: bool) -> Executor:
    """Start this number of threads or processes.

    Processes start at once, because their imports take seconds. They end with this process, however it ends.
    """
    if not processes:
        return ThreadPoolExecutor(number)
    # Not forked: a forked process lacks the threads of CUDA and OpenMP.
    pool = ProcessPoolExecutor(number, get_context("spawn"), initializer=_end_together)
    for _ in range(number):
        pool.submit(os.getpid)
    return pool


def make_rows(make: MakeRows) -> tuple[list[Row], float]:
    """Make the rows of a window. Also returns the seconds that this took."""
    started = time.perf_counter()
    return list(make()), time.perf_counter() - started


def publish_part(
    out: str,
    part: Part,
    windows: Sequence[MakeRows],
    expected: Expected,
    given_up: Attempt | None,
    store: Store = PLAIN,
) -> PublishedPart:
    """Make the rows of a part's windows, publish them into the run at `out`, and mark the part as done.

    If a window was skipped (`given_up`), the part stays marked, so that a repeated task skips the window again.
    """
    started = time.perf_counter()
    rows = [row for make in windows for row in make()]
    content = write_part(out, part.key, rows, expected.model, part.version, store)
    if given_up is None:
        mark_done(out, part.key, store)
    else:
        mark_window(out, part.key, given_up, None, store)
    failed = sum(row["status"] == "failed" for row in rows)
    entered = None if failed else describe_part(out, part, content, expected)
    return PublishedPart(failed, time.time(), time.perf_counter() - started, entered)


def _end_together() -> None:
    """End this process when the process that started it ends, even if that is killed."""
    parent = parent_process()
    assert parent is not None

    def wait_and_exit() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()
