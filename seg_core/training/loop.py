"""Train a network: a generator that yields the figures of each epoch. It knows neither files nor Ray.

It runs alone or in each of several processes: if `torch.distributed` is set up and the model wrapped for it, every
process is fed its own share of each batch and of the validation images, and all yield the same figures.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from seg_core.chips import MISSING, UNLABELLED
from seg_core.errors import JobError
from seg_core.model.equivariance import average_statistics
from seg_core.model.networks import class_logit, class_probability, normalise
from seg_core.training.calibration import BINS_PER_LOGIT, MAX_LOGIT, NUM_BINS, scale_probability
from seg_core.training.losses import Loss
from seg_core.training.metrics import STEPS as THRESHOLDS
from seg_core.training.metrics import Histogram, scores

# Images `uint8 (n, height, width, bands)` and labels `uint8 (n, height, width)`: class indices, UNLABELLED and MISSING.
Batch = tuple[Tensor, Tensor]

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]

REMEDY = "begin anew (another --work or --out) with a lower lr, or with precision float32"
VALIDATING = "on validation"  # a note of errors of memory
CHECK_EVERY = 50  # steps; to look at a loss, the device must finish the step


@dataclass(kw_only=True)
class Learner:
    """State of a training run: the network, its optimizer and schedule, and what turns a batch into a loss."""

    network: nn.Module
    model: Callable[[Tensor], Tensor]  # the network as it is trained: perhaps compiled, or one of several processes
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    loss: Loss
    mean: Tensor  # of each band, in grey levels, on the device
    std: Tensor
    positive: int  # index of the positive class, which is scored
    threshold: float | None  # of calibrated probability; None: see kept_threshold
    device: torch.device
    bfloat16: bool
    max_norm: float | None  # gradients are clipped to it
    micro_batch: int  # crops that go through the network at once; gradients of a step's are added up
    seed: int
    equivariant: bool = False  # whether the answer turns with the image: see seg_core.model.equivariance
    freeze_batchnorm: bool = False  # whether batch norm keeps the statistics that it begins with
    kept_threshold: float | None = None  # of probability before calibration; None: the best at each validation
    average: AveragedModel | None = None  # what is validated and kept, instead of the network
    share: float = 1.0  # weight of this process's gradients: its share of a batch over the mean share of all processes
    rank: int = 0
    confidence: tuple[float, ...] = ()  # Histogram.confidence of the last validation, calibrated
    history: list[dict[str, Any]] = field(default_factory=list)  # the figures of each epoch, kept by `epochs`

    @property
    def kept(self) -> nn.Module:
        """The network whose weights are validated and kept: the averaged one where there is one."""
        if self.average is None:
            return self.network
        averaged: nn.Module = self.average.module
        return averaged

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the weights that are kept. It needs no random state: see `epochs`."""
        return {
            "network": self.network.state_dict(),
            "averaged": None if self.average is None else self.average.n_averaged,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any], kept: dict[str, Tensor]) -> None:
        """Restore a checkpoint: its state, and the weights that were kept."""
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.module.load_state_dict(kept)
            self.average.n_averaged.copy_(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.history = state["history"]


def make_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """`adam` (weight decay as L2, as torch does it) or `adamw` (decoupled: Loshchilov & Hutter 2019)."""
    kinds: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[name](model.parameters(), lr=lr, weight_decay=weight_decay)


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, lr: float, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """`constant`; `one-cycle` (Smith & Topin 2018); `cosine` (Loshchilov & Hutter 2017): a tenth of the steps warms up.

    One cycle rises by a cosine too, and lowers Adam's momentum while the rate is high; `cosine` rises linearly.
    """
    if name == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if name == "cosine":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_warm_cosine, total_steps=total_steps))
    warm_up = 0.1 if total_steps != 10 else 0.2  # of exactly one step, torch divides by zero
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total_steps, pct_start=warm_up)


def _warm_cosine(step: int, total_steps: int) -> float:
    """Share of the highest rate at a step, counted from 0: 1 at the last one that warms up, 0 after the last of all."""
    warm_up = max(1, total_steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step + 1 - warm_up) / (total_steps + 1 - warm_up))) / 2


def make_average(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of weights and batch norm statistics, of at most `decay` a step.

    It follows more closely at first: after n steps by n + 1 parts of n + 10, as Martin Abadi et al. do it (2016,
    TensorFlow's ExponentialMovingAverage), so that the random weights of the beginning don't linger.
    """

    @torch.no_grad()
    def follow(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        # torch gives tensors of one kind at a time, and the number on the device, where it must not be waited for.
        if not averaged[0].dtype.is_floating_point:  # batch norm's count of batches
            torch._foreach_copy_(averaged, current)
            return
        weight = 1 - torch.as_tensor((1 + num_averaged) / (10 + num_averaged)).clamp(max=decay)
        change = torch._foreach_sub(current, averaged)  # noqa: SLF001 - as torch's own averages do it
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(averaged, change)

    average = AveragedModel(network, multi_avg_fn=follow, use_buffers=True)
    average.eval()
    return average


def epochs(
    learner: Learner,
    batches: Iterator[Batch],
    validation: Callable[[], Iterable[Batch]],
    *,
    steps: int,
    first: int,
    last: int,
    patience: int = 0,
) -> Iterator[dict[str, Any]]:
    """Train epochs `first` to `last` (counted from 1), `steps` steps each, and yield each one's figures.

    `batches` are this process's shares, from epoch `first` on; `validation()` its share of the images. Scores are over
    the valid pixels of all images, from counts summed over all processes. It ends early after `patience` epochs
    without a better IoU (0: never). The random state is set anew at each epoch, from seed, epoch and rank, so that
    training goes on from a checkpoint as if it had never stopped. Raises JobError at a loss that is no number.
    """
    for epoch in range(first, last + 1):
        if patience and _epochs_since_best(learner.history) >= patience:
            return
        torch.manual_seed(int(np.random.SeedSequence([learner.seed, epoch, learner.rank]).generate_state(1)[0]))
        started = time.perf_counter()
        loss, pixels = _train_epoch(learner, islice(batches, steps), epoch)
        trained = time.perf_counter()
        try:
            histogram = evaluate(learner, validation(), epoch)
        except torch.OutOfMemoryError as error:
            error.add_note(VALIDATING)
            raise
        temperature = histogram.temperature()
        calibrated = histogram.calibrated(temperature)
        if learner.threshold is None:
            uncalibrated = learner.kept_threshold or histogram.best_threshold()
            threshold, counts = _scale_threshold(uncalibrated, temperature), histogram.counts(uncalibrated)
        else:
            threshold, counts = learner.threshold, calibrated.counts(learner.threshold)
        figures = scores(counts)
        learner.confidence = calibrated.confidence()
        learner.history.append(
            {
                "epoch": epoch,
                "loss": loss,
                **{f"val_{name}": value for name, value in figures.items()},
                "temperature": temperature,
                "threshold": threshold,
                "lr": learner.optimizer.param_groups[0]["lr"],
                "train_mpx_s": pixels / (trained - started) / 1e6,
                "seconds": time.perf_counter() - started,
            }
        )
        yield learner.history[-1]


def _scale_threshold(threshold: float, temperature: float) -> float:
    """Return the threshold of calibrated probabilities that gives the mask of one of uncalibrated ones."""
    return min(max(round(float(scale_probability(threshold, temperature)), 4), 0.0001), 0.9999)


def _epochs_since_best(history: Sequence[dict[str, Any]]) -> int:
    ious = [figures["val_iou"] or 0.0 for figures in history]
    return len(ious) - 1 - ious.index(max(ious)) if ious else 0


def _train_epoch(learner: Learner, feed: Iterable[Batch], epoch: int) -> tuple[float, int]:
    """Mean loss over all steps and processes, and the number of pixels seen by all of them."""
    set_training_mode(learner)
    losses: list[Tensor] = []
    pixels = checked = 0
    for batch in feed:
        losses.append(step(learner, batch))
        pixels += batch[1].numel()
        if len(losses) - checked >= CHECK_EVERY:
            _refuse_nan(losses, checked, epoch)
            checked = len(losses)
    _refuse_nan(losses, checked, epoch)
    total = torch.stack([torch.stack(losses).double().sum(), torch.tensor(float(pixels), device=learner.device)])
    loss, seen = _sum_over_processes(total).tolist()
    return loss / len(losses) / _num_processes(), int(seen)


def set_training_mode(learner: Learner) -> None:
    """Have the network train; batch norm only its weights, where its statistics are frozen."""
    learner.network.train()
    if learner.freeze_batchnorm:
        for module in learner.network.modules():
            if isinstance(module, nn.BatchNorm2d):  # timm's too
                module.eval()


def _refuse_nan(losses: Sequence[Tensor], first: int, epoch: int) -> None:
    if len(losses) > first:
        finite = _sum_over_processes(torch.stack(list(losses[first:]))).isfinite().tolist()
        if not all(finite):
            number = first + finite.index(False) + 1
            raise JobError(f"epoch {epoch}, step {number}: the loss is not finite: {REMEDY}")


def step(learner: Learner, batch: Batch) -> Tensor:
    """Take one step of the optimizer. The loss that it returns stays on the device: reading it would wait for that."""
    number = -(-len(batch[1]) // learner.micro_batch)
    # Of even size, because some batch norms can't take a crop that is left alone.
    pieces = list(zip(*(part.tensor_split(number) for part in batch), strict=True))
    total = torch.zeros((), device=learner.device)
    for count, piece in enumerate(pieces, 1):
        images, labels = _to_device(learner, piece)
        weight = len(labels) / len(batch[1])
        with _gradient_sync(learner, last=count == number):
            with _autocast(learner):
                loss = learner.loss(learner.model(images), labels) * weight
            (loss * learner.share).backward()
        total += loss.detach()
    if learner.max_norm is not None:
        nn.utils.clip_grad_norm_(learner.network.parameters(), learner.max_norm)
    learner.optimizer.step()
    learner.schedule.step()
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.average is not None:
        learner.average.update_parameters(learner.network)
    return total


def _gradient_sync(learner: Learner, last: bool) -> AbstractContextManager[Any]:
    """A context in which processes exchange gradients for the last piece of a step alone, when all are added up."""
    if isinstance(learner.model, nn.parallel.DistributedDataParallel) and not last:
        alone: AbstractContextManager[Any] = learner.model.no_sync()
        return alone
    return nullcontext()


@torch.inference_mode()
def evaluate(learner: Learner, batches: Iterable[Batch], epoch: int = 0) -> Histogram:
    """Histogram of the positive class's probabilities over the valid pixels that all processes were given.

    It also holds their logits if the network has one output or two. Raises JobError where a probability is no number,
    so that no checkpoint is made of weights that have overflown.
    """
    # Not through the wrapper: it talks to the other processes at each call, and they may have fewer images.
    network = learner.kept.eval()
    _share_buffers(network)
    if learner.equivariant:
        average_statistics(network)
    cells = torch.zeros(2 * THRESHOLDS + 1, dtype=torch.int64, device=learner.device)  # the last: no numbers
    logit_cells = torch.zeros(2 * NUM_BINS, dtype=torch.int64, device=learner.device)
    for batch in batches:
        images, labels = _to_device(learner, batch)
        with _autocast(learner):
            logits = network(images)
        probability, valid = class_probability(logits, learner.positive), labels != MISSING
        probability, truth = probability[valid], labels[valid] == learner.positive
        level = (probability.nan_to_num(0.0) * THRESHOLDS).long().clamp(max=THRESHOLDS - 1) + THRESHOLDS * truth
        level = torch.where(probability.isnan(), 2 * THRESHOLDS, level)
        cells += torch.bincount(level, minlength=2 * THRESHOLDS + 1)
        if logits.shape[1] <= 2:  # the logit of a class against several others is none that a temperature divides
            bins = (class_logit(logits, learner.positive)[valid].nan_to_num(0.0) + MAX_LOGIT) * BINS_PER_LOGIT
            bins = bins.clamp(0, NUM_BINS - 1).long() + NUM_BINS * truth
            logit_cells += torch.bincount(bins, minlength=2 * NUM_BINS)
    found, of_logits = (_sum_over_processes(each).cpu().numpy() for each in (cells, logit_cells))
    if found[-1]:
        raise JobError(f"epoch {epoch}: on validation the network's answer is not finite: {REMEDY}")
    return Histogram(found[:-1].reshape(2, THRESHOLDS), of_logits.reshape(2, NUM_BINS))


def _to_device(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return a batch's images, normalised, and its labels, MISSING where no pixel is to be scored."""
    images = batch[0].to(learner.device, non_blocking=True).permute(0, 3, 1, 2)
    labels = batch[1].to(learner.device, non_blocking=True)
    images = normalise(images, labels != MISSING, learner.mean, learner.std)
    labels = torch.where(labels == UNLABELLED, MISSING, labels)
    return images.contiguous(memory_format=torch.channels_last), labels


def _autocast(learner: Learner) -> AbstractContextManager[None]:
    return torch.autocast(learner.device.type, dtype=torch.bfloat16, enabled=learner.bfloat16)


def _num_processes() -> int:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if several else 1


def _share_buffers(network: nn.Module) -> None:
    """Give every process the batch norm statistics of the first process, which are saved."""
    if _num_processes() > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


def _sum_over_processes(values: Tensor) -> Tensor:
    if _num_processes() > 1:
        torch.distributed.all_reduce(values)
    return values
