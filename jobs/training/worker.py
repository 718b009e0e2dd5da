"""One training process: its share of each batch and of the validation images, a checkpoint after each epoch."""

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import get_device, prepare_model
from torch import nn

from seg_core.errors import JobError, SegError
from seg_core.grid import round_up
from seg_core.model.bundle import Bundle, read_bundle, read_weights, write_bundle
from seg_core.model.equivariance import make_equivariant
from seg_core.model.networks import build_model, stride_of, training_bytes_per_px
from seg_core.model.unet import UNet
from seg_core.processor import computes_bfloat16
from seg_core.run.record import now
from seg_core.threads import count_cpus, count_memory
from seg_core.training.calibration import scale_probability
from seg_core.training.crops import iter_windows, pad
from seg_core.training.dataset import Sample
from seg_core.training.loop import VALIDATING, Batch, Learner, epochs, make_average, make_optimizer, make_schedule
from seg_core.training.losses import make_loss

from .messages import EpochDone, Failed, Note, Resumed, WorkerConfig
from .readers import BatchShare, choose_readers, iter_batches
from .settings import TrainSettings

VALIDATION_SIDE = 2048  # px; larger validation images are taken in windows, so that memory is bounded
MEMORY_SHARE = 0.8  # share of the memory that a step is planned to fill
COMPILE_FROM_PX = 10**10  # px of a training run, which take a GPU a few minutes; to compile takes one or two


def train_worker(config: WorkerConfig) -> None:
    """Train to the end, from the last checkpoint if there is one. Ray Train calls it in each worker."""
    settings = config["settings"]
    context = ray.train.get_context()
    rank, world, steps = context.get_world_rank(), context.get_world_size(), config["steps"]
    torch.set_num_threads(max(1, count_cpus() // context.get_local_world_size()))
    torch.manual_seed(settings.seed)
    validation = [Sample(*pair) for pair in ray.get(config["samples"]["val"][rank::world])]
    try:
        learner, first = _make_learner(settings, config["header"], steps, config["initial"])
        problem = None
    except SegError as error:
        problem = error
        config["queue"].put(Failed(error))
    # A worker alone may lack memory; then none begins, for they would wait for it.
    if _any_worker(problem is not None):
        return
    done = first > settings.epochs
    if rank == 0 and not done and is_compiled(settings, learner.device, steps):
        config["queue"].put(Note("the network is compiled first, which takes a minute or two"))
    if rank == 0 and first > 1:
        config["queue"].put(Resumed(learner.history))
        all_done = f"all {settings.epochs} epochs are trained: the best one is published"
        going_on = f"going on with epoch {first} of {settings.epochs}, {world} workers"
        config["queue"].put(Note(all_done if done else going_on))
    try:
        for figures in epochs(
            _join(learner, settings),
            iter_batches(
                BatchShare(settings, steps, rank, world),
                config["samples"]["train"],
                range((first - 1) * steps, settings.epochs * steps),
                choose_readers(settings.readers, context.get_local_world_size()),
                learner.device,
            ),
            partial(_validation, validation, settings, config["header"]),
            steps=steps,
            first=first,
            last=settings.epochs,
            patience=settings.patience,
        ):
            _report(figures, learner, config, rank)
    except SegError as error:  # all workers meet it in the same step; trying again would not help
        if rank == 0:
            config["queue"].put(Failed(error))
    except (torch.OutOfMemoryError, ValueError) as error:
        text = _advice_on(error, learner, -(-settings.batch // world))
        if text is None:
            raise
        config["queue"].put(Failed(JobError(text)))
        raise JobError(text) from error


def _advice_on(error: Exception, learner: Learner, share: int) -> str | None:
    """What the user can do about an error of torch in a worker that takes `share` crops a step; None if unknown."""
    if not isinstance(error, torch.OutOfMemoryError):
        alone = "more than 1 value per channel" in str(error)
        return "a piece of one crop is too few for this model's batch norm: say a larger batch" if alone else None
    if VALIDATING in getattr(error, "__notes__", ()):
        return f"validation, in windows of {VALIDATION_SIDE} px, takes more memory than {learner.device} has to spare"
    more = 2 * -(-share // learner.micro_batch)
    return f"{learner.micro_batch} crops at once are too many for {learner.device}: say accumulate = {more}"


def _any_worker(here: bool) -> bool:
    """Whether `here` is true in any worker. All of them must call this."""
    flag = torch.tensor(float(here), device=get_device())
    torch.distributed.all_reduce(flag)
    return bool(flag)


def _validation(samples: list[Sample], settings: TrainSettings, header: dict[str, Any]) -> Iterator[Batch]:
    multiple = settings.pad_multiple or header["stride"]
    least = 0 if settings.model == "unet" else settings.crop  # some networks take nothing smaller
    for sample in samples:
        for image, label in iter_windows(
            pad(sample, multiple, least), round_up(VALIDATION_SIDE, multiple), header["halo"]
        ):
            yield torch.from_numpy(image[None]), torch.from_numpy(label[None])


def _make_learner(
    settings: TrainSettings, header: dict[str, Any], steps: int, initial: "ray.ObjectRef[Any] | None"
) -> tuple[Learner, int]:
    """This worker's learner, fresh or from the last checkpoint, and the epoch to begin with.

    A fresh one begins with the weights `initial`, or with random ones.
    """
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if settings.sync_batchnorm and settings.batch % world:  # its workers must exchange equally often
        raise SegError(f"sync_batchnorm = true: batch = {settings.batch} must be a multiple of the {world} workers")
    first, last = (settings.batch * worker // world for worker in (rank, rank + 1))
    checkpoint, epoch = ray.train.get_checkpoint(), 0
    network = build_model(header["architecture"])
    if checkpoint is None and initial is not None:
        network.load_state_dict(ray.get(initial))
    workers_here = context.get_local_world_size()
    learner = make_learner(settings, header, network, get_device(), steps, last - first, workers_here)
    learner.rank, learner.share = rank, (last - first) * world / settings.batch
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            epoch = _load(folder, learner)
    return learner, epoch + 1


def _join(learner: Learner, settings: TrainSettings) -> Learner:
    """Wrap the network for several workers, and take pieces that fit all of them."""
    smallest = torch.tensor(learner.micro_batch, device=learner.device)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    learner.micro_batch = int(smallest)
    # Most encoders have layers that a decoder does not use, and which get no gradient.
    unused = {"find_unused_parameters": settings.model != "unet"}
    learner.model = prepare_model(learner.network, move_to_device=False, parallel_strategy_kwargs=unused)
    return learner


def make_learner(
    settings: TrainSettings,
    header: dict[str, Any],
    network: nn.Module,
    device: torch.device,
    steps: int,
    share: int,
    workers_here: int = 1,
) -> Learner:
    """A learner for a network on a device, for `share` crops a step; not yet wrapped for several processes."""
    bfloat16 = use_bfloat16(settings.precision, device)
    memory = _free_memory(device) // (workers_here if device.type == "cpu" else 1)
    each = (
        training_bytes_per_px(network, header["bands"], stride_of(network)) * settings.crop**2 // (2 if bfloat16 else 1)
    )
    micro_batch = choose_micro_batch(settings, share, int(MEMORY_SHARE * memory), each)
    if settings.equivariant:
        assert isinstance(network, UNet)
        make_equivariant(network)
    if settings.sync_batchnorm:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(device).to(memory_format=torch.channels_last)
    average = make_average(network, settings.ema) if settings.ema else None
    if is_compiled(settings, device, steps):
        network.compile()
    optimizer = make_optimizer(settings.optimizer, network, settings.lr, settings.weight_decay)
    return Learner(
        network=network,
        model=network,
        optimizer=optimizer,
        schedule=make_schedule(settings.schedule, optimizer, settings.lr, settings.epochs * steps),
        loss=make_loss(settings.loss, settings.label_smoothing, settings.edge_weight),
        mean=torch.tensor(header["mean"], device=device),
        std=torch.tensor(header["std"], device=device),
        positive=header["building"],
        threshold=None if settings.keeps_threshold else settings.threshold or None,
        device=device,
        bfloat16=bfloat16,
        max_norm=settings.max_norm or None,
        micro_batch=micro_batch,
        seed=settings.seed,
        equivariant=settings.equivariant,
        freeze_batchnorm=settings.freeze_batchnorm,
        kept_threshold=_uncalibrate(header["threshold"], header["temperature"]) if settings.keeps_threshold else None,
        average=average,
    )


def _uncalibrate(threshold: float, temperature: float) -> float:
    """Return the threshold of uncalibrated probabilities that gives the mask of one of calibrated ones."""
    return float(scale_probability(threshold, 1 / temperature))


def is_compiled(settings: TrainSettings, device: torch.device, steps: int) -> bool:
    """Whether to compile a network that is trained in epochs of so many steps: as set, or else where that pays."""
    pixels = settings.epochs * steps * settings.batch * settings.crop**2
    if settings.compile != "auto":
        return settings.compile == "yes"
    # The exchange of synchronised batch norm breaks the graph in pieces.
    return device.type == "cuda" and not settings.sync_batchnorm and pixels >= COMPILE_FROM_PX


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16: as set, or else where the device has instructions for it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return computes_bfloat16()


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return count_memory() // 2


def choose_micro_batch(settings: TrainSettings, share: int, memory: int, each: int) -> int:
    """Number of crops, of `each` bytes, that a worker passes through the network at once in `memory` bytes.

    Raises SegError where one crop does not fit, or `accumulate` asks for larger pieces than do.
    """
    fits = memory // each
    wanted = -(-share // (settings.accumulate or 1))
    if wanted <= fits:
        return wanted
    if not fits:
        raise SegError(
            f"crop = {settings.crop}: training on one crop takes {each / 1e9:.1f} GB, a worker has {memory / 1e9:.1f}: "
            f"use a smaller crop or width"
        )
    if settings.accumulate:
        raise SegError(
            f"batch = {settings.batch}, accumulate = {settings.accumulate}: {wanted} crops at once take "
            f"{wanted * each / 1e9:.1f} GB, a worker has {memory / 1e9:.1f}: the largest number that fits is {fits}; "
            f"accumulate = 0 finds it by itself"
        )
    return -(-share // -(-share // fits))  # pieces of even size


def _load(folder: str, learner: Learner) -> int:
    """Load a checkpoint into a learner, and return the checkpoint's epoch."""
    bundle = read_bundle(f"{folder}/bundle")
    weights = read_weights(f"{folder}/bundle", bundle)
    state = torch.load(f"{folder}/state.pt", map_location=learner.device, weights_only=True)
    learner.load_state(state, {name: torch.from_numpy(array.copy()) for name, array in weights.items()})
    return int(state["epoch"])


def _report(figures: dict[str, Any], learner: Learner, config: WorkerConfig, rank: int) -> None:
    """Report an epoch to Ray Train: every worker its metrics, the first one also a checkpoint."""
    epoch = figures["epoch"]
    ranked = {**figures, "val_iou": figures["val_iou"] or 0.0}  # None would not compare
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            _save(figures, learner, config["header"], folder)
            checkpoint = Checkpoint.from_directory(folder)
        # A stable name: a worker killed before its report is taken in writes the same folder again.
        ray.train.report(ranked, checkpoint=checkpoint, checkpoint_dir_name=f"epoch_{epoch:04d}")
    if rank == 0:  # where it is killed before, the figures are in the checkpoint's history
        config["queue"].put(EpochDone(figures))


def _save(figures: dict[str, Any], learner: Learner, header: dict[str, Any], folder: str) -> None:
    provenance = {**header["provenance"], "epoch": figures["epoch"], "created": now()}
    arrays = {k: v.detach().cpu().contiguous().numpy() for k, v in learner.kept.state_dict().items()}
    metrics = {k: v for k, v in figures.items() if k.startswith("val_") or k == "loss"}
    found = {name: figures[name] for name in ("threshold", "temperature")}
    found |= {"confidence": learner.confidence, "metrics": metrics}
    described = {**header, **found, "provenance": provenance}
    write_bundle(f"{folder}/bundle", Bundle(**described), arrays)
    torch.save({"epoch": figures["epoch"], **learner.state()}, f"{folder}/state.pt")
