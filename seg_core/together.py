"""One call for what many threads ask for at once."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Together(Generic[T, R]):
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
