"""Who makes the rows of parts and publishes them: threads, or beside a GPU processes.

A process that gives a GPU its work has one interpreter, for which its threads wait in turn: to make rows takes it for
longer than anything else, and in short pieces.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from typing import NamedTuple

from seg_core.run.attempts import Attempt, mark_done, mark_window
from seg_core.run.fence import PLAIN, Store
from seg_core.run.plan import Part
from seg_core.run.rows import Row
from seg_core.run.tables import write_part

MakeRows = Callable[[], Iterable[Row]]  # of one window; for processes it must be picklable


class WindowRows(NamedTuple):
    """A window that is segmented, or can't be: the part that it is of, and what makes the rows of its tiles."""

    part: Part
    make: MakeRows


class PublishedPart(NamedTuple):
    """What came of a part."""

    failed: int  # tiles
    ended: float  # when, in s since 1970
    seconds: float  # that it took


def make_writers(number: int, processes: bool) -> Executor:
    """So many threads or processes.

    Processes begin at once, for to import what they need takes them seconds, and end with this one, however it ends.
    """
    if not processes:
        return ThreadPoolExecutor(number)
    # Not forked: CUDA's and OpenMP's threads don't outlive that.
    pool = ProcessPoolExecutor(number, get_context("spawn"), initializer=_end_together)
    for _ in range(number):
        pool.submit(os.getpid)
    return pool


def make_rows(make: MakeRows) -> tuple[list[Row], float]:
    """The rows of a window, and the seconds that it took to make them."""
    started = time.perf_counter()
    return list(make()), time.perf_counter() - started


def publish_part(
    out: str, part: Part, windows: Sequence[MakeRows], model: str, given_up: Attempt | None, store: Store = PLAIN
) -> PublishedPart:
    """Make the rows of a part's windows, publish them into the run at `out`, and say that the part is done.

    Where a window of it was given up, that stays known: for whoever takes the part up once more.
    """
    started = time.perf_counter()
    rows = [row for make in windows for row in make()]
    write_part(out, part.key, rows, model, part.version, store)
    if given_up is None:
        mark_done(out, part.key, store)
    else:
        mark_window(out, part.key, given_up, None, store)
    failed = sum(row["status"] == "failed" for row in rows)
    return PublishedPart(failed, time.time(), time.perf_counter() - started)


def _end_together() -> None:
    """End this process when the one that started it does, also where that was killed."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
