"""Training on Ray Train: decode once a node ─▶ workers that share each batch ─▶ a checkpoint an epoch ─▶ a bundle."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from seg_core.environment import environment
from seg_core.errors import JobError, SegError
from seg_core.imagery.scene import Scene
from seg_core.inference.evaluate import evaluate, write_samples
from seg_core.model.bundle import Bundle, Weights, read_bundle, read_weights, write_bundle
from seg_core.model.loading import choose_device
from seg_core.model.segmenter import Segmenter
from seg_core.run.fence import Lease
from seg_core.run.lease import acquire_lease
from seg_core.storage.files import check_writable, exists, filesystem, folder_of, is_remote, make_folder, read_bytes
from seg_core.training.class_names import describe_class, is_building
from seg_core.training.dataset import find_pairs, read_header

from .capacity import Shortage, wait_for_nodes
from .progress import waiting
from .ray_session import find_address, ray_session
from .spread import get_result
from .terminal import add_log_field, note
from .training.fine_tuning import choose_classes, read_origin
from .training.log import recording
from .training.messages import WorkerConfig
from .training.preparation import decode, describe_data, describe_model, identify_files
from .training.settings import TrainSettings, difference
from .training.worker import train_worker, use_bfloat16

# A report waits for the controller's next look at its workers: every 2 s unless the environment says otherwise.
LOOK_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
SEGMENTING = "segmenting the images of val"

MAX_FAILURES = 3  # of workers or nodes, before a run is given up; nodes that announce their end (spot) don't count


def train(
    settings: TrainSettings,
    data: str,
    out: str,
    work: str,
    address: str | None = None,
    verbose: bool = False,
    draw: bool = True,
) -> Bundle:
    """Train on `data` and write the best epoch's bundle to `out`.

    Checkpoints and metrics go to `work`, a folder or an `s3://` prefix; the same call goes on from the last checkpoint
    there. Unless `draw` is false, samples.png is drawn there last, and Ctrl-C then only leaves it out. Raises SegError
    for data or settings that can't work, JobError for a training run that can't go on.
    """
    add_log_field("run", out)
    _check_paths(out, work)
    origin = read_origin(settings.begin_from)
    classes = choose_classes(data, settings.class_name, origin)
    settings = replace(settings, class_name=classes.names[classes.positive])
    pairs = {split: find_pairs(data, split) for split in ("train", "val")}
    image = read_header(pairs["train"][0])
    with waiting("building the network"):
        header, initial = describe_model(settings, classes, len(image.bands), origin)
    settings = identify_files(settings, origin)
    check_writable(work)
    check_writable(folder_of(out))
    _refuse_other(work, settings)
    with ray_session(address, settings.workers, verbose):
        _wait_for_room(settings, address)
        with waiting("decoding the images"):
            samples = {split: decode(pairs[split], classes) for split in pairs}
        header |= describe_data(samples, settings, classes, origin)
        config: WorkerConfig = {
            "settings": settings,
            "header": header,
            "initial": None if initial is None else ray.put(initial),
            "samples": {split: [ref for ref, _ in decoded] for split, decoded in samples.items()},
            "steps": steps_an_epoch(settings, len(pairs["train"])),
        }
        make_folder(work)
        with acquire_lease(work) as lease:
            _claim(work, settings, header["provenance"]["data_fingerprint"], lease)
            if described := describe_class(classes.names, classes.positive):
                note(f"the model {described}")
            _note_bands(image)
            note(_announcement(config, work))
            best = _fit(config, work)
            lease.check()
            bundle = _publish(best, out, settings)
    if not draw:
        return bundle
    try:
        note("drawing samples.png: the images of val are segmented once more")
        if find_address(address) is None:
            with waiting(SEGMENTING) as report:
                _draw_samples(out, settings, data, f"{work}/samples.png", report)
        else:
            with ray_session(address, verbose=verbose), waiting(SEGMENTING):
                _draw_samples_in_task(out, settings, data, f"{work}/samples.png")
    except (Exception, KeyboardInterrupt) as error:  # there is a model, and that is what counts
        note(f"samples.png is not drawn: {str(error) or type(error).__name__}")
    return bundle


def _check_paths(out: str, work: str) -> None:
    """Raise SegError where there is something at `out`, or `work` would lie in it."""
    if exists(out):
        raise SegError(f"{out}: already exists: choose another name for the bundle")
    if f"{work}/".startswith(f"{out}/"):  # it would be there by the end
        raise SegError(f"--work {work}: lies in --out {out}, which is to be the bundle alone: choose another folder")


def _draw_samples(
    bundle: str, settings: TrainSettings, data: str, path: str, report: Callable[[str], None] = lambda _: None
) -> None:
    bfloat16 = use_bfloat16(settings.precision, choose_device("auto"))
    segmenter = Segmenter(bundle, precision="bfloat16" if bfloat16 else "float32")
    write_samples(evaluate(segmenter, data, "val", report), segmenter, path)


def _draw_samples_in_task(bundle: str, settings: TrainSettings, data: str, path: str) -> None:
    """Draw samples on a node that trains: the head of a cluster may have few CPUs, and no GPU."""
    task: Any = ray.remote(num_cpus=1, num_gpus=int(_use_gpus(settings)))(_draw_samples)
    get_result(task.remote(bundle, settings, data, path))


def steps_an_epoch(settings: TrainSettings, num_images: int) -> int:
    """How many steps an epoch has: as many as were asked for, or else take one crop of each image."""
    return settings.steps or -(-num_images // settings.batch)


def _wait_for_room(settings: TrainSettings, address: str | None) -> None:
    """Wait for room for the workers in a cluster that was joined at `address`. Raises SegError if there is none."""
    bundle = {"CPU": 1.0, "GPU": 1.0} if _use_gpus(settings) else {"CPU": 1.0}
    bundles = [bundle] * settings.least_workers
    wait_for_nodes(partial(_find_shortage, settings), bundles, address, settings.node_timeout)
    if settings.sync_batchnorm and not _use_gpus(settings):
        raise SegError("sync_batchnorm = true: torch offers it on GPUs only, and there is none")


def _use_gpus(settings: TrainSettings) -> bool:
    return settings.use_gpus(ray.cluster_resources().get("GPU", 0))


def _find_shortage(settings: TrainSettings) -> Shortage | None:
    """Return what the cluster lacks for workers that take a CPU each, and a GPU if they use any."""
    needed, use_gpus = settings.least_workers, _use_gpus(settings)
    for kind in ("CPU", "GPU") if use_gpus else ("CPU",):
        number = int(ray.cluster_resources().get(kind, 0))
        if number < needed:
            lack = f"workers = {needed}: the cluster has {number} {kind}s, each worker takes one"
            return Shortage(lack, f"use fewer{', or --device cpu' if use_gpus else ''}")
    return None


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


def _note_bands(image: Scene) -> None:
    """Say which bands are trained on, where they are not simply three."""
    bands = ", ".join(map(str, image.bands))
    if image.masked:
        note(f"{image.uri}: trained on bands {bands}; its alpha band or mask says which pixels hold data")
    elif len(image.bands) != 3:
        note(f"{image.uri}: trained on bands {bands}")


def _announcement(config: WorkerConfig, work: str) -> str:
    settings, number = config["settings"], {split: len(refs) for split, refs in config["samples"].items()}
    model = f"unet of width {settings.width}" if settings.model == "unet" else settings.model
    shown = work if is_remote(work) else min(work, os.path.relpath(work), key=len)
    return (
        f"{model}: {settings.epochs} epochs of {config['steps']} steps of {settings.batch} crops of {settings.crop} px "
        f"from {number['train']} images, validated on {number['val']}; checkpoints in {shown}"
    )


def _fit(config: WorkerConfig, work: str) -> Checkpoint:
    """Run the workers to the end, through failures, and return the best epoch's checkpoint."""
    settings = config["settings"]
    system, path = filesystem(work)
    workers: Any = (settings.min_workers, settings.workers) if settings.min_workers else settings.workers
    worker: Any = train_worker  # Ray's annotation asks for a function of a dict, which a TypedDict is when it runs
    with recording(work, settings) as (queue, log):
        trainer = TorchTrainer(
            worker,
            train_loop_config={**config, "queue": queue},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=_use_gpus(settings),
                placement_strategy=settings.placement.upper(),
            ),
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
            if log.error is not None:
                raise log.error from error
            raise JobError(f"training failed: {str(error).strip().splitlines()[-1]}") from error
    if log.error is not None:
        raise log.error
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
