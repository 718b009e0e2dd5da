"""Size the actors of a job that segments: how many, and how much of a node each may use."""

import math
from dataclasses import dataclass

import ray

from seg_core.errors import SegError

CPUS_PER_ACTOR = 4  # beyond a few threads a convolution gains little; further cores serve further actors
READERS_FOR_JPEG_ENGINE = 4  # threads that are enough to feed a GPU's JPEG engine
MAX_UNPUBLISHED_PARTS = 8  # segmented parts of an actor on a GPU whose files are not yet published
READERS_ON_CPU = 2  # threads beside a model on a CPU: decoding takes a small part of its time


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Options that change the speed of a run, but not its rows."""

    window: int | None = None  # px; None: as large as memory allows, up to 2048
    batch: int | None = None  # windows; None: as many as make a GPU faster
    actors: tuple[int, int] | None = None  # minimum and maximum; None: one per GPU, or one per CPUS_PER_ACTOR cores
    gpus_per_actor: float = 1.0
    device: str = "auto"
    compiling: str = "auto"  # see Segmenter
    max_failures: int | None = None  # tiles that may fail; one more stops the run; None: no limit
    address: str | None = None  # of the Ray cluster; None: see ray_session
    verbose: bool = False  # whether Ray's messages are shown


@dataclass(frozen=True)
class ActorResources:
    """The number of actors that segment, and the resources of each."""

    min_actors: int
    max_actors: int
    num_cpus: int  # cores that Ray reserves for an actor
    num_gpus: float  # GPUs that Ray reserves for an actor
    threads: int  # for torch
    readers: int  # threads that read windows at first: see enough_readers
    memory: int  # bytes of a node's memory that one actor may use

    @property
    def cores(self) -> int:
        """The cores of a node that one actor may use."""
        return self.num_cpus + 1

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


def size_actors(actors: tuple[int, int] | None, gpus_per_actor: float, device: str) -> ActorResources:
    """Size the actors to the cluster: one per GPU, or one per CPUS_PER_ACTOR cores if no GPU is used.

    `actors` is the wanted minimum and maximum. Raises SegError if the cluster has no room for them, or no node with a
    CPU, or no GPU although `device` is one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        raise SegError("the cluster has no node with a CPU for workers")
    gpus = sum(n.get("GPU", 0) for n in nodes)
    use_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
    if use_gpu and not gpus:
        raise SegError(f"--device {device}: no node of the cluster has a GPU: use --device cpu")
    if use_gpu:
        nodes = [n for n in nodes if n.get("GPU")]
    if gpus_per_actor <= 0:
        raise SegError(f"--gpus-per-actor {gpus_per_actor:g}: must be more than 0")
    room = int(gpus / gpus_per_actor) if use_gpu else sum(int(n["CPU"]) for n in nodes)
    if room < (actors[1] if actors else 1):
        wanted = f"--actors {actors[1]}" if actors else f"--gpus-per-actor {gpus_per_actor:g}"
        raise SegError(f"{wanted}: the cluster has room for {room}")
    most = actors[1] if actors else room if use_gpu else sum(-(-int(n["CPU"]) // CPUS_PER_ACTOR) for n in nodes)
    # The most actors that each node may get.
    per_node = [max(1, int(n["GPU"] / gpus_per_actor)) if use_gpu else -(-most // len(nodes)) for n in nodes]
    cpus = min(int(n["CPU"]) // number for n, number in zip(nodes, per_node, strict=True))
    threads, readers = split_cores(cpus, use_gpu)
    return ActorResources(
        min_actors=actors[0] if actors else most,
        max_actors=most,
        num_cpus=max(1, (cpus if use_gpu else threads) - 1),  # one core is left for Ray's own work
        num_gpus=gpus_per_actor if use_gpu else 0,
        threads=threads,
        readers=readers,
        memory=int(min(n["memory"] / number for n, number in zip(nodes, per_node, strict=True))),
    )


def split_cores(cpus: int, use_gpu: bool) -> tuple[int, int]:
    """Return the numbers of torch threads and reading threads for an actor with `cpus` cores.

    Beside a GPU there is one reading thread per core.
    """
    threads = max(2, min(CPUS_PER_ACTOR, cpus))  # one thread would round sums in another order
    return threads, max(READERS_ON_CPU, cpus) if use_gpu else READERS_ON_CPU
