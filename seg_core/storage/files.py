"""Where files are, on disk or in S3: paths, listings, and publishing a file so that it is there whole or not at all.

A path is a local one or `s3://BUCKET/KEY`, which `s3` serves.
"""

import hashlib
import os
import re
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, NamedTuple

from seg_core.errors import ReadError, SegError, StoreUnavailableError
from seg_core.storage import s3

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

# GDAL's settings that change what a file's pixels are, where they lie, or which hold data, at their defaults: what the
# caller's environment says of them does not count.
PINNED: dict[str, str | float] = {
    "CONVERT_YCBCR_TO_RGB": "YES",
    "GDAL_DISABLE_READDIR_ON_OPEN": "FALSE",  # files beside an image are looked for
    "GDAL_JPEG_TO_RGB": "YES",
    "GDAL_PAM_ENABLED": "YES",  # .aux.xml
    "GDAL_TIFF_INTERNAL_MASK_TO_8BIT": "YES",
    "GTIFF_HONOUR_NEGATIVE_SCALEY": "NO",
    "GTIFF_IGNORE_READ_ERRORS": "NO",
    "GTIFF_POINT_GEO_IGNORE": "NO",
    "GTIFF_SRS_SOURCE": "",
    "JPEG_READ_MASK": "YES",
    "OSR_STRIP_TOWGS84": "YES",
}
PARTIAL = ".partial-"  # files of this prefix are not there yet


class Stat(NamedTuple):
    """What tells one state of a file from another."""

    size: int  # bytes
    version: str  # S3: the etag; disk: size and time of the last change in ns


def is_remote(path: str | Path) -> bool:
    """Whether a path is the URI of an object store."""
    return str(path).startswith(s3.S3)


def absolute(path: str, base: str | None = None) -> str:
    """An absolute form of a path, taken from the folder or prefix `base` (default: the current folder).

    Raises SegError for what can't be read or written.
    """
    if is_remote(path) and path.strip("/") != "s3:":
        return path.rstrip("/")
    if "://" in path:
        raise SegError(f"{path}: only local paths and s3:// URIs can be read and written")
    if base is not None and is_remote(base) and not os.path.isabs(path):
        return f"{base}/{path}"
    return os.path.normpath(os.path.join(base or os.getcwd(), os.path.expanduser(path)))


def folder_of(path: str) -> str:
    """The folder or prefix that a path is in."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def gdal_path(path: str) -> str:
    """A path as GDAL names it."""
    return f"/vsis3/{path.removeprefix(s3.S3)}" if is_remote(path) else path


def gdal_settings(path: str = "") -> dict[str, str | float]:
    """Settings for `rasterio.Env` to read imagery at a path, the same in every process."""
    # MB; by default GDAL's block cache takes 5 % of the machine in each process.
    settings: dict[str, str | float] = {"GDAL_CACHEMAX": 64, **PINNED}
    return settings | (s3.gdal_settings(path) if is_remote(path) else {})


def filesystem(path: str) -> "tuple[FileSystem, str]":
    """A pyarrow file system and the path in it."""
    from pyarrow.fs import LocalFileSystem

    return s3.arrow(path) if is_remote(path) else (LocalFileSystem(), path)


def stat(path: str) -> Stat | None:
    """Size and version of a file; None where there is no such file. Raises SegError where it may not be looked at."""
    if is_remote(path):
        head = s3.head(path)
        return Stat(*head) if head else None
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SegError(f"{path}: {error.strerror}") from error
    if not S_ISREG(found.st_mode):  # a folder; or a pipe, which one would wait at for ever
        return None
    return Stat(found.st_size, f"{found.st_size}-{found.st_mtime_ns}")


def stat_beside(path: str) -> tuple[Stat | None, list[str] | None]:
    """As `stat`, and the paths of files beside a remote one that have its stem; by one request.

    They are None where the store does not list them. On disk none are looked for.
    """
    if not is_remote(path):
        return stat(path), []
    listed = s3.list_beside(path)
    if listed is None:
        return stat(path), None
    found = listed.pop(path, None)
    return Stat(*found) if found else None, sorted(listed)


def exists(path: str) -> bool:
    """Whether there is a file or a folder, or anything below a prefix."""
    if not is_remote(path):
        return os.path.exists(path)
    return next(walk(path), None) is not None or stat(path) is not None


def read_bytes(path: str) -> bytes | None:
    """The content of a file, or None where there is none. Raises SegError where it can't be read."""
    if is_remote(path):
        return s3.get(path)
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SegError(f"{path}: can't be read: {error.strerror}") from error


def read_ranges(path: str, ranges: Sequence[tuple[int, int]], near: int) -> list[bytes]:
    """Pieces of a file, each by its offset and size; those with less than `near` bytes between are fetched at once.

    Raises ReadError where they can't be read, StoreUnavailableError where an object store does not give them.
    """
    system, inside = filesystem(path)
    found: dict[tuple[int, int], bytes] = {}
    try:
        with system.open_input_file(inside) as file:
            if any(offset + size > file.size() for offset, size in ranges):
                raise ReadError(f"{path}: ends before its data does")
            for group in _neighbours(ranges, near):
                first, last = group[0][0], max(offset + size for offset, size in group)
                content = memoryview(file.read_at(last - first, first))
                found |= {(offset, size): bytes(content[offset - first :][:size]) for offset, size in group}
    except (FileNotFoundError, PermissionError) as error:
        raise ReadError(f"{path}: can't be read: {error}") from error
    except OSError as error:
        kind = StoreUnavailableError if is_remote(path) else ReadError
        raise kind(f"{path}: can't be read: {error}") from error
    return [found[at] for at in ranges]


def _neighbours(ranges: Sequence[tuple[int, int]], near: int) -> Iterator[list[tuple[int, int]]]:
    """Ranges by their offset, in groups whose members are near each other."""
    group: list[tuple[int, int]] = []
    for offset, size in sorted(ranges):
        if group and offset - max(start + length for start, length in group) > near:
            yield group
            group = []
        group.append((offset, size))
    if group:
        yield group


def publish(path: str | Path, content: bytes, staging: str | None = None) -> None:
    """Write a file atomically: by one put to an object store, on disk under a temporary name, flushed, then renamed.

    A process killed at any moment leaves the old file, the new file, or none; never a part of one. The temporary file
    is in the folder `staging` of the same file system (default: beside the file).
    """
    if is_remote(path):
        s3.put(str(path), content)
        return
    path = Path(path)
    partial = Path(staging or path.parent, f"{PARTIAL}{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def create(path: str, content: bytes) -> bool:
    """Write a small file where there is none yet, atomically. Returns whether it was this call that did."""
    if is_remote(path):
        return s3.create(path, content)
    partial = Path(path).with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    partial.write_bytes(content)
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links, such as exFAT: for a moment it is there, and empty
        try:
            with open(path, "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        partial.unlink()
    return True


def remove(path: str) -> None:
    """Delete a file, if it is there."""
    if is_remote(path):
        s3.delete(path)
        return
    Path(path).unlink(missing_ok=True)


def upload(folder: str, target: str) -> None:
    """Copy the files of a local folder to a local or remote one."""
    from pyarrow.fs import LocalFileSystem, copy_files

    system, inside = filesystem(target)
    copy_files(folder, inside, source_filesystem=LocalFileSystem(), destination_filesystem=system)


def walk(folder: str) -> Iterator[str]:
    """All files below a folder or prefix, as they are found; in S3 a page of 1,000 names at a time."""
    return s3.walk(folder) if is_remote(folder) else _walk_disk(folder)


def _walk_disk(folder: str) -> Iterator[str]:
    """All files below a folder. Links to folders are followed last, and no folder is looked into twice."""
    waiting, seen = deque([folder]), set()
    while waiting:
        for parent, folders, names in os.walk(waiting.popleft(), onerror=_refuse_closed):
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            waiting.extend(path for name in folders if os.path.islink(path := os.path.join(parent, name)))
            yield from (os.path.join(parent, name) for name in names)


def _refuse_closed(error: OSError) -> None:
    """Raise SegError for a folder that can't be looked into: what is in it would be missing, and nobody would know."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise SegError(f"{error.filename}: this folder can't be looked into: {error.strerror}") from error


def expand(pattern: str) -> list[str]:
    """The files that a glob names: `*` and `?` within a name, `**` across folders."""
    if not is_remote(pattern):
        import glob

        return sorted(glob.glob(pattern, recursive=True))
    fixed = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    if fixed == "s3:/":
        raise SegError(f"{pattern}: name the bucket")
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    wanted = "".join(parts.get(token, re.escape(token)) for token in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))
    return [path for path in walk(fixed) if re.fullmatch(wanted, path)]


def published(folder: str, suffix: str) -> list[str]:
    """Paths of the published files of a folder with that suffix, by name."""
    if is_remote(folder):
        depth = folder.count("/") + 1
        found = [path for path in walk(folder) if path.endswith(suffix) and path.count("/") == depth]
        return sorted(found)
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.endswith(suffix) and not e.name.startswith(PARTIAL)]
    return [os.path.join(folder, name) for name in sorted(names)]


def make_folder(folder: str | Path) -> None:
    """Create a folder that can be written to. Raises SegError where that can't be done."""
    if is_remote(folder):
        s3.check_writable(str(folder), f"{PARTIAL}{uuid.uuid4().hex}")
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f"{PARTIAL}{uuid.uuid4().hex}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise SegError(f"{folder}: can't be written to ({error.strerror}): choose another folder") from error


def check_writable(folder: str | Path) -> None:
    """Raise SegError where a folder could not be made; leaves no trace of the attempt."""
    if is_remote(folder):
        make_folder(folder)
        return
    folder = Path(folder)
    absent = [each for each in (folder, *folder.parents) if not each.exists()]
    make_folder(folder)
    for each in absent:
        each.rmdir()


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()
