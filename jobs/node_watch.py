"""Says when a node of the cluster is lost or comes, in one line each, and keeps a job's metrics up to date."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray

from .metrics import JobMetrics

LOOK_INTERVAL = 2.0  # s
Node = dict[str, Any]  # as ray.nodes describes it


class NodeWatch:
    """Compares the nodes that are alive with those of the last look. `say` is called with a line for each change."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.nodes = list_nodes()

    def look(self) -> None:
        """Look at the nodes, and say what has changed since the last look."""
        before, self.nodes = self.nodes, list_nodes()
        alive = f"{len(self.nodes)} {'node is' if len(self.nodes) == 1 else 'nodes are'} alive"
        for node_id in before.keys() - self.nodes.keys():
            self.say(f"lost {describe_node(before[node_id])}: {alive}, and what it was doing is done again")
        for node_id in self.nodes.keys() - before.keys():
            self.say(f"new {describe_node(self.nodes[node_id])}: {alive}")

    def total(self, resource: str) -> int:
        """Return how much of a resource, such as `CPU`, the nodes had at the last look."""
        return int(sum(node["Resources"].get(resource, 0) for node in self.nodes.values()))

    def has_node(self, resources: Mapping[str, float]) -> bool:
        """Return whether a node had as much of each of these resources at the last look, free or not."""
        return any(
            all(node["Resources"].get(kind, 0) >= number for kind, number in resources.items())
            for node in self.nodes.values()
        )


def list_nodes() -> dict[str, Node]:
    """Return the nodes of the cluster that are alive, by id; none if this process has no Ray."""
    if not ray.is_initialized():
        return {}
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def describe_node(node: Node) -> str:
    """Return which node it is, and its CPUs and GPUs."""
    sizes = (f"{node['Resources'][kind]:g} {kind}" for kind in ("CPU", "GPU") if node["Resources"].get(kind))
    return f"node {node['NodeManagerAddress']} ({', '.join([node['NodeID'][:8], *sizes])})"


@contextmanager
def watch_nodes(say: Callable[[str], None], metrics: JobMetrics) -> Iterator[NodeWatch]:
    """Look at the nodes every few seconds, in a thread, until the block ends. Their number is one of the metrics."""
    watch, done = NodeWatch(say), threading.Event()

    def look_regularly() -> None:
        while not done.wait(LOOK_INTERVAL):
            with suppress(Exception):  # while the cluster's head is away, nobody knows its nodes
                watch.look()
            metrics.publish({"nodes": len(watch.nodes)})

    thread = threading.Thread(target=look_regularly, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join(LOOK_INTERVAL)
