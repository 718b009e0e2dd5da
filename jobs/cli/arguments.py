"""Parsers of command-line values. They raise ArgumentTypeError or SegError for a value that is not allowed."""

import math
import posixpath
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seg_core.errors import SegError
from seg_core.storage.files import absolute, exists, is_remote

if TYPE_CHECKING:
    from seg_core.run.places import Places


def model_folder(args: Namespace) -> str:
    """Return the absolute path of the bundle given with --model, by default that of the built-in model."""
    from seg_core.model.bundle import BUILT_IN_NAME, find_bundle

    return find_bundle(args.model or BUILT_IN_NAME)


def local_path(path: str) -> str:
    """Return the absolute form of a local path. Raises SegError for a path in S3."""
    if is_remote(path):
        raise SegError(f"{path}: must be on a local disk: only scenes, models, runs, masks and --work may be in S3")
    return absolute(path)


IMAGES = (".tif", ".tiff", ".vrt", ".png", ".jpg", ".jpeg", ".jp2")
TABLES = (".parquet", ".csv", ".json", ".geojson", ".gpkg", ".shp", ".txt")
FILE_SUFFIXES = (*IMAGES, *TABLES, ".html", ".zip", ".pt", ".pt2", ".onnx", ".safetensors")


def output_folder(option: str, path: str) -> str:
    """Return the absolute form of a folder to write. Raises SegError for a file name, unless such a folder exists."""
    suffix, folder = posixpath.splitext(path.rstrip("/"))[1], absolute(path)
    if suffix.lower() in FILE_SUFFIXES and not exists(folder):
        raise SegError(f"{option} {path}: must be a folder, but looks like a file: leave out {suffix}")
    return folder


def absolute_places(pairs: Sequence[tuple[str, str]]) -> "Places":
    """Return the old and new paths of scenes that have moved, made absolute, from the values of --relocate."""
    return tuple((absolute(old), absolute(new)) for old, new in pairs)


def parse_relocation(text: str) -> tuple[str, str]:
    """Split `OLD=NEW`. If there are several `=`, NEW begins after the first that is followed by `/` or `s3://`."""
    match = re.fullmatch(r"(.+?)=((?:/|s3://).*)|([^=]+)=([^=]+)", text)
    if match is None:
        raise ArgumentTypeError(f"{text}: expected OLD=NEW: the old and the new beginning of the scenes' paths")
    old, new = (group for group in match.groups() if group is not None)
    return old, new


def parse_device(text: str) -> str:
    """Check the name of a device: `auto`, `cpu`, `cuda`, or `cuda:N` for the GPU with number N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise ArgumentTypeError(f"{text}: expected auto, cpu or cuda")
    return text


def parse_device_kind(text: str) -> str:
    """Check the device of a job: `auto`, `cpu` or `cuda`. Ray chooses which GPU a process has."""
    if re.fullmatch(r"cuda:\d+", text):
        number = text.removeprefix("cuda:")
        raise ArgumentTypeError(f"{text}: Ray chooses the GPU: use cuda, and CUDA_VISIBLE_DEVICES={number} to limit it")
    return parse_device(text)


def parse_bands(text: str) -> tuple[int, ...]:
    """Parse band numbers, counted from 1, separated by commas."""
    try:
        return tuple(int(band) for band in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text}: expected band numbers separated by commas, such as 1,2,3") from None


def parse_alpha(text: str) -> int:
    """Parse the number of a band, counted from 1. Returns 0 for `none`."""
    if text == "none":
        return 0
    try:
        return parse_positive_int(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}, or none") from None


def parse_nonnegative_int(text: str) -> int:
    """Parse a whole number of at least 0."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text}: expected a whole number of at least 0")
    return int(text)


def parse_positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return int(text)


def parse_port(text: str) -> int:
    """Parse the number of a port, from 0 to 65535."""
    if not text.isdecimal() or int(text) > 65_535:
        raise ArgumentTypeError(f"{text}: expected a port from 0 to 65535")
    return int(text)


def parse_positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def parse_positive_ints(text: str) -> list[int]:
    """Parse whole numbers of at least 1, separated by commas."""
    return [parse_positive_int(each) for each in text.split(",")]


def parse_positive_int_or_auto(text: str) -> int | None:
    """Parse a whole number of at least 1. Returns None for `auto`."""
    if text == "auto":
        return None
    try:
        return parse_positive_int(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}, or auto") from None


def parse_actors(text: str) -> tuple[int, int]:
    """Parse `MIN` or `MIN:MAX`, both at least 1."""
    least, _, most = text.partition(":")
    try:
        bounds = int(least), int(most or least)
    except ValueError:
        raise ArgumentTypeError(f"{text}: expected MIN or MIN:MAX") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise ArgumentTypeError(f"{text}: MIN must be at least 1, and MAX at least MIN")
    return bounds
