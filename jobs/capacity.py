"""Wait until the nodes of a cluster have room for a job, and ask the cluster's autoscaler for nodes meanwhile."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import ray
from ray.util import placement_group, remove_placement_group

from seg_core.errors import SegError

from .node_watch import NodeWatch
from .progress import CLEAR_LINE, StatusLine, format_duration
from .ray_session import find_address
from .terminal import note

LOOK_INTERVAL = 1.0  # s
NODE_TIMEOUT = 900  # s to wait for nodes, unless a command is told otherwise
NO_CPU = "the cluster has no node with a CPU for workers"
Bundle = Mapping[str, float]  # resources that must be free on one node, such as {"CPU": 1, "GPU": 1}


class Shortage(NamedTuple):
    """What a cluster lacks for a job, and what its user can do about it other than wait."""

    lack: str
    way_out: str


def wait_for_nodes(
    find_shortage: Callable[[], Shortage | None],
    bundles: Sequence[Bundle],
    address: str | None,
    node_timeout: float | None = None,
) -> None:
    """Wait until `find_shortage` finds none, and ask for nodes on which `bundles` are free until then.

    Says what is lacking, and regularly for how long. Raises SegError if it is still lacking after the seconds of
    --node-timeout, or NODE_TIMEOUT for a command without that option, and at once if Ray was started in this process
    and not joined at `address`, since it gets no nodes.
    """
    timeout, option = (NODE_TIMEOUT, "") if node_timeout is None else (node_timeout, " (--node-timeout)")
    shortage = find_shortage()
    if shortage is None:
        return
    if timeout <= 0 or find_address(address) is None:
        raise SegError(f"{shortage.lack}: {shortage.way_out}")
    note(f"{shortage.lack}: waiting for nodes, at most {format_duration(timeout)}{option}")
    with _ask_for(bundles), _watch_nodes() as (watch, seconds):
        while (shortage := find_shortage()) is not None:
            if seconds() > timeout:
                raise SegError(
                    f"{shortage.lack}, after {format_duration(timeout)} of waiting for nodes: {shortage.way_out}, or "
                    "see why none comes: ray status, on the head"
                )
            time.sleep(LOOK_INTERVAL)
            watch.look()


def wait_for_cpu(address: str | None) -> None:
    """Wait until there is a CPU for tasks, in a cluster that was joined at `address`. Raises SegError if none comes."""

    def find_shortage() -> Shortage | None:
        return None if ray.cluster_resources().get("CPU") else Shortage(NO_CPU, "start one")

    wait_for_nodes(find_shortage, [{"CPU": 1.0}], address)


@contextmanager
def _ask_for(bundles: Sequence[Bundle]) -> Iterator[None]:
    """Let a placement group wait for the bundles: autoscalers start nodes for it, and it ends with this process."""
    group = placement_group([dict(bundle) for bundle in bundles])
    try:
        yield
    finally:
        remove_placement_group(group)


@contextmanager
def _watch_nodes() -> Iterator[tuple[NodeWatch, Callable[[], float]]]:
    """Show for how long the block has been waiting. Yields a watch that says which nodes come, and a clock in s."""
    started = time.monotonic()

    def seconds() -> float:
        return time.monotonic() - started

    status = StatusLine(lambda: f"waiting for nodes ... {format_duration(seconds())}")
    try:
        yield NodeWatch(status.note), seconds
    finally:
        status.end(CLEAR_LINE)
