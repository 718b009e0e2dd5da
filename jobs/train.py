"""Training on Ray Train: decode once a node ─▶ workers that share each batch ─▶ a checkpoint an epoch ─▶ a bundle."""

import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from ray.util.queue import Queue

from jobs.progress import clock
from jobs.session import ray_session
from jobs.settings import TrainSettings, difference
from seg_core import __version__
from seg_core.bundle import Bundle, read_bundle, read_weights, write_bundle
from seg_core.dataset import (
    Classes,
    Crops,
    Digest,
    Pair,
    Sample,
    digest,
    find_pairs,
    fingerprint,
    normalisation,
    pad,
    read_classes,
    read_pair,
)
from seg_core.errors import SegError
from seg_core.losses import LOSSES
from seg_core.models import build_model, probe
from seg_core.run import now
from seg_core.storage import check_writable, make_folder, publish
from seg_core.training import Batch, Learner, epochs, make_optimizer, make_schedule

# A report waits for the controller's next look at its workers: every 2 s unless it is told otherwise.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")

GSD_SPREAD = 1.1  # images of one training set may differ in resolution by this factor


def train(
    settings: TrainSettings, data: str, out: str, work: str, address: str | None = None, verbose: bool = False
) -> Bundle:
    """Train on `data` and write the best epoch's bundle to `out`. Checkpoints and metrics go to the folder `work`.

    The same call goes on from the last checkpoint in `work`. Raises SegError for data or settings that can't work.
    """
    if os.path.exists(out):
        raise SegError(f"{out}: is there already: choose another name for the bundle")
    classes = read_classes(data)
    pairs = {split: find_pairs(data, split) for split in ("train", "val")}
    header = _architecture(settings, classes)
    _refuse_other(work, settings)
    check_writable(work)
    check_writable(os.path.dirname(out))
    with ray_session(address, settings.workers, verbose):
        _check_room(settings.workers)
        samples = {split: decode(pairs[split], classes) for split in pairs}
        header |= _figures(samples, settings)
        _claim(work, settings)
        with _console(work, settings) as queue:
            config = {
                "settings": settings,
                "header": header,
                "samples": {split: [ref for ref, _ in decoded] for split, decoded in samples.items()},
                "queue": queue,
            }
            best = _fit(config, settings.workers, work)
    return _publish(best, out)


def _architecture(settings: TrainSettings, classes: Classes) -> dict[str, Any]:
    """The fields of the bundle that are known before the data is read; names are checked on the way."""
    outputs = 1 if len(classes.names) == 2 and classes.building == 1 else len(classes.names)
    architecture: dict[str, Any] = {"name": settings.model, "in_channels": 3, "classes": outputs}
    if settings.model == "unet":
        architecture |= {"width": settings.width, "depth": settings.depth}
    footing = probe(build_model(architecture), 3)
    if settings.crop % footing.stride:
        raise SegError(f"crop = {settings.crop}: the model's stride is {footing.stride}: use a multiple of it")
    if settings.pad_multiple % footing.stride:
        raise SegError(
            f"pad_multiple = {settings.pad_multiple}: use a multiple of the model's stride, {footing.stride}"
        )
    return {"architecture": architecture, **asdict(footing), "classes": classes.names, "building": classes.building}


def _check_room(workers: int) -> None:
    room = ray.cluster_resources()
    for kind in ("CPU", "GPU"):
        number = int(room.get(kind, 0))
        if number < workers and (kind == "CPU" or number):  # where there is no GPU at all, CPUs train
            raise SegError(f"workers = {workers}: the cluster has {number} {kind}s, each worker takes one")


def _refuse_other(work: str, settings: TrainSettings) -> None:
    """Raise SegError where the folder holds a training run with other settings."""
    there = Path(work, "settings.json")
    odd = difference(json.loads(there.read_text()), settings) if there.exists() else ""
    if odd:
        raise SegError(f"{work}: holds a training run with other settings ({odd}): choose another --work or --out")


def _claim(work: str, settings: TrainSettings) -> None:
    """Take the folder for this training run."""
    make_folder(work)
    publish(Path(work, "settings.json"), json.dumps(asdict(settings), indent=2).encode())


def decode(pairs: Sequence[Pair], classes: Classes) -> list[tuple["ray.ObjectRef[Sample]", Digest]]:
    """Decode pairs in parallel into Ray's object store, where all workers of a node read the one copy."""
    refs: list[Any] = [_decode.remote(pair, classes) for pair in pairs]
    try:
        return list(zip([sample for sample, _ in refs], ray.get([d for _, d in refs]), strict=True))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SegError):
            raise error.cause from error
        raise


@ray.remote(num_returns=2)
def _decode(pair: Pair, classes: Classes) -> tuple[Sample, Digest]:
    sample, scene = read_pair(pair, classes)
    if sample.image.shape[2] != 3:
        raise SegError(f"{pair.image}: {sample.image.shape[2]} bands: training takes images of 3")
    return sample, digest(sample, scene)


def _figures(
    samples: dict[str, list[tuple["ray.ObjectRef[Sample]", Digest]]], settings: TrainSettings
) -> dict[str, Any]:
    """The fields of the bundle that come from the data."""
    digests = {split: [d for _, d in decoded] for split, decoded in samples.items()}
    for split, found in digests.items():
        if not any(d.num_valid for d in found):
            raise SegError(f"split {split}: no image holds a valid pixel")
    mean, std = normalisation(digests["train"])
    return {
        "bands": 3,
        "dtype": "uint8",
        "mean": mean,
        "std": std,
        "gsd_m": _common_gsd(digests["train"]),
        "threshold": settings.threshold,
        "provenance": {
            "settings": asdict(settings),
            "data_fingerprint": fingerprint(digests["train"] + digests["val"]),
            "images": {split: len(found) for split, found in digests.items()},
            "code_version": __version__,
            "torch_version": torch.__version__,
        },
    }


def _common_gsd(digests: Sequence[Digest]) -> float | None:
    known = sorted(d.gsd_m for d in digests if d.gsd_m is not None)
    if not known:
        return None
    if known[-1] > GSD_SPREAD * known[0]:
        raise SegError(f"the training images measure {known[0]:.3g} to {known[-1]:.3g} m a pixel: bring them to one")
    return round(known[len(known) // 2], 3)


def _fit(config: dict[str, Any], workers: int, work: str) -> Checkpoint:
    """Run the workers to the end, through failures, and return the best epoch's checkpoint."""
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=ray.cluster_resources().get("GPU", 0) > 0),
        run_config=RunConfig(
            name="epochs",
            storage_path=work,
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="val_iou"),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(f"training failed: {str(error).strip().splitlines()[-1]}") from error
    best: Checkpoint | None = result.get_best_checkpoint("val_iou", "max")
    assert best is not None
    return best


def train_worker(config: dict[str, Any]) -> None:
    """One training process: its share of each batch and of the validation images, a checkpoint after each epoch."""
    settings: TrainSettings = config["settings"]
    context = ray.train.get_context()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    cv2.setNumThreads(1)  # crops are augmented in threads of our own
    torch.manual_seed(settings.seed)
    rank, world = context.get_world_rank(), context.get_world_size()
    samples = {split: [Sample(*pair) for pair in ray.get(refs)] for split, refs in config["samples"].items()}
    steps = settings.steps or -(-len(samples["train"]) // settings.batch)
    learner, first = _make_learner(settings, config["header"], steps)
    crops = Crops(
        samples=samples["train"],
        size=settings.crop,
        batch=settings.batch,
        min_valid=settings.min_valid,
        augment=settings.augment,
        seed=settings.seed,
    )
    multiple = settings.pad_multiple or config["header"]["stride"]

    def validation() -> Iterator[Batch]:
        for sample in samples["val"][rank::world]:
            image, label = pad(sample, multiple)
            yield image[None], label[None]

    for figures in epochs(
        learner,
        lambda epoch, step: crops(epoch, step, rank, world),
        validation,
        steps=steps,
        first=first,
        last=settings.epochs,
    ):
        _report(figures, learner, config, rank)


def _make_learner(settings: TrainSettings, header: dict[str, Any], steps: int) -> tuple[Learner, int]:
    """A learner, fresh or from the last checkpoint, and the epoch to begin with."""
    device = get_device()
    weights = None if settings.encoder_weights == "none" else settings.encoder_weights
    network = build_model(header["architecture"], weights)
    checkpoint = ray.train.get_checkpoint()
    state = None
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            bundle = read_bundle(f"{folder}/bundle")
            arrays = read_weights(f"{folder}/bundle", bundle)
            network.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in arrays.items()})
            state = torch.load(f"{folder}/state.pt", map_location=device, weights_only=True)
    model = prepare_model(network.to(memory_format=torch.channels_last))
    optimizer = make_optimizer(settings.optimizer, model, settings.lr, settings.weight_decay)
    learner = Learner(
        model=model,
        optimizer=optimizer,
        schedule=make_schedule(settings.schedule, optimizer, settings.lr, settings.epochs * steps),
        loss=LOSSES[settings.loss],
        mean=header["mean"],
        std=header["std"],
        building=header["building"],
        threshold=settings.threshold,
        device=device,
        bfloat16=_bfloat16(settings.precision, device),
        max_norm=settings.max_norm or None,
    )
    if state is not None:
        learner.load_state(state)
        return learner, state["epoch"] + 1
    return learner, 1


def _bfloat16(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - there is no public name for it


def _report(figures: dict[str, Any], learner: Learner, config: dict[str, Any], rank: int) -> None:
    """Hand an epoch to Ray Train: the figures of every worker, the checkpoint of the first."""
    epoch = figures["epoch"]
    ranked = {**figures, "val_iou": figures["val_iou"] or 0.0}  # None would not compare
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            _save(figures, learner, config["header"], folder)
            checkpoint = Checkpoint.from_directory(folder)
        # A stable name: a worker killed before its report is taken in writes the same folder again.
        ray.train.report(ranked, checkpoint=checkpoint, checkpoint_dir_name=f"epoch_{epoch:04d}")
    if rank == 0:
        config["queue"].put(figures)


def _save(figures: dict[str, Any], learner: Learner, header: dict[str, Any], folder: str) -> None:
    provenance = {**header["provenance"], "epoch": figures["epoch"], "created": now()}
    arrays = {k: v.detach().cpu().contiguous().numpy() for k, v in learner.network.state_dict().items()}
    metrics = {k: v for k, v in figures.items() if k.startswith("val_") or k == "loss"}
    write_bundle(f"{folder}/bundle", Bundle(**{**header, "provenance": provenance, "metrics": metrics}), arrays)
    torch.save({"epoch": figures["epoch"], **learner.state()}, f"{folder}/state.pt")


def _publish(checkpoint: Checkpoint, out: str) -> Bundle:
    """Copy the bundle out of a checkpoint."""
    with checkpoint.as_directory() as folder:
        make_folder(os.path.dirname(out))
        partial = tempfile.mkdtemp(dir=os.path.dirname(out), prefix=".partial-")
        shutil.copytree(f"{folder}/bundle", partial, dirs_exist_ok=True)
        os.rename(partial, out)
    return read_bundle(out)


@contextmanager
def _console(work: str, settings: TrainSettings) -> Iterator[Queue]:
    """A queue whose figures become progress lines and lines of `metrics.jsonl`."""
    queue = Queue(actor_options={"num_cpus": 0})
    thread = threading.Thread(target=_print_epochs, args=(iter(queue.get, None), work, settings.epochs), daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        queue.put(None)
        thread.join(timeout=10)
        queue.shutdown()


def _print_epochs(arriving: Iterable[dict[str, Any]], work: str, last: int) -> None:
    with Path(work, "metrics.jsonl").open("a", encoding="utf-8") as log:
        for figures in arriving:
            print(json.dumps(figures), file=log, flush=True)
            iou = figures["val_iou"]
            print(
                f"epoch {figures['epoch']} of {last}: loss {figures['loss']:.4f}, "
                f"building IoU {'undefined' if iou is None else f'{iou:.4f}'}, {figures['train_mpx_s']:.2f} Mpx/s, "
                f"{clock(figures['seconds'] * (last - figures['epoch']))} left",
                file=sys.stderr,
                flush=True,
            )
