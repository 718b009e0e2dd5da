"""What the driver gives to the training workers, and the messages that they send back through a queue."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypeAlias, TypedDict

import ray
from ray.util.queue import Queue

from .settings import TrainSettings


class WorkerConfig(TypedDict):
    """What each worker is started with."""

    settings: TrainSettings
    header: dict[str, Any]  # the fields of the bundle that are known before training
    initial: ray.ObjectRef[Any] | None  # weights to begin with, by name; None: each worker draws them from the seed
    samples: dict[str, list[ray.ObjectRef[Any]]]  # decoded pairs, by split
    steps: int  # per epoch
    queue: NotRequired[Queue]  # for the messages below; the driver adds it when it starts the workers


@dataclass(frozen=True)
class Note:
    """A line to print."""

    text: str


@dataclass(frozen=True)
class EpochDone:
    """The figures of an epoch: see `seg_core.training.loop.epochs`."""

    figures: dict[str, Any]


@dataclass(frozen=True)
class Resumed:
    """Training was resumed from a checkpoint. Holds the figures of the epochs before."""

    history: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Failed:
    """The workers have stopped for a reason that the user can do something about."""

    error: Exception


Message: TypeAlias = Note | EpochDone | Resumed | Failed
