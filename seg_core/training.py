"""Train a network: a generator that yields the figures of each epoch. It knows neither files nor Ray.

It runs alone or in each of several processes: if `torch.distributed` is set up and the model wrapped for it, every
process draws its own share of each batch and of the validation images, and all yield the same figures.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seg_core.ahead import ahead
from seg_core.losses import MISSING, Loss
from seg_core.metrics import Counts, count, scores
from seg_core.models import class_probability, normalise

# Images `uint8 (n, height, width, bands)` and labels `uint8 (n, height, width)`, MISSING where there is no data.
Batch = tuple[NDArray[np.uint8], NDArray[np.uint8]]


@dataclass(kw_only=True)
class Learner:
    """All that changes while a network learns, and what turns a batch into a loss."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    loss: Loss
    mean: Sequence[float]  # of each band, in grey levels
    std: Sequence[float]
    building: int  # index of the class that is scored
    threshold: float
    device: torch.device
    bfloat16: bool
    max_norm: float | None  # gradients are clipped to it

    @property
    def network(self) -> nn.Module:
        """The model without its wrapper for several processes."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            wrapped: nn.Module = self.model.module
            return wrapped
        return self.model

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the weights."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def make_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """`adam` (weight decay as L2, as torch does it) or `adamw` (decoupled: Loshchilov & Hutter 2019)."""
    kinds: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[name](model.parameters(), lr=lr, weight_decay=weight_decay)


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, lr: float, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """`constant`, or `one-cycle` with a tenth of the steps to warm up (Smith & Topin 2018)."""
    if name == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total_steps, pct_start=0.1)


def epochs(
    learner: Learner,
    batches: Callable[[int, int], Batch],
    validation: Callable[[], Iterable[Batch]],
    *,
    steps: int,
    first: int,
    last: int,
) -> Iterator[dict[str, Any]]:
    """Train epochs `first` to `last` (counted from 1), `steps` steps each, and yield each one's figures.

    `batches(epoch, step)` gives this process's share of a batch, `validation()` its share of the images. Scores are
    over the valid pixels of all images, from counts summed over all processes.
    """
    with ThreadPoolExecutor(2) as pool:
        for epoch in range(first, last + 1):
            started = time.perf_counter()
            feed = ahead(pool, partial(batches, epoch), range(steps), depth=4)
            loss, pixels = _train_epoch(learner, feed)
            trained = time.perf_counter()
            counts = evaluate(learner, validation())
            yield {
                "epoch": epoch,
                "loss": loss,
                **{f"val_{name}": value for name, value in scores(counts).items()},
                "lr": learner.optimizer.param_groups[0]["lr"],
                "train_mpx_s": pixels / (trained - started) / 1e6,
                "seconds": time.perf_counter() - started,
            }


def _train_epoch(learner: Learner, feed: Iterable[Batch]) -> tuple[float, int]:
    """Mean loss over all steps and processes, and the number of pixels seen by all of them."""
    learner.model.train()
    total = torch.zeros(3, dtype=torch.float64, device=learner.device)  # losses, steps, pixels
    for batch in feed:
        loss = _step(learner, batch)
        total += torch.tensor([0.0, 1.0, batch[1].size], device=learner.device)
        total[0] += loss
    losses, steps, pixels = _sum_over_processes(total).tolist()
    return losses / steps, int(pixels)


def _step(learner: Learner, batch: Batch) -> Tensor:
    images, labels = _to_device(learner, batch)
    with _autocast(learner):
        loss = learner.loss(learner.model(images), labels)
    loss.backward()
    if learner.max_norm is not None:
        nn.utils.clip_grad_norm_(learner.model.parameters(), learner.max_norm)
    learner.optimizer.step()
    learner.schedule.step()
    learner.optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@torch.inference_mode()
def evaluate(learner: Learner, batches: Iterable[Batch]) -> Counts:
    """Pixel counts of the building class over the valid pixels that all processes were given."""
    # Not through the wrapper: it talks to the other processes at each call, and they may have fewer images.
    network = learner.network.eval()
    _share_buffers(network)
    counts = Counts()
    for batch in batches:
        images, labels = _to_device(learner, batch)
        with _autocast(learner):
            probability = class_probability(network(images), learner.building)
        predicted = (probability >= learner.threshold).cpu().numpy()
        truth = labels.cpu().numpy()
        counts = counts.plus(count(predicted, truth == learner.building, truth != MISSING))
    summed = _sum_over_processes(torch.tensor(counts, dtype=torch.int64, device=learner.device))
    return Counts(*(int(n) for n in summed))


def _to_device(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(batch[0]).to(learner.device).permute(0, 3, 1, 2)
    labels = torch.from_numpy(batch[1]).to(learner.device)
    images = normalise(images, labels != MISSING, learner.mean, learner.std)
    return images.contiguous(memory_format=torch.channels_last), labels


def _autocast(learner: Learner) -> AbstractContextManager[None]:
    return torch.autocast(learner.device.type, dtype=torch.bfloat16, enabled=learner.bfloat16)


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _share_buffers(network: nn.Module) -> None:
    """Give every process the batch norm statistics of the first, which are the ones that are saved."""
    if _several_processes():
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


def _sum_over_processes(values: Tensor) -> Tensor:
    if _several_processes():
        torch.distributed.all_reduce(values)
    return values
