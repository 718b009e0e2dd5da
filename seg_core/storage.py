"""Where files are: absolute paths, listings, and publishing a file so that it is there whole or not at all."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from seg_core.errors import SegError

PARTIAL = ".partial-"  # files of this prefix are not there yet


def gdal_settings() -> dict[str, str | int]:
    """Settings for `rasterio.Env`, the same in every process that reads imagery.

    `GDAL_CACHEMAX` (MB) bounds GDAL's block cache, which by default takes 5 % of the machine in each process.
    """
    return {"GDAL_CACHEMAX": 64}


def absolute(path: str, base: str | None = None) -> str:
    """An absolute form of a local path, taken from the folder `base` (default: the current one).

    Raises SegError for a URI of a scheme that can't be read.
    """
    if "://" in path:
        raise SegError(f"{path}: only local paths can be read and written: copy it to a disk all workers reach")
    return os.path.normpath(os.path.join(base or os.getcwd(), os.path.expanduser(path)))


def publish(path: str | Path, content: bytes) -> None:
    """Write a file atomically: under a temporary name, flushed to disk, then renamed.

    A process killed at any moment leaves the old file, the new file, or none; never a part of one.
    """
    path = Path(path)
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def published(folder: str | Path, suffix: str) -> Iterator[Path]:
    """The published files of a folder with that suffix, by name."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.endswith(suffix) and not e.name.startswith(PARTIAL)]
    yield from (folder / name for name in sorted(names))


def make_folder(folder: str | Path) -> None:
    """Create a folder that can be written to. Raises SegError where that can't be done."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{PARTIAL}{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SegError(f"{folder}: can't be written to ({error.strerror}): choose another folder") from error


def check_writable(folder: str | Path) -> None:
    """Raise SegError where a folder could not be made; leaves no trace of the attempt."""
    folder = Path(folder)
    absent = [each for each in (folder, *folder.parents) if not each.exists()]
    make_folder(folder)
    for each in absent:
        each.rmdir()


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()
