"""Spread a function of many items over the nodes of a Ray cluster, and get the results of tasks."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from .capacity import wait_for_cpu
from .ray_session import ray_session

TASKS_PER_CPU = 2  # that are waiting or at work, so that no CPU waits for the next one
ITEMS_PER_TASK = 8

T = TypeVar("T")
R = TypeVar("R")


def spread_over_cluster(
    address: str | None,
    function: Callable[[T], R],
    items: Sequence[T],
    verbose: bool = False,
    items_per_task: int | None = None,
) -> Iterator[R]:
    """Yield `map(function, items)`, computed by tasks on the cluster at `address`, or as `ray_session` chooses one.

    The function must be picklable, and so must its results. Its exceptions are raised here.
    """
    size = items_per_task or ITEMS_PER_TASK
    with ray_session(address, verbose=verbose):
        wait_for_cpu(address)
        shared: Any = ray.put(function)
        task: Any = ray.remote(_apply)
        most = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting: deque[Any] = deque()
        for first in range(0, len(items), size):
            waiting.append(task.remote(shared, items[first : first + size]))
            if len(waiting) >= most:
                yield from get_result(waiting.popleft())
        while waiting:
            yield from get_result(waiting.popleft())


def get_result(reference: Any) -> Any:
    """Return the result of a Ray task, or raise its own exception, without Ray's class and traceback around it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _apply(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [function(item) for item in items]
