"""A Ray cluster of several nodes on this one machine, to try `seg submit` on.

    python cluster/local.py [--nodes 2] [--cpus 2]

It prints the address of its dashboard and serves until it is interrupted, and then leaves no process behind.
"""

import argparse
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.cluster_utils import Cluster


def main() -> None:
    """Start the nodes, wait for SIGINT or SIGTERM, stop the nodes."""
    parser = argparse.ArgumentParser(description="Start a Ray cluster of several nodes on this machine.")
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes (2)")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that each node offers (2)")
    parser.add_argument("--port", type=int, default=8265, help="port of the dashboard (8265)")
    args = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    # Jobs are started as `python`, which is to be the one that has what they need: this one.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # The folder's name is short, for it is in the paths of sockets; a process that ends may still write into it.
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # Ray writes the address of the cluster to a file here, and `ray.init()` reads it. In the folder that every Ray
        # on this machine shares by default, a job would join another cluster, and other programs would join this one.
        os.environ["RAY_TMPDIR"] = folder
        head = {"include_dashboard": True, "dashboard_port": args.port, **node_options(args.cpus)}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(args.nodes - 1):
                cluster.add_node(**node_options(args.cpus))
            cluster.wait_for_nodes()
            print(f"http://{cluster.head_node.webui_url}", flush=True)
            stopped.wait()
        finally:
            ray.shutdown()
            cluster.shutdown()


def node_options(cpus: int) -> dict[str, Any]:
    """Options of a node. Its agent, which starts jobs, gets a port of its own: any Ray on this machine wants 52365."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"num_cpus": cpus, "dashboard_agent_listen_port": probe.getsockname()[1]}


if __name__ == "__main__":
    main()
