"""Training on Ray Train: decode once a node ─▶ workers that share each batch ─▶ a checkpoint an epoch ─▶ a bundle."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from seg_core.chips import PIXEL_DTYPE
from seg_core.environment import environment
from seg_core.errors import JobError, SegError
from seg_core.imagery.labels import describe_warps
from seg_core.imagery.scene import Scene
from seg_core.inference.evaluate import evaluate, write_samples
from seg_core.model.bundle import Bundle, Weights, read_bundle, read_weights, write_bundle
from seg_core.model.networks import build_model, check_sizes, measure_network, stride_of
from seg_core.model.segmenter import Segmenter, choose_device
from seg_core.run.fence import Lease
from seg_core.run.lease import acquire_lease
from seg_core.storage.files import check_writable, exists, filesystem, folder_of, is_remote, make_folder, read_bytes
from seg_core.training.dataset import (
    Classes,
    Digest,
    Pair,
    Sample,
    check_bands,
    digest,
    find_pairs,
    fingerprint,
    is_building,
    normalisation,
    read_classes,
    read_header,
    read_pair,
)
from seg_core.version import code_version

from .progress import waiting
from .ray_session import ray_session
from .terminal import note
from .training.log import recording
from .training.settings import TrainSettings, difference
from .training.worker import train_worker, use_bfloat16

# A report waits for the controller's next look at its workers: every 2 s unless the environment says otherwise.
LOOK_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"

GSD_SPREAD = 1.1  # images of one training set may differ in resolution by this factor
MAX_FAILURES = 3  # of workers or nodes, before a run is given up; nodes that announce their end (spot) don't count

Decoded = list[tuple["ray.ObjectRef[Sample]", Digest]]


def train(
    settings: TrainSettings, data: str, out: str, work: str, address: str | None = None, verbose: bool = False
) -> Bundle:
    """Train on `data` and write the best epoch's bundle to `out`.

    Checkpoints and metrics go to `work`, a folder or an `s3://` prefix; the same call goes on from the last checkpoint
    there. Raises SegError for data or settings that can't work, JobError for a training run that can't go on.
    """
    if exists(out):
        raise SegError(f"{out}: is there already: choose another name for the bundle")
    if f"{work}/".startswith(f"{out}/"):  # it would be there by the end
        raise SegError(f"--work {work}: lies in --out {out}, which is to be the bundle alone: choose another folder")
    classes = read_classes(data, settings.class_name)
    settings = replace(settings, class_name=classes.names[classes.positive])
    pairs = {split: find_pairs(data, split) for split in ("train", "val")}
    image = read_header(pairs["train"][0])
    with waiting("building the network"):
        header = describe_model(settings, classes, len(image.bands))
    check_writable(work)
    check_writable(folder_of(out))
    _refuse_other(work, settings)
    with ray_session(address, settings.workers, verbose):
        _check_room(settings)
        with waiting("decoding the images"):
            samples = {split: decode(pairs[split], classes) for split in pairs}
        header |= _figures(samples, settings, classes)
        config = {
            "settings": settings,
            "header": header,
            "samples": {split: [ref for ref, _ in decoded] for split, decoded in samples.items()},
            "steps": steps_an_epoch(settings, len(pairs["train"])),
        }
        make_folder(work)
        with acquire_lease(work) as lease:
            _claim(work, settings, header["provenance"]["data_fingerprint"], lease)
            _note_bands(image)
            note(_announcement(config, work))
            best = _fit(config, work)
            lease.check()
            bundle = _publish(best, out, settings)
    try:
        _draw_samples(out, settings, data, f"{work}/samples.png")
    except (Exception, KeyboardInterrupt) as error:  # there is a model, and that is what counts
        note(f"samples.png is not drawn: {error or type(error).__name__}")
    return bundle


def _draw_samples(bundle: str, settings: TrainSettings, data: str, path: str) -> None:
    note("drawing samples.png: the images of val are segmented once more")
    bfloat16 = use_bfloat16(settings.precision, choose_device("auto"))
    segmenter = Segmenter(bundle, precision="bfloat16" if bfloat16 else "float32")
    with waiting("segmenting the images of val") as report:
        found = evaluate(segmenter, data, "val", report)
    write_samples(found, segmenter, data, "val", path)


def describe_model(settings: TrainSettings, classes: Classes, num_bands: int) -> dict[str, Any]:
    """The fields of the bundle that are known before the pixels are read.

    Raises SegError for a network that can't be built, or does not take the sizes of the settings.
    """
    outputs = 1 if len(classes.names) == 2 and classes.positive == 1 else len(classes.names)
    architecture: dict[str, Any] = {"name": settings.model, "in_channels": num_bands, "classes": outputs}
    if settings.model == "unet":
        architecture |= {"width": settings.width, "depth": settings.depth, "patch": settings.patch}
    # With pretrained weights where they are wanted: what can't be had is noticed here, not by the workers.
    pretrained = None if settings.encoder_weights == "none" else settings.encoder_weights
    model = build_model(architecture, pretrained)
    stride = stride_of(model)
    for name in ("crop", "pad_multiple"):
        if getattr(settings, name) % stride:
            raise SegError(f"{name} = {getattr(settings, name)}: the model's stride is {stride}: use a multiple of it")
    check_sizes(settings.model, model, num_bands, settings.crop)
    return {
        "architecture": architecture,
        **asdict(measure_network(model, num_bands)),
        "bands": num_bands,
        "classes": classes.names,
        "building": classes.positive,
    }


def steps_an_epoch(settings: TrainSettings, num_images: int) -> int:
    """How many steps an epoch has: as many as were asked for, or else take one crop of each image."""
    return settings.steps or -(-num_images // settings.batch)


def _check_room(settings: TrainSettings) -> None:
    room, needed = ray.cluster_resources(), settings.min_workers or settings.workers
    for kind in ("CPU", "GPU"):
        number = int(room.get(kind, 0))
        if number < needed and (kind == "CPU" or number):  # where there is no GPU at all, CPUs train
            raise SegError(f"workers = {needed}: the cluster has {number} {kind}s, each worker takes one")


def _refuse_other(work: str, settings: TrainSettings) -> None:
    """Raise SegError where the folder holds a training run with other settings."""
    there = _read_settings(work)
    if there:  # before the class could be chosen, it was always that of buildings
        there.setdefault("class_name", settings.class_name if is_building(settings.class_name) else "building")
    odd = difference(there, settings) if there else ""
    if odd:
        raise SegError(f"{work}: holds a training run with other settings ({odd}): choose another --work or --out")


def _claim(work: str, settings: TrainSettings, data: str, lease: Lease) -> None:
    """Take the folder for this training run. Raises SegError where it holds one on data of another fingerprint."""
    if _read_settings(work).get("data_fingerprint", data) != data:
        raise SegError(f"{work}: holds a training run on other data: choose another --work or --out")
    described = {**asdict(settings), "data_fingerprint": data}
    lease.publish(f"{work}/settings.json", json.dumps(described, indent=2).encode())


def _read_settings(work: str) -> dict[str, Any]:
    """The settings that a folder's training run has; none where it holds no run."""
    path = f"{work}/settings.json"
    try:
        found = json.loads(read_bytes(path) or b"{}")
    except ValueError as error:
        raise SegError(f"{path}: is damaged ({error}): remove it, or choose another --work or --out") from error
    if not isinstance(found, dict):
        raise SegError(f"{path}: is not a training run's: choose another --work or --out")
    return found


def decode(pairs: Sequence[Pair], classes: Classes) -> Decoded:
    """Decode pairs in parallel into Ray's object store, where all workers of a node read the one copy.

    Says which labels were warped to the grids of their images.
    """
    refs: list[Any] = [_decode.remote(pair, classes) for pair in pairs]
    try:
        digests: list[Digest] = ray.get([d for _, d in refs])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SegError):
            raise error.cause from error
        raise
    for line in describe_warps({pair.label: d.label_off_px for pair, d in zip(pairs, digests, strict=True)}):
        note(line)
    return list(zip([sample for sample, _ in refs], digests, strict=True))


@ray.remote(num_returns=2)
def _decode(pair: Pair, classes: Classes) -> tuple[Sample, Digest]:
    sample, scene, off_px = read_pair(pair, classes)
    return sample, digest(sample, scene, classes.positive, off_px)


def _figures(samples: dict[str, Decoded], settings: TrainSettings, classes: Classes) -> dict[str, Any]:
    """The fields of the bundle that come from the data. Raises SegError where nothing can be learnt from it."""
    digests = {split: [d for _, d in decoded] for split, decoded in samples.items()}
    check_bands(digests["train"] + digests["val"])
    for split, found in digests.items():
        if not any(d.num_valid for d in found):
            raise SegError(f"split {split}: no image holds a valid pixel")
        if not any(d.num_positive for d in found):
            name = classes.names[classes.positive]
            raise SegError(f"split {split}: no label of its {len(found)} images holds a pixel of the class {name}")
    known = {d.content: os.path.basename(d.uri) for d in digests["train"]}
    for d in digests["val"]:
        if d.content in known:
            name = os.path.basename(d.uri)
            note(f"{known[d.content]} of train is {name} of val: what is learnt by heart counts as validated")
    mean, std = normalisation(digests["train"])
    return {
        "dtype": PIXEL_DTYPE,
        "mean": mean,
        "std": std,
        "gsd_m": _common_gsd(digests["train"] + digests["val"]),
        "provenance": {
            "settings": asdict(settings),
            "data_fingerprint": fingerprint(classes, digests),
            "images": {split: len(found) for split, found in digests.items()},
            "code_version": code_version(),
            "torch_version": torch.__version__,
        },
    }


def _common_gsd(digests: Sequence[Digest]) -> float | None:
    known = sorted(d.gsd_m for d in digests if d.gsd_m is not None)
    if not known:
        return None
    if known[-1] > GSD_SPREAD * known[0]:
        raise SegError(f"the images measure {known[0]:.3g} to {known[-1]:.3g} m a pixel: bring them to one")
    return round(known[len(known) // 2], 3)


def _note_bands(image: Scene) -> None:
    """Say which bands are trained on, where they are not simply three."""
    bands = ", ".join(map(str, image.bands))
    if image.masked:
        note(f"{image.uri}: trained on bands {bands}; its alpha band or mask says which pixels hold data")
    elif len(image.bands) != 3:
        note(f"{image.uri}: trained on bands {bands}")


def _announcement(config: dict[str, Any], work: str) -> str:
    settings, number = config["settings"], {split: len(refs) for split, refs in config["samples"].items()}
    model = f"unet of width {settings.width}" if settings.model == "unet" else settings.model
    shown = work if is_remote(work) else min(work, os.path.relpath(work), key=len)
    return (
        f"{model}: {settings.epochs} epochs of {config['steps']} steps of {settings.batch} crops of {settings.crop} px "
        f"from {number['train']} images, validated on {number['val']}; checkpoints in {shown}"
    )


def _fit(config: dict[str, Any], work: str) -> Checkpoint:
    """Run the workers to the end, through failures, and return the best epoch's checkpoint."""
    settings: TrainSettings = config["settings"]
    system, path = filesystem(work)
    workers: Any = (settings.min_workers, settings.workers) if settings.min_workers else settings.workers
    with recording(work, settings) as (queue, record):
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={**config, "queue": queue},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=ray.cluster_resources().get("GPU", 0) > 0),
            run_config=RunConfig(
                name="epochs",
                storage_path=path,
                storage_filesystem=system if is_remote(work) else None,
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=settings.keep, checkpoint_score_attribute="val_iou", checkpoint_score_order="max"
                ),
            ),
        )
        try:
            with _interruptible(), environment({LOOK_INTERVAL: os.environ.get(LOOK_INTERVAL, "0.2")}):
                result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            if record.error is not None:
                raise record.error from error
            raise JobError(f"training failed: {str(error).strip().splitlines()[-1]}") from error
    if record.error is not None:
        raise record.error
    best: Checkpoint | None = result.get_best_checkpoint("val_iou", "max")
    assert best is not None
    return best


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have Ctrl-C end the block as ever: Ray Train puts a handler in its place, for good, that ends by exiting."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:
        before = signal.SIG_IGN  # while all of it is cleaned up
        raise KeyboardInterrupt from stopped
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _publish(checkpoint: Checkpoint, out: str, settings: TrainSettings) -> Bundle:
    """Write the bundle of a checkpoint, its weights stored as the settings say."""
    with checkpoint.as_directory() as folder:
        bundle = read_bundle(f"{folder}/bundle")
        weights = read_weights(f"{folder}/bundle", bundle)
    if settings.weights == "float16":
        weights = halve(weights)
    return write_bundle(out, bundle, weights)


def halve(weights: Weights) -> Weights:
    """Kernels as float16; vectors, such as batch norm's statistics, stay: they are few and may be large."""
    return {k: v.astype(np.float16) if v.ndim > 1 and v.dtype == np.float32 else v for k, v in weights.items()}
