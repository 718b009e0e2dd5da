"""Measure the throughput of training, of making crops alone, and of training on one batch that is repeated."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from itertools import islice, repeat
from typing import Any

import torch

from seg_core.model.loading import choose_device
from seg_core.model.networks import build_model
from seg_core.threads import count_cpus
from seg_core.training.dataset import find_pairs, read_header
from seg_core.training.loop import Batch, Learner, set_training_mode, step

from ..ray_session import ray_session
from ..train import steps_an_epoch
from ..training.fine_tuning import choose_classes, read_origin
from ..training.preparation import decode, describe_model
from ..training.readers import BATCHES_AHEAD, BatchShare, choose_readers, iter_batches
from ..training.settings import TrainSettings
from ..training.worker import make_learner


def bench_train(settings: TrainSettings, data: str, num_steps: int = 30) -> dict[str, Any]:
    """Measure making crops, training on crops as they are made, and training on one repeated batch, in Mpx/s.

    All run in this process after a warm-up. The two kinds of training take turns, so that both meet the same load of
    the machine.
    """
    origin, pairs = read_origin(settings.begin_from), find_pairs(data, "train")
    classes = choose_classes(data, settings.class_name, origin)
    num_bands = len(read_header(pairs[0]).bands)
    header, _ = describe_model(settings, classes, num_bands, origin)
    header |= {"mean": (127.0,) * num_bands, "std": (64.0,) * num_bands}
    device, readers = choose_device(settings.device), choose_readers(settings.readers, 1)
    torch.set_num_threads(count_cpus())
    network = build_model(header["architecture"])
    steps = max(10 * num_steps, steps_an_epoch(settings, len(pairs)))
    learner = make_learner(settings, header, network, device, steps, settings.batch)
    set_training_mode(learner)
    with ray_session(None):
        samples = [ref for ref, _ in decode(pairs, classes)]
        batches = iter_batches(BatchShare(settings, num_steps), samples, range(sys.maxsize), readers, device)
        with closing(batches) as feed:  # while Ray runs: its threads would wait for ever for batches afterwards
            seconds = _time_steps(learner, feed, num_steps, BATCHES_AHEAD * max(1, readers))
    pixels = num_steps * settings.batch * settings.crop**2
    return {
        **{f"{name}_mpx_s": round(pixels / spent / 1e6, 3) for name, spent in seconds.items()},
        "fed_to_resident": round(seconds["resident"] / seconds["fed"], 3),
        "readers": readers,
        "device": str(device),
        "steps": 2 * num_steps,
        "batch": settings.batch,
        "crop": settings.crop,
    }


def _time_steps(learner: Learner, feed: Iterator[Batch], num_steps: int, ready: int) -> dict[str, float]:
    """Return the seconds of `num_steps` steps on a repeated batch and on the feed, and of that many batches alone.

    Up to `ready` batches that were made ahead are used up before the time is taken.
    """

    def train_on(batches: Iterator[Batch], number: int) -> float:
        started = time.perf_counter()
        losses = [step(learner, batch) for batch in islice(batches, number)]
        torch.stack(losses).sum().item()  # waits until the device has finished
        return time.perf_counter() - started

    images, labels = next(feed)
    resident = repeat((images.to(learner.device), labels.to(learner.device)))
    train_on(resident, 3)
    seconds = {"resident": 0.0, "fed": 0.0}
    for _ in range(2):
        seconds["resident"] += train_on(resident, num_steps) / 2
        deque(islice(feed, ready), maxlen=0)
        seconds["fed"] += train_on(feed, num_steps) / 2
    deque(islice(feed, ready), maxlen=0)
    started = time.perf_counter()
    deque(islice(feed, num_steps), maxlen=0)
    return {**seconds, "crops": time.perf_counter() - started}
