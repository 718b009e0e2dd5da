"""The cluster on this machine that `cluster/local.py` starts, and where its processes listen."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from conftest import free_port, outside_environment

SCRIPT = Path(__file__).parents[1] / "cluster" / "local.py"


class LocalCluster(NamedTuple):
    """A cluster that runs."""

    address: str  # of its dashboard
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def local_cluster(folder: Path, *options: str, **variables: str) -> Iterator[LocalCluster]:
    """A cluster of one CPU a node that ends by Ctrl-C and leaves no process behind."""
    port = free_port()
    command = [sys.executable, str(SCRIPT), "--cpus", "1", *options, "--port", str(port)]
    with (folder / "log").open("wb") as log:
        cluster = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, cwd=folder, env=outside_environment(**variables)
        )
        below: list[psutil.Process] = []
        try:
            assert cluster.stdout is not None
            address = cluster.stdout.readline().decode().strip()
            assert address == f"http://127.0.0.1:{port}", (folder / "log").read_text()
            yield LocalCluster(address, cluster, folder / "log")
        finally:
            below = psutil.Process(cluster.pid).children(recursive=True)
            cluster.send_signal(signal.SIGINT)
            assert cluster.wait(60) == 0
    _, left = psutil.wait_procs(below, timeout=30)
    assert left == []


def listening(root: int) -> dict[str, set[str]]:
    """The addresses on which a process and those below it listen, with the names of the processes that do."""
    found: dict[str, set[str]] = {}
    process = psutil.Process(root)
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            for socket in each.net_connections(kind="inet"):
                if socket.status == psutil.CONN_LISTEN:
                    found.setdefault(socket.laddr.ip.removeprefix("::ffff:"), set()).add(each.name())
    return found
