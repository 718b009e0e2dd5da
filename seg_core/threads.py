"""Do work in threads: ahead of its use, for each of many files, or in one call for what many threads ask for."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

READERS = 32  # threads: what a store takes to answer counts, not what it sends
BATCH = 1000  # files, after which new threads begin: what Arrow keeps for a thread grows with each footer it reads

T = TypeVar("T")
R = TypeVar("R")


def prefetch(pool: Executor, function: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
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


class CallBatcher(Generic[T, R]):
    """A function of a list, that threads call with one item each.

    It runs in a thread of its own. What they ask for while it runs is asked for together in the next call, up to `most`
    items. Where that call fails each of its items is tried alone, so that only those that are at fault fail.
    """

    def __init__(self, function: Callable[[Sequence[T]], Sequence[R]], most: int) -> None:
        self.function, self.most = function, most
        self.waiting: deque[tuple[T, Future[R]]] = deque()
        self.thread = ThreadPoolExecutor(1)

    def __call__(self, item: T) -> R:
        """What the function makes of the item; raises what it raises."""
        found: Future[R] = Future()
        self.waiting.append((item, found))
        self.thread.submit(self._answer)
        try:
            return found.result()
        finally:
            del found  # which holds the error, whose traceback holds this frame

    def _answer(self) -> None:
        """Answer those that wait; there may be none left."""
        some = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.most))]
        groups = [some] if some else []
        while groups:
            group = groups.pop()
            try:
                results = list(zip(group, self.function([item for item, _ in group]), strict=True))
            except Exception as error:
                if len(group) == 1:
                    group[0][1].set_exception(error.with_traceback(None))  # whose frames hold all items
                else:
                    groups += [[each] for each in group]
            else:
                for (_, found), result in results:
                    found.set_result(result)
