"""Do work in threads, in order: ahead of its use, or for each of many files."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

READERS = 32  # threads: what a store takes to answer counts, not what it sends
BATCH = 1000  # files, after which new threads begin: what Arrow keeps for a thread grows with each footer it reads

T = TypeVar("T")
R = TypeVar("R")


def ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """`map(function, items)` with up to `depth` results computed or kept ahead of the one being used.

    An exception of the function comes out where its result would have. Memory is bounded by `depth`.
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


def for_each(function: Callable[[T], R], items: Iterable[T], threads: int | None = READERS) -> Iterator[R]:
    """`map(function, items)` for a function that reads a Parquet file; memory does not grow with their number."""
    rest = iter(items)
    while some := list(islice(rest, BATCH)):
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(function, some)
