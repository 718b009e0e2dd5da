"""How many actors segment on a cluster, and which share of its nodes each is given."""

import math
from dataclasses import dataclass

import ray

from seg_core.errors import SegError

CPUS_PER_ACTOR = 4  # beyond a few threads a convolution gains little; further cores serve further actors
READERS_TO_GPU = 4
MAX_UNPUBLISHED_PARTS = 8  # parts that are being published beside a GPU
READERS = 2  # threads beside a model on a CPU: decoding takes a small part of its time


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Options that only change how fast the rows come."""

    window: int | None = None  # px; None: as large as memory allows, up to 2048
    batch: int | None = None  # windows; None: as many as a GPU is faster with
    actors: tuple[int, int] | None = None
    gpus_per_actor: float = 1.0
    device: str = "auto"
    compiling: str = "auto"  # see Segmenter
    max_failures: int | None = None  # tiles; more end the run
    address: str | None = None
    verbose: bool = False


@dataclass(frozen=True)
class ActorResources:
    """How many actors segment, and what each is given."""

    least: int
    most: int
    num_cpus: int  # what Ray reserves
    num_gpus: float
    threads: int  # for torch
    readers: int  # threads that read windows at first: see enough_readers
    memory: int  # bytes of a node's memory that one actor may count on

    @property
    def cores(self) -> int:
        """Cores of a node that one actor may count on."""
        return self.num_cpus + 1

    def readers_to(self, decode: str) -> int:
        """Threads that read at first: to feed a GPU's JPEG engine takes little."""
        return min(self.readers, READERS_TO_GPU) if decode == "device" and self.num_gpus else self.readers

    @property
    def window_memory(self) -> float:
        """Bytes that windows must fit in; of a GPU only the actor on it knows how many it has."""
        return math.inf if self.num_gpus else self.memory

    @property
    def writers(self) -> int:
        """Who make rows and publish them: PNG takes a core about as long as JPEG, of fewer pixels.

        No more than there may be parts that wait for them, and one that is being finished.
        """
        return min(max(1, self.readers // 2), MAX_UNPUBLISHED_PARTS + 1)


def size_actors(actors: tuple[int, int] | None, gpus_per_actor: float, device: str) -> ActorResources:
    """Size the actors to the cluster: one a GPU, or else one for every few cores of the smallest node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        raise SegError("the cluster has no node with a CPU for workers")
    gpus = sum(n.get("GPU", 0) for n in nodes)
    use_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
    if use_gpu and not gpus:
        raise SegError(f"--device {device}: no node of the cluster has a GPU: say cpu")
    if use_gpu:
        nodes = [n for n in nodes if n.get("GPU")]
    if gpus_per_actor <= 0:
        raise SegError(f"--gpus-per-actor {gpus_per_actor:g}: must be more than 0")
    room = int(gpus / gpus_per_actor) if use_gpu else sum(int(n["CPU"]) for n in nodes)
    if room < (actors[1] if actors else 1):
        wanted = f"--actors {actors[1]}" if actors else f"--gpus-per-actor {gpus_per_actor:g}"
        raise SegError(f"{wanted}: the cluster has room for {room}")
    most = actors[1] if actors else room if use_gpu else sum(-(-int(n["CPU"]) // CPUS_PER_ACTOR) for n in nodes)
    # Of each node: how many actors it may get.
    crowds = [max(1, int(n["GPU"] / gpus_per_actor)) if use_gpu else -(-most // len(nodes)) for n in nodes]
    cpus = min(int(n["CPU"]) // crowd for n, crowd in zip(nodes, crowds, strict=True))
    threads, readers = share_cores(cpus, use_gpu)
    return ActorResources(
        least=actors[0] if actors else most,
        most=most,
        num_cpus=max(1, (cpus if use_gpu else threads) - 1),  # a core is left to Ray's own work
        num_gpus=gpus_per_actor if use_gpu else 0,
        threads=threads,
        readers=readers,
        memory=int(min(n["memory"] / crowd for n, crowd in zip(nodes, crowds, strict=True))),
    )


def share_cores(cpus: int, use_gpu: bool) -> tuple[int, int]:
    """Threads for torch, and threads that read, of an actor that has so many cores: beside a GPU all of them read."""
    threads = max(2, min(CPUS_PER_ACTOR, cpus))  # with one, sums are rounded in another order
    return threads, max(READERS, cpus) if use_gpu else READERS
