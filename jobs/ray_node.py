"""The node of a Ray that starts inside this process, without the processes that only serve a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray._private.node as ray_nodes
from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD

NO_ADDRESS = b"127.0.0.1:-1"  # as a server writes that has no dashboard


class _LeanNode(ray_nodes.Node):
    """A node without three processes that Ray has no option for. Each loads Ray, and takes half a second of a core.

    They scale a cluster, bring the logs of workers to the driver, and send statistics of usage. `ray.init` waits for
    the last one.
    """

    def start_monitor(self) -> None:
        """Start no autoscaler."""

    def start_log_monitor(self) -> None:
        """Start nothing that reads logs."""

    def start_api_server(self, **_: Any) -> None:
        """Start no server: without a dashboard, statistics of usage are all that it would serve.

        The agents of nodes ask for its address, and log an error every second until there is one.
        """
        client = self.get_gcs_client()  # type: ignore[no-untyped-call]
        client.internal_kv_put(DASHBOARD_ADDRESS.encode(), NO_ADDRESS, True, KV_NAMESPACE_DASHBOARD)


@contextmanager
def lean_node() -> Iterator[None]:
    """Have a Ray that starts meanwhile do without the autoscaler, the log monitor and statistics of usage."""
    before = ray_nodes.Node
    ray_nodes.Node = _LeanNode  # type: ignore[misc]  # the name that ray.init looks up
    try:
        yield
    finally:
        ray_nodes.Node = before  # type: ignore[misc]
