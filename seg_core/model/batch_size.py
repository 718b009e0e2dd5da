"""How many chips to segment together, found by measuring."""

from collections.abc import Callable

MAX_BATCH = 64  # chips
MIN_SPEEDUP = 1.05  # of a batch over one of half its size, below which it is not worth its memory
# Up to this many chips, a batch need not be faster than one of half its size, only not slower: fewer calls spare the
# process that makes them.
FREE_BATCH = 4


def find_batch(time_batch: Callable[[int], float], free_memory: Callable[[], None], most: int = MAX_BATCH) -> int:
    """Return the largest batch size, a power of two up to `most`, that is worth its memory.

    `time_batch` returns the seconds that a batch of so many chips takes, and raises RuntimeError if the device can't
    process it. `free_memory` is called at the end.
    """
    size, best_rate = 1, 0.0
    while size <= most:
        try:
            rate = size / time_batch(size)
        except RuntimeError:  # not only for want of memory: some routines have a largest size
            break
        if rate < (MIN_SPEEDUP if size > FREE_BATCH else 1 / MIN_SPEEDUP) * best_rate:
            break
        size, best_rate = 2 * size, rate
    free_memory()
    return max(1, size // 2)
