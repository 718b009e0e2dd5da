"""Settings of a training run: a dataclass with a sentence for each, presets, TOML files and `key=value`."""

import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from seg_core.errors import SegError


def _setting(default: Any, text: str, choices: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": tuple(choices)})


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that decides what is trained, and how."""

    model: str = _setting("unet", "unet, or smp:ARCHITECTURE/ENCODER such as smp:Unet/resnet34")
    width: int = _setting(64, "channels of the U-Net's first block; 16 suits a laptop")
    depth: int = _setting(4, "how often the U-Net halves its input")
    encoder_weights: str = _setting("none", "pretrained weights of an smp encoder, such as imagenet")
    loss: str = _setting("bce+dice", "what is minimised", ("dice", "bce+dice", "cross-entropy"))
    optimizer: str = _setting("adamw", "how", ("adam", "adamw"))
    lr: float = _setting(1e-3, "learning rate, the highest of the schedule")
    weight_decay: float = _setting(0.01, "weight decay")
    schedule: str = _setting("one-cycle", "how the learning rate changes over the steps", ("constant", "one-cycle"))
    max_norm: float = _setting(1.0, "gradients are clipped to this norm; 0: not")
    epochs: int = _setting(20, "how often to validate and save a checkpoint")
    steps: int = _setting(100, "steps an epoch; 0: as many as take one crop of each image")
    batch: int = _setting(32, "crops a step, over all workers")
    crop: int = _setting(256, "side of a crop in px")
    min_valid: float = _setting(0.5, "share of a crop that must hold data, where an image offers that")
    augment: bool = _setting(True, "flips, quarter turns, brightness and contrast")
    pad_multiple: int = _setting(0, "validation images are padded to a multiple of it in px; 0: of the model's stride")
    threshold: float = _setting(0.5, "probability from which on a pixel is building")
    precision: str = _setting("auto", "auto: bfloat16 where the device has it", ("auto", "float32", "bfloat16"))
    workers: int = _setting(1, "training processes, each on a GPU of its own or on CPUs")
    seed: int = _setting(0, "of weights, crops and augmentation")


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The recipe as the article prints it: one crop of each image an epoch, images padded from 1500 to 1536 px.
    "article": {
        "loss": "dice",
        "optimizer": "adam",
        "lr": 5e-5,
        "weight_decay": 0.0,
        "schedule": "constant",
        "max_norm": 0.0,
        "epochs": 15,
        "steps": 0,
        "pad_multiple": 256,
    },
}


def make_settings(preset: str, config: str | None, changes: Sequence[Mapping[str, Any]]) -> TrainSettings:
    """A preset, changed by a TOML file, then by each of `changes`. Raises SegError for what is not a setting."""
    if preset not in PRESETS:
        raise SegError(f"--preset {preset}: not known: say {' or '.join(PRESETS)}")
    settings = _change(TrainSettings(), PRESETS[preset], preset)
    if config is not None:
        settings = _change(settings, _read_toml(config), config)
    for change in changes:
        settings = _change(settings, change, "--set")
    _check(settings)
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
    known = {f.name: f for f in fields(TrainSettings)}
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
        settings = replace(settings, **{key: kind(value)})
    return settings


def _check(settings: TrainSettings) -> None:
    for name in ("width", "epochs", "batch", "crop", "workers", "lr"):
        if not 0 < getattr(settings, name) < math.inf:
            raise SegError(f"{name} = {getattr(settings, name)}: must be more than 0")
    for name in ("depth", "steps", "max_norm", "weight_decay", "pad_multiple", "seed"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise SegError(f"{name} = {getattr(settings, name)}: must not be negative")
    if not 0 < settings.threshold < 1 or not 0 <= settings.min_valid <= 1:
        raise SegError(f"threshold = {settings.threshold}, min_valid = {settings.min_valid}: must be shares of 1")
    if settings.batch % settings.workers:
        raise SegError(f"batch = {settings.batch}: can't be shared evenly by {settings.workers} workers")


def difference(before: Mapping[str, Any], settings: TrainSettings) -> str:
    """The settings that differ, in words; empty where none does."""
    return ", ".join(
        f"{key} {before.get(key)} there, {value} now"
        for key, value in asdict(settings).items()
        if before.get(key) != value
    )
