"""Size the actors of a job that segments: how many, and how much of a node each may use."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from .capacity import NO_CPU, NODE_TIMEOUT, Shortage, wait_for_nodes
from .node_watch import list_nodes
from .ray_session import find_address

CPUS_PER_ACTOR = 4  # beyond a few threads a convolution gains little; further cores serve further actors
READERS_FOR_JPEG_ENGINE = 4  # threads that are enough to feed a GPU's JPEG engine
MAX_UNPUBLISHED_PARTS = 8  # segmented parts of an actor on a GPU whose files are not yet published
READERS_ON_CPU = 2  # threads beside a model on a CPU: decoding takes a small part of its time
MOST_ACTORS = 2**10  # that a run asks for by itself
NODE_GROUP_LABEL = "ray.io/node-group"
Resources = dict[str, Any]  # of a node, by name


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Options that change the speed of a run, but not its rows."""

    window: int | None = None  # px; None: as large as memory allows, up to 2048
    batch: int | None = None  # windows; None: as many as make a GPU faster
    # The least number, which there must be room for, and the most, as further nodes come; None: see size_actors.
    actors: tuple[int, int] | None = None
    gpus_per_actor: float = 1.0
    readers: int = 0  # Ray tasks in which each actor reads; 0: it reads in threads of its own
    device: str = "auto"
    compiling: str = "auto"  # see Segmenter
    max_failures: int | None = None  # tiles that may fail; one more stops the run; None: no limit
    address: str | None = None  # of the Ray cluster; None: see ray_session
    node_timeout: float = NODE_TIMEOUT  # s to wait for nodes with room for the least number of actors
    verbose: bool = False  # whether Ray's messages are shown


@dataclass(frozen=True)
class ActorResources:
    """The number of actors that segment, and the resources of each."""

    min_actors: int  # that the nodes have room for
    max_actors: int  # that there may be when further nodes come
    num_cpus: float  # cores that Ray reserves for an actor
    num_gpus: float  # GPUs that Ray reserves for an actor
    threads: int  # for torch
    readers: int  # threads that read windows at first: see enough_readers
    memory: int  # bytes of a node's memory that one actor may use
    reading_tasks: int = 0  # Ray tasks that read windows for an actor; 0: its own threads read

    @property
    def cores(self) -> int:
        """The cores of a node that one actor may use."""
        return int(self.num_cpus) + 1 if self.num_gpus else self.threads

    def initial_readers(self, decode: str) -> int:
        """Return the number of threads that read at first: fewer if a GPU's JPEG engine decodes."""
        return min(self.readers, READERS_FOR_JPEG_ENGINE) if decode == "device" and self.num_gpus else self.readers

    @property
    def window_memory(self) -> float:
        """The bytes that windows must fit in. They are unlimited on a GPU, whose memory only its actor knows."""
        return math.inf if self.num_gpus else self.memory

    @property
    def writers(self) -> int:
        """The number of threads or processes that make rows and publish parts.

        Half as many as readers are enough: encoding PNG takes a core about as long as decoding JPEG, but there are
        fewer pixels to encode. More than the unpublished parts and the one in progress would have nothing to do.
        """
        return min(max(1, self.readers // 2), MAX_UNPUBLISHED_PARTS + 1)


def size_actors(execution: ExecutionOptions) -> ActorResources:
    """Size the actors to the nodes of the cluster: one per GPU, or one per CPUS_PER_ACTOR cores if no GPU is used.

    A cluster that this process has joined may get further nodes. If it lacks room for the least number of actors,
    this waits for them, and asks for them. Raises SegError if there still is no room, and at once in a Ray of this
    process.
    """
    bundle = {"CPU": 1.0, "GPU": execution.gpus_per_actor} if _find_nodes(execution)[1] else {"CPU": 1.0}
    least = execution.actors[0] if execution.actors else 1
    waiting = execution.address, execution.node_timeout
    wait_for_nodes(partial(_find_shortage, execution), [bundle] * least, *waiting)
    nodes, use_gpu = _find_nodes(execution)
    sized = _divide(nodes, execution, use_gpu, joined=find_address(execution.address) is not None)
    if sized.reading_tasks:
        wait_for_nodes(partial(_find_shortage_of_readers, sized), [{"CPU": 1.0}], *waiting)
    return sized


def _find_nodes(execution: ExecutionOptions) -> tuple[list[Resources], bool]:
    """Return the resources of the nodes that suit actors, and whether these use GPUs."""
    nodes = [node["Resources"] for node in list_nodes().values() if node["Resources"].get("CPU")]
    with_gpus = [node for node in nodes if node.get("GPU")]
    use_gpu = execution.device.startswith("cuda") or (execution.device == "auto" and bool(with_gpus))
    return (with_gpus if use_gpu else nodes), use_gpu


def _find_shortage(execution: ExecutionOptions) -> Shortage | None:
    """Return what the nodes lack for the least number of actors; None if they lack nothing."""
    nodes, use_gpu = _find_nodes(execution)
    if not nodes and use_gpu:
        return Shortage(f"--device {execution.device}: no node of the cluster has a GPU", "use --device cpu")
    if not nodes:
        hint = ", nor a GPU (--device cuda waits for one)" if execution.device == "auto" else ""
        return Shortage(f"{NO_CPU}{hint}", "start one")
    room = sum(int(n["GPU"] / execution.gpus_per_actor) if use_gpu else int(n["CPU"]) for n in nodes)
    least, most = execution.actors or (1, 1)
    if room >= least:
        return None
    if not room:
        return Shortage(f"--gpus-per-actor {execution.gpus_per_actor:g}: no node has as many", "use fewer")
    return Shortage(f"--actors {least}: the cluster has room for {room}", f"use --actors {room}:{max(room, most)}")


def _find_shortage_of_readers(sized: ActorResources) -> Shortage | None:
    """Return what the nodes lack for tasks that read beside the actors; None if they lack nothing."""
    cpus = sum(int(node["Resources"].get("CPU", 0)) for node in list_nodes().values())
    if cpus - sized.min_actors * sized.num_cpus >= 1:
        return None
    return Shortage(f"--readers {sized.reading_tasks}: the processes that segment take every CPU", "leave it out")


def _divide(nodes: list[Resources], execution: ExecutionOptions, use_gpu: bool, joined: bool) -> ActorResources:
    """Divide nodes among the actors that are to start now; those of further nodes get the same."""
    gpus_per_actor = execution.gpus_per_actor
    per_node = [int(n["GPU"] / gpus_per_actor) if use_gpu else -(-int(n["CPU"]) // CPUS_PER_ACTOR) for n in nodes]
    number = total = sum(per_node)
    most = total if not (joined and _is_managed()) else MOST_ACTORS
    if execution.actors:
        number = max(execution.actors[0], min(execution.actors[1], total))
        most = execution.actors[1] if joined else number
    if not use_gpu and number != total:
        per_node = [-(-number // len(nodes))] * len(nodes)
    shares = [(n, max(1, actors)) for n, actors in zip(nodes, per_node, strict=True)]
    cpus = min(int(n["CPU"]) // actors for n, actors in shares)
    threads, readers = split_cores(cpus, use_gpu)
    num_cpus: float = max(1, (cpus if use_gpu else threads) - 1)  # one core is left for Ray's own work
    if most > number and not use_gpu:  # all of its share, or a node would hold more actors than it has memory for
        spare = 1 if execution.readers else 0  # of each node, for tasks that read
        num_cpus = max(1, int(min(100 * (n["CPU"] - spare) / actors for n, actors in shares)) / 100)
    return ActorResources(
        min_actors=number,
        max_actors=most,
        num_cpus=num_cpus,
        num_gpus=gpus_per_actor if use_gpu else 0,
        threads=threads,
        readers=readers,
        memory=int(min(n["memory"] / actors for n, actors in shares)),
        reading_tasks=execution.readers,
    )


def _is_managed() -> bool:
    """Whether an autoscaler or KubeRay starts the nodes of the cluster: they have the name of a group of nodes then."""
    return any(node.get("Labels", {}).get(NODE_GROUP_LABEL) for node in list_nodes().values())


def split_cores(cpus: int, use_gpu: bool) -> tuple[int, int]:
    """Return the numbers of torch threads and reading threads for an actor with `cpus` cores.

    Beside a GPU there is one reading thread per core.
    """
    threads = max(2, min(CPUS_PER_ACTOR, cpus))  # one thread would round sums in another order
    return threads, max(READERS_ON_CPU, cpus) if use_gpu else READERS_ON_CPU
