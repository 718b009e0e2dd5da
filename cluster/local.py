"""A Ray cluster of several nodes on this one machine, to try `seg submit` on.

    python cluster/local.py [--nodes 2] [--cpus 2] [--head-cpus 0] [--gpus 1] [--memory 4] [--port 8265]

It prints the address of its dashboard and serves until it is interrupted, and then leaves no process behind. Only this
machine can reach it, and it asks for the token of its user.
"""

import argparse
import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

LOOPBACK = "127.0.0.1"
SOCKET_PATH = 107  # bytes that the path of a Unix socket may have
LONGEST_SOCKET = "/ray-________/ray/session_0000-00-00_00-00-00_000000_0000000/sockets/plasma_store_00"
GIB = 2**30
PATIENCE = 10.0  # s that processes are given to end
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
# Gloo, through which workers train together, listens on this interface. Ray would take 127.0.0.1 for the address that
# other machines have for this one, and look for the head there; as on macOS and Windows, it is not to.
LOOPBACK_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def main() -> None:
    """Start the nodes, wait for SIGINT or SIGTERM, stop the nodes."""
    args = parse_arguments()
    stopped = threading.Event()

    def stop(_: int, __: FrameType | None) -> None:
        stopped.set()

    set_handlers(stop)
    try:
        with serving(args) as cluster:
            set_handlers(stop)  # Ray has put a handler of its own in place
            print(f"http://{cluster.webui_url}", flush=True)
            explain(args)
            stopped.wait()
    except OSError as error:
        sys.exit(f"local.py: {error}")


def parse_arguments() -> argparse.Namespace:
    """Return the options. Ends the process with one line and code 2 where they can't work."""
    parser = argparse.ArgumentParser(description="Start a Ray cluster of several nodes on this machine.")
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="number of nodes, the head among them (2)")
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="CPUs that each node offers (2)")
    parser.add_argument("--head-cpus", type=int, metavar="N", help="CPUs that the head offers (as --cpus says)")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs that each node claims to have (0)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory that each node offers (as Ray finds it)")
    parser.add_argument("--port", type=int, default=8265, metavar="PORT", help="port of the dashboard (8265)")
    args = parser.parse_args()
    wrong = find_wrong_number(args) or find_taken_port(args.port) or find_useless_folder(temporary_folder())
    if wrong:
        parser.exit(2, f"local.py: {wrong}\n")
    return args


def find_wrong_number(args: argparse.Namespace) -> str | None:
    """What is wrong with the size of the cluster, if anything."""
    if args.nodes < 1:
        return f"--nodes {args.nodes}: a cluster has at least one node"
    for name in ("cpus", "head_cpus", "gpus", "memory"):
        if (getattr(args, name) or 0) < 0:
            return f"--{name.replace('_', '-')} {getattr(args, name)}: a node can't offer less than nothing"
    return None


def find_taken_port(port: int) -> str | None:
    """Why the dashboard can't listen on a port, if it can't."""
    if not 0 < port < 2**16:
        return f"--port {port}: not a port: choose one from 1024 to 65535"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            return f"--port {port}: the dashboard can't listen there ({error.strerror}): choose another --port"
    return None


def temporary_folder() -> str:
    """The folder in which the nodes put their sockets and logs, in a folder of their own."""
    return os.path.abspath(os.environ.get("RAY_TMPDIR") or "/tmp")  # noqa: S108 - short, for it is in paths of sockets


def find_useless_folder(folder: str) -> str | None:
    """Why the nodes can't put their sockets into a folder, if they can't."""
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        return f"RAY_TMPDIR={folder}: no folder that can be written to: set RAY_TMPDIR to one that is"
    longest = SOCKET_PATH - len(LONGEST_SOCKET)
    if len(os.fsencode(folder)) > longest:
        return f"RAY_TMPDIR={folder}: longer than the {longest} bytes that Ray has room for: set RAY_TMPDIR to another"
    return None


@contextlib.contextmanager
def serving(args: argparse.Namespace) -> Iterator["Cluster"]:
    """A cluster whose nodes run meanwhile."""
    # Jobs are started as `python`, which is to be the one that has what they need: this one.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.update(LOOPBACK_ENVIRONMENT)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else the dashboard sends statistics every hour
    require_token()
    with TemporaryDirectory(prefix="ray-", dir=temporary_folder(), ignore_cleanup_errors=True) as folder:
        # Ray writes the address of the cluster to a file here, and `ray.init()` reads it. In the folder that every Ray
        # on this machine shares by default, a job would join another cluster, and other programs would join this one.
        os.environ["RAY_TMPDIR"] = folder
        import ray  # which reads the environment when it is imported
        from ray.cluster_utils import Cluster

        head_cpus = args.cpus if args.head_cpus is None else args.head_cpus
        head = {"include_dashboard": True, "dashboard_host": LOOPBACK, "dashboard_port": args.port}
        cluster = Cluster(initialize_head=True, head_node_args={**head, **node_options(args, head_cpus)})
        try:
            for _ in range(args.nodes - 1):
                cluster.add_node(**node_options(args, args.cpus))
            cluster.wait_for_nodes()
            yield cluster
        finally:
            processes = psutil.Process().children(recursive=True)
            ray.shutdown()
            cluster.shutdown()
            end(processes)


def end(processes: list[psutil.Process]) -> None:
    """Wait until processes have ended that do so by themselves, such as those of jobs, and kill the others."""
    _, left = psutil.wait_procs(processes, timeout=PATIENCE)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=PATIENCE)


def require_token() -> None:
    """Have the nodes ask for the token in ~/.ray/auth_token, which is made if needed, unless $RAY_AUTH_MODE differs."""
    path = Path.home() / ".ray" / "auth_token"
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode != "token" or any(os.environ.get(name) for name in TOKEN_VARIABLES) or path.exists():
        return
    path.parent.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_name(f"auth_token.{secrets.token_hex(8)}")
    with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):  # of two that start at once the first one makes it
        os.link(draft, path)
    os.unlink(draft)


def node_options(args: argparse.Namespace, cpus: int) -> dict[str, Any]:
    """Options of a node, whose servers all listen on loopback alone, for that is its address.

    Its agent, which starts jobs, gets a port of its own: any Ray on this machine wants 52365.
    """
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    memory = {} if args.memory is None else {"memory": int(args.memory * GIB)}
    sizes = {"num_cpus": cpus, "num_gpus": args.gpus, **memory}
    return {"node_ip_address": LOOPBACK, "dashboard_agent_listen_port": port, **sizes}


def set_handlers(handler: Any) -> None:
    """Let a function handle what ends the cluster."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def explain(args: argparse.Namespace) -> None:
    """Say on standard error how the cluster is used and ended."""
    found = "" if args.port == 8265 else f" --address http://{LOOPBACK}:{args.port}"
    mode = os.environ["RAY_AUTH_MODE"]
    print(f"{args.nodes} nodes run: seg submit{found} -- COMMAND; authentication: {mode}; Ctrl-C ends", file=sys.stderr)


if __name__ == "__main__":
    main()
