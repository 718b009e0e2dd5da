"""What words of the command line mean. Raises argparse's own error, or SegError, for those that mean nothing."""

import math
import posixpath
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seg_core.errors import SegError
from seg_core.storage.files import absolute, exists, is_remote

if TYPE_CHECKING:
    from seg_core.run.plan import Places


def model_of(args: Namespace) -> str:
    """The folder of the model that was named, or else of the one that comes with the package."""
    from seg_core.model.bundle import BUILT_IN

    return absolute(args.model) if args.model else BUILT_IN


def local(path: str) -> str:
    """The absolute form of a path that must be on disk."""
    if is_remote(path):
        raise SegError(f"{path}: this must be on a disk: only scenes, models, runs and --work may be in S3")
    return absolute(path)


IMAGES = (".tif", ".tiff", ".vrt", ".png", ".jpg", ".jpeg", ".jp2")
TABLES = (".parquet", ".csv", ".json", ".geojson", ".gpkg", ".shp", ".txt")
FILES = (*IMAGES, *TABLES, ".html", ".zip", ".pt", ".pt2", ".onnx", ".safetensors")


def folder(option: str, path: str) -> str:
    """The absolute form of a folder to write. Raises SegError for the name of a file, unless it is a folder already."""
    suffix, found = posixpath.splitext(path.rstrip("/"))[1], absolute(path)
    if suffix.lower() in FILES and not exists(found):
        raise SegError(f"{option} {path}: names a folder, and this looks like a file: leave out {suffix}")
    return found


def places(pairs: Sequence[tuple[str, str]]) -> "Places":
    """Where scenes were and are, from the values of --relocate."""
    return tuple((absolute(old), absolute(new)) for old, new in pairs)


def relocation(text: str) -> tuple[str, str]:
    """`OLD=NEW`. Where there are several `=`, NEW begins at the first that is followed by `/` or `s3://`."""
    found = re.fullmatch(r"(.+?)=((?:/|s3://).*)|([^=]+)=([^=]+)", text)
    if found is None:
        raise ArgumentTypeError(f"{text}: say OLD=NEW: what the scenes' paths began with, and what they begin with now")
    old, new = (group for group in found.groups() if group is not None)
    return old, new


def device(text: str) -> str:
    """Where to compute: `auto`, `cpu`, `cuda`, or one of several GPUs by its number."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise ArgumentTypeError(f"{text}: say auto, cpu or cuda")
    return text


def bands(text: str) -> tuple[int, ...]:
    """Band numbers, from 1 on, with commas between."""
    try:
        return tuple(int(band) for band in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text}: say band numbers with commas between, such as 1,2,3") from None


def alpha(text: str) -> int:
    """The number of a band, from 1 on; 0 for `none`."""
    if text == "none":
        return 0
    try:
        return number(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}, or none") from None


def count(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text}: say a number from 0 on")
    return int(text)


def number(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"{text}: say a number from 1 on")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ArgumentTypeError(f"{text}: say a number above 0")
    return found


def numbers(text: str) -> list[int]:
    """Such numbers with commas between."""
    return [number(each) for each in text.split(",")]


def number_or_auto(text: str) -> int | None:
    """Such a number; None for `auto`."""
    if text == "auto":
        return None
    try:
        return number(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}, or auto") from None


def actors(text: str) -> tuple[int, int]:
    """`MIN` or `MIN:MAX`, from 1 on."""
    least, _, most = text.partition(":")
    try:
        bounds = int(least), int(most or least)
    except ValueError:
        raise ArgumentTypeError(f"{text}: say MIN or MIN:MAX") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise ArgumentTypeError(f"{text}: MIN must be at least 1, and MAX not less")
    return bounds
