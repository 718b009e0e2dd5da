"""How many threads torch computes with on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def at_least_two_threads() -> Iterator[None]:
    """Torch with two threads or more for the time of a block: with one, sums are rounded in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
