"""Load the batches of a training process ahead of its steps, in other processes of its node.

Batch loaders are Ray actors: they share the decoded images in the object store without copying them. Nothing is forked,
because the threads of OpenCV and OpenMP do not survive a fork, and would wait for each other for ever.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from seg_core.threads import count_cpus, prefetch
from seg_core.training.crops import Crops
from seg_core.training.dataset import Sample
from seg_core.training.loop import Batch

from .settings import TrainSettings

MAX_READERS = 12  # for one worker
BATCHES_AHEAD = 3  # batches ready for each reader


@dataclass(frozen=True)
class BatchShare:
    """Which crops of each batch one of several workers is given."""

    settings: TrainSettings
    steps: int  # an epoch
    rank: int = 0
    world: int = 1


class BatchLoader:
    """Makes a worker's share of a batch, given its number, which is counted from the first batch of the first epoch."""

    def __init__(self, share: BatchShare, samples: Sequence["ray.ObjectRef[Sample]"]) -> None:
        cv2.setNumThreads(1)
        settings = share.settings
        self.share = share
        self.crops = Crops(
            samples=[Sample(*pair) for pair in ray.get(list(samples))],
            size=settings.crop,
            batch=settings.batch,
            min_valid=settings.min_valid,
            augment=settings.augment,
            seed=settings.seed,
        )

    def make(self, number: int) -> Sample:
        """Images and labels of a batch, as Crops returns them."""
        epoch, step = divmod(number, self.share.steps)
        return self.crops(epoch + 1, step, self.share.rank, self.share.world)


def choose_readers(readers: int, workers_here: int) -> int:
    """Number of processes that make crops for each worker of a node; with -1 each worker keeps a core for itself.

    Where no core is left, it is 0: a thread of the worker makes them, which spares a process that loads libraries.
    """
    if readers >= 0:
        return readers
    return min(MAX_READERS, max(0, count_cpus() // workers_here - 1))


def iter_batches(
    share: BatchShare,
    samples: Sequence["ray.ObjectRef[Sample]"],
    numbers: range,
    readers: int,
    device: torch.device,
) -> Generator[Batch, None, None]:
    """Yield the numbered batches in order, made by `readers` processes (0: by a thread); in pinned memory for a GPU.

    It must be exhausted or closed before Ray is shut down.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # They take none of the CPUs that Ray counts: they share the one of their worker.
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    resources: list[Any] = [ray.remote(**options)(BatchLoader).remote(share, list(samples)) for _ in range(readers)]
    alone = None if resources else BatchLoader(share, samples)

    def fetch(number: int) -> Batch:
        made = alone.make(number) if alone else ray.get(resources[number % len(resources)].make.remote(number))
        image, label = (torch.tensor(part) for part in made)
        return (image.pin_memory(), label.pin_memory()) if device.type == "cuda" else (image, label)

    with ThreadPoolExecutor(max(1, readers)) as pool:
        yield from prefetch(pool, fetch, numbers, BATCHES_AHEAD * max(1, readers))
