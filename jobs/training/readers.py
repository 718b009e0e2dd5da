"""Crops for a training process, made ahead of it by other processes of its node.

Readers are Ray actors: they see the decoded images in the object store without a copy, and nothing is forked, for
OpenCV's and OpenMP's threads don't outlive a fork, and wait for each other for ever.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from seg_core.threads import prefetch
from seg_core.training.crops import Crops
from seg_core.training.dataset import Sample
from seg_core.training.loop import Batch

from .settings import TrainSettings

MAX_READERS = 12  # for one worker
BATCHES_AHEAD = 3  # batches ready for each reader


@dataclass(frozen=True)
class Share:
    """What one of several workers takes of each batch."""

    settings: TrainSettings
    steps: int  # an epoch
    rank: int = 0
    world: int = 1


class Reader:
    """Makes a worker's share of a batch, by the batch's number, counted from the first of the first epoch."""

    def __init__(self, share: Share, samples: Sequence["ray.ObjectRef[Sample]"]) -> None:
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
        """Images and labels, as Crops gives them."""
        epoch, step = divmod(number, self.share.steps)
        return self.crops(epoch + 1, step, self.share.rank, self.share.world)


def choose_readers(readers: int, workers_here: int) -> int:
    """How many processes make crops for one of the workers of a node; -1 leaves each worker a core."""
    if readers >= 0:
        return readers
    return min(MAX_READERS, max(1, (os.cpu_count() or 1) // workers_here - 1))


def iter_batches(
    share: Share,
    samples: Sequence["ray.ObjectRef[Sample]"],
    numbers: range,
    readers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """The numbered batches in order, by that many readers (0: by a thread), on pinned memory for a GPU."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # They take no CPU of those that Ray counts: a worker's own is the one they are paid from.
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    resources: list[Any] = [ray.remote(**options)(Reader).remote(share, list(samples)) for _ in range(readers)]
    alone = None if resources else Reader(share, samples)

    def fetch(number: int) -> Batch:
        made = alone.make(number) if alone else ray.get(resources[number % len(resources)].make.remote(number))
        image, label = (torch.tensor(part) for part in made)
        return (image.pin_memory(), label.pin_memory()) if device.type == "cuda" else (image, label)

    with ThreadPoolExecutor(max(1, readers)) as pool:
        yield from prefetch(pool, fetch, numbers, BATCHES_AHEAD * max(1, readers))
