"""A cluster on this machine without CPUs, to which an autoscaler adds a node when work waits for one."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from conftest import free_port, outside_environment
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.util import get_node_ip_address

GROUP = "by-hand"
HEAD = "f" * 51 + "00000"  # ids of the provider's nodes are f...f00001 and so on
NODE_CPUS, IDLE_SECONDS = 2, 3
STORE = 80 * 10**6  # bytes of a node's object store
# Ray's own provider of nodes that are processes. The wheel lacks the file by which `type: fake_multinode` finds it.
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
LISTS = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray")
TOKEN = {"RAY_AUTH_MODE": "token"}


class GrowingCluster(NamedTuple):
    """A cluster that runs."""

    address: str
    folder: Path  # for Ray's files

    def add_node(self) -> None:
        """Start a node that the autoscaler knows nothing of, in a group of nodes, as KubeRay starts its pods."""
        options = ["--address", self.address, "--num-cpus", str(NODE_CPUS), "--object-store-memory", str(STORE)]
        run_ray(self.folder, *options, RAY_NODE_TYPE_NAME=GROUP)

    def labels(self) -> list[dict[str, str]]:
        """The labels of each node that is alive."""
        nodes = GcsClient(address=self.address).get_all_node_info(timeout=60).values()
        return [dict(node.labels) for node in nodes if node.state == GcsNodeInfo.GcsNodeState.ALIVE]

    def processes(self, title: str) -> list[psutil.Process]:
        """The processes of the cluster whose command line begins like that."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            if (process.info["environ"] or {}).get("RAY_TMPDIR") == str(self.folder):
                found += [process] if " ".join(process.info["cmdline"] or ()).startswith(title) else []
        return found


def run_ray(folder: Path, *options: str, **variables: str) -> None:
    """Run `ray start`."""
    environment = outside_environment(**TOKEN, RAY_TMPDIR=str(folder), **variables)
    command = ["ray", "start", "--disable-usage-stats", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def growing_cluster(folder: Path) -> Iterator[GrowingCluster]:
    """A head without CPUs. Its autoscaler, of version 2, adds one node at the most, and removes it without work.

    `folder` must have a short name. No process is left behind.
    """
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(describe_cluster(address)))
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    identity = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_CLOUD_INSTANCE_ID": HEAD}
    head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--object-store-memory={STORE}"]
    cluster = GrowingCluster(address, folder)
    try:
        run_ray(folder, *head, f"--autoscaling-config={config}", **fake, **identity)
        yield cluster
    finally:
        left = cluster.processes("")
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)


def describe_cluster(address: str) -> dict[str, object]:
    """What the autoscaler reads."""
    return {
        "cluster_name": "growing",
        "max_workers": 1,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": address,
            "head_node_id": HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": NODE_CPUS, "object_store_memory": STORE},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 1,
            },
        },
        "head_node_type": "ray.head.default",
        **{f"{name}_commands": [] for name in LISTS},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
    }
