"""A bundle: a trained model as a folder of `weights.safetensors` and `model.json`. Loading it runs no code.

`model.json` describes the model so that who loads it restates nothing. Its `hash` covers all its fields and, through
`weights_sha256`, the weights: two bundles of one hash give the same answers.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from seg_core.chips import PIXEL_DTYPE
from seg_core.errors import SegError
from seg_core.grey_levels import Normalization, Shares, normal_shares
from seg_core.grid import MIN_CHIP
from seg_core.model.quantized import FILES as INT8_FILES
from seg_core.model.quantized import QuantizedNetwork
from seg_core.storage.disk import staged_folder
from seg_core.storage.files import (
    absolute,
    exists,
    is_remote,
    publish,
    read_bytes,
    read_header,
    sha256,
)

FORMAT = "aerial-seg bundle"
VERSION = 1
WEIGHTS = "weights.safetensors"
HEADER = "model.json"
BUILT_IN = str(Path(__file__).with_name("builtin_model"))  # the bundle that comes with the package
BUILT_IN_NAME = "built-in"  # what users call it

Weights = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The fields of `model.json`."""

    architecture: dict[str, Any]  # what models.build_model takes
    classes: tuple[str, ...]
    building: int  # index of the positive class, whatever its name: the one that is found, measured and scored
    bands: int  # bands of the imagery, in the order of training
    dtype: str  # of the imagery trained on; that of another one is scaled to it, or refused
    mean: tuple[float, ...]  # a value a band, in grey levels
    std: tuple[float, ...]
    gsd_m: float | None  # metres a pixel of the training imagery
    stride: int  # heights and widths of chips are multiples of it
    context_px: int | None  # how far a pixel's value depends on others; None: over the whole chip
    halo: int  # px
    activation_bytes_per_px: int  # memory of a forward pass in float32, estimated
    threshold: float  # probability from which on a pixel is of the positive class
    # In model.json these are only where they are not their defaults, so that older bundles keep their hashes.
    min_chip: int = MIN_CHIP  # chips are at least so many px a side
    levels: Shares = ()  # histogram of each band of the training images: see seg_core.grey_levels
    spread: float | None = None  # distance from it within which 95 % of the training images lie
    confidence: tuple[float, ...] = ()  # share of the validation pixels by probability, in equal bins from 0 to 1
    temperature: float = 1.0  # what the logits are divided by, so that probabilities are true on validation
    int8_sha256: str = ""  # of its int8 network, which not every bundle has: see seg_core.model.quantized
    weights_sha256: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that it consists of."""
        return (HEADER, WEIGHTS, *(INT8_FILES if self.int8_sha256 else ()))

    @property
    def class_name(self) -> str:
        """Name of the positive class."""
        return self.classes[self.building]

    @property
    def normalization(self) -> Normalization:
        """Mean and standard deviation of the imagery trained on."""
        return Normalization(self.mean, self.std)

    @property
    def reference(self) -> Shares:
        """Histogram of each band of the imagery trained on; an older bundle does not hold it: as if it were normal."""
        return self.levels or normal_shares(self.normalization)

    def check_precision(self, precision: str) -> None:
        """Raise SegError if the model can't compute in this precision."""
        if precision == "int8" and not self.int8_sha256:
            raise SegError("--precision int8: the model has no int8 network: make a bundle that has one: seg quantize")

    @property
    def hash(self) -> str:
        """Hash of the content, hexadecimal."""
        return sha256(json.dumps(_plain(self), sort_keys=True).encode())[:32]


def find_bundle(name: str) -> str:
    """Return the absolute path of the bundle that a user names: a folder, an `s3://` prefix, or `built-in`."""
    return BUILT_IN if name == BUILT_IN_NAME else absolute(name)


def _plain(bundle: Bundle) -> dict[str, Any]:
    left_out = {each.name for each in OPTIONAL if getattr(bundle, each.name) == each.default}
    return {k: v for k, v in json.loads(json.dumps(asdict(bundle))).items() if k not in left_out}


# Fields that came after the first bundles.
LATER = {"min_chip", "levels", "spread", "confidence", "temperature", "int8_sha256"}
OPTIONAL = [each for each in fields(Bundle) if each.name in LATER]


def describe(bundle: Bundle) -> dict[str, Any]:
    """What `model.json` says of a bundle."""
    return {"format": FORMAT, "version": VERSION, "hash": bundle.hash, **_plain(bundle)}


def write_bundle(path: str, bundle: Bundle, weights: Weights, int8: QuantizedNetwork | None = None) -> Bundle:
    """Write a bundle at a path where nothing is yet; it appears whole or not at all. Returns it with its hashes.

    `int8` is its int8 network; None: it has none. Raises SegError if there is something at the path.
    """
    if exists(path):
        raise SegError(f"{path}: already exists: choose another name for the bundle")
    content = save_tensors({k: np.asarray(v, order="C") for k, v in weights.items()})
    bundle = replace(bundle, weights_sha256=sha256(content), int8_sha256=int8.sha256 if int8 else "")
    header = json.dumps(describe(bundle), indent=2).encode()
    files = {WEIGHTS: content, **(int8.files() if int8 else {}), HEADER: header}
    with nullcontext(path) if is_remote(path) else staged_folder(path) as folder:
        for name, data in files.items():  # the header last, for without it there is no bundle
            publish(f"{folder}/{name}", data)
    return bundle


def read_bundle(path: str) -> Bundle:
    """Read `model.json`. Raises SegError for a folder that is no bundle, a damaged or a newer one."""
    header = _read_header(path)
    stated = header.pop("hash", None)
    header.pop("version"), header.pop("format")
    known = {f.name for f in fields(Bundle)}
    if foreign := header.keys() - known:
        names = ", ".join(sorted(foreign))
        raise SegError(
            f"{path}: {HEADER} has unknown fields ({names}): of a newer version, or damaged: upgrade aerial-seg"
        )
    if missing := known - header.keys() - LATER:
        raise SegError(f"{path}: damaged: {HEADER} lacks fields ({', '.join(sorted(missing))})")
    lists = {name: header[name] for name in ("classes", "mean", "std")}
    if not all(isinstance(value, list) for value in lists.values()):
        raise SegError(f"{path}: damaged: {HEADER} has no lists of classes, mean and std")
    tuples = {name: _to_tuple(value) for name, value in header.items() if name in {*lists, "levels", "confidence"}}
    bundle = Bundle(**{**header, **tuples})
    if bundle.hash != stated:
        raise SegError(
            f"{path}: damaged: {HEADER} was changed after it was written (hash {bundle.hash}, stated {stated})"
        )
    if bundle.dtype != PIXEL_DTYPE:
        raise SegError(
            f"{path}: its model takes pixels of {bundle.dtype}, this program gives it {PIXEL_DTYPE}: train one on "
            f"imagery of {PIXEL_DTYPE}, or upgrade aerial-seg"
        )
    return bundle


def _to_tuple(value: Any) -> Any:
    return tuple(_to_tuple(each) for each in value) if isinstance(value, list) else value


def _read_header(path: str) -> dict[str, Any]:
    header = read_header(path, HEADER, "bundle", FORMAT)
    if header.get("version") != VERSION:
        raise SegError(f"{path}: of version {header.get('version')}, this program reads {VERSION}: upgrade aerial-seg")
    return header


def read_weights(path: str, bundle: Bundle) -> Weights:
    """Read the weights and check them against the bundle's hash. Raises SegError where they are damaged."""
    content = read_bytes(f"{path}/{WEIGHTS}")
    if content is None:
        raise SegError(f"{path}: damaged: it holds no {WEIGHTS}")
    if sha256(content) != bundle.weights_sha256:
        raise SegError(f"{path}: damaged: {WEIGHTS} is not what {HEADER} was written with")
    try:
        weights: Weights = load_tensors(content)
    except SafetensorError as error:
        raise SegError(f"{path}: damaged: {WEIGHTS}: {error}") from error
    return weights
