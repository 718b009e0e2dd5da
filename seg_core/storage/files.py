"""Where files are, on disk or in S3: paths, listings, and publishing a file so that it is there whole or not at all.

A path is a local one or `s3://BUCKET/KEY`. Its scheme chooses the module that serves it: see `store`.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from seg_core.errors import CorruptFileError, ReadError, SegError, StoreUnavailableError
from seg_core.storage import disk, s3, store
from seg_core.storage.store import GdalSettings, ObjectStore, Stat, Store

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

# By scheme. A further one also concerns what `region.read_region` mixes, the patterns in `cli.arguments`, and the
# variables of S3 that `cli.main` sets and `ray_session` passes on to nodes.
REMOTE: dict[str, ObjectStore] = {"s3": s3}
PARTIAL = store.PARTIAL  # files and folders of this prefix are not there yet
# GDAL's settings that change what a file's pixels are, where they lie, or which hold data, at their defaults: what the
# caller's environment says of them does not count.
PINNED: GdalSettings = {
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
WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}  # of globs, as regular expressions
CHARACTERS = r"\[!?\]?[^]/]*\]"  # a set of them in a glob


def _remote(path: str) -> ObjectStore | None:
    """The object store that a path is in; None for one on disk."""
    scheme, separator, _ = path.partition("://")
    return REMOTE.get(scheme) if separator else None


def _store(path: str) -> Store:
    return _remote(path) or disk


def is_remote(path: str | Path) -> bool:
    """Whether a path is the URI of an object store."""
    return _remote(str(path)) is not None


def absolute(path: str | os.PathLike[str], base: str | None = None) -> str:
    """An absolute form of a path, taken from the folder or prefix `base` (default: the current folder).

    Raises SegError for what can't be read or written.
    """
    path = os.fspath(path)
    if is_remote(path) and path.partition("://")[2].strip("/"):
        return path.rstrip("/")
    if "://" in path:
        schemes = " and ".join(f"{scheme}://" for scheme in REMOTE)
        raise SegError(f"{path}: only local paths and {schemes} URIs can be read and written")
    if base is not None and is_remote(base) and not os.path.isabs(path):
        return _below(base, path)
    return os.path.normpath(os.path.join(base or os.getcwd(), os.path.expanduser(path)))


def _below(prefix: str, path: str) -> str:
    """A path from a prefix on. `.` and `..` are resolved as on disk, because they would be names in a store."""
    scheme, _, there = prefix.partition("://")
    bucket, *names = there.split("/")
    for name in path.split("/"):
        if name == "..":
            names = names[:-1]
        elif name != ".":
            names.append(name)
    return f"{scheme}://{'/'.join([bucket, *names])}"


def folder_of(path: str) -> str:
    """The folder or prefix that a path is in."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def gdal_path(path: str) -> str:
    """A path as GDAL names it."""
    return _store(path).gdal_path(path)


def gdal_settings(path: str = "") -> GdalSettings:
    """Settings for GDAL to read imagery at a path: the same in every process, but for its credentials."""
    # MB; by default GDAL's block cache takes 5 % of the machine in each process.
    return {"GDAL_CACHEMAX": 64, **PINNED, **_store(path).gdal_settings(path)}


def filesystem(path: str) -> "tuple[FileSystem, str]":
    """A pyarrow file system and the path in it."""
    return _store(path).arrow(path)


def stat(path: str) -> Stat | None:
    """Size and version of a file; None where there is no such file. Raises SegError where it may not be looked at."""
    return _store(path).stat(path)


def stat_beside(path: str) -> tuple[Stat | None, list[str] | None]:
    """As `stat`, and the paths of files beside a remote one that have its stem; by one request.

    They are None where the store does not list them. On disk none are looked for.
    """
    remote = _remote(path)
    return remote.stat_beside(path) if remote else (disk.stat(path), [])


def exists(path: str) -> bool:
    """Whether there is a file or a folder, or anything below a prefix."""
    return _store(path).exists(path)


def read_bytes(path: str) -> bytes | None:
    """The content of a file, or None where there is none. Raises SegError where it can't be read."""
    return _store(path).read(path)


def read_header(folder: str, name: str, kind: str, file_format: str) -> dict[str, Any]:
    """The JSON object in a folder that says what the folder is: `kind` is the word for that, such as run.

    Raises SegError where there is no such folder or it is another thing, CorruptFileError where the file is no JSON.
    """
    content = read_bytes(f"{folder}/{name}")
    if content is None:
        raise SegError(f"{folder}: not a {kind}: it holds no {name}" if exists(folder) else f"{folder}: no such {kind}")
    try:
        header = json.loads(content)
    except ValueError as error:
        raise CorruptFileError(f"{folder}: damaged: {name} is no JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format") != file_format:
        raise SegError(f"{folder}: not a {kind}: {name} does not say format {file_format!r}")
    return header


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

    A process killed at any moment leaves the old file, the new file, or none; never a part of one. On disk the
    temporary file is in the folder `staging` of the same file system (default: beside the file).
    """
    remote = _remote(str(path))
    if remote:
        remote.publish(str(path), content)
    else:
        disk.publish(str(path), content, staging)


@contextmanager
def local_draft(path: str) -> Iterator[str]:
    """Yield a local path to write a file at, for libraries that write to a disk only.

    On disk it is the path itself, in a folder that is made. For a remote path it is one of the same name in a temporary
    folder. If the block ends well, all files of that folder are uploaded beside each other, the named one last.
    """
    remote, name = _remote(path), os.path.basename(path)
    if remote is None:
        disk.make_folder(os.path.dirname(path))
        yield path
        return
    with _temporary_folder(path) as folder:
        yield os.path.join(folder, name)
        for each in sorted(os.listdir(folder), key=lambda found: (found == name, found)):
            remote.upload_file(f"{folder_of(path)}/{each}", os.path.join(folder, each))


def _temporary_folder(path: str) -> "TemporaryDirectory[str]":
    """A local folder for what becomes a remote file. Raises SegError where there can be none."""
    try:
        return TemporaryDirectory(prefix=PARTIAL)
    except OSError as error:
        raise SegError(f"{path}: no temporary folder for it: {error.strerror}: name one by TMPDIR") from error


def find_existing(folder: str, paths: Collection[str]) -> str | None:
    """The first of some paths below a folder where there is something already; None if there is none."""
    if not is_remote(folder):
        return next(filter(os.path.exists, paths), None)
    wanted = set(paths)
    return next((path for path in walk(folder) if path in wanted), None)


def create(path: str, content: bytes) -> bool:
    """Write a small file where there is none yet, atomically. Returns whether it was this call that did."""
    return _store(path).create(path, content)


def replace(uri: str, content: bytes, version: str) -> bool:
    """Write a remote file in the place of the one of this version. Returns False where that is no longer there."""
    remote = _remote(uri)
    assert remote, f"{uri}: on disk there is no such write"
    return remote.replace(uri, content, version)


def remove(path: str) -> None:
    """Delete a file, if it is there."""
    _store(path).remove(path)


def upload(folder: str, target: str) -> None:
    """Copy the files of a local folder to a local or remote one."""
    from pyarrow.fs import LocalFileSystem, copy_files

    system, inside = filesystem(target)
    copy_files(folder, inside, source_filesystem=LocalFileSystem(), destination_filesystem=system)


def walk(folder: str) -> Iterator[str]:
    """All files below a folder or prefix, as they are found; in S3 a page of 1,000 names at a time."""
    return _store(folder).walk(folder)


def expand(pattern: str) -> list[str]:
    """The files that a glob names: `*`, `?` and `[...]` within a name, `**` across folders."""
    if not is_remote(pattern):
        import glob

        return sorted(glob.glob(pattern, recursive=True))
    fixed = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
    if fixed.endswith(":/"):
        raise SegError(f"{pattern}: name the bucket")
    wanted = "".join(map(_to_regex, re.split(rf"(\*\*/|\*\*|\*|\?|{CHARACTERS})", pattern)))
    return [path for path in walk(fixed) if re.fullmatch(wanted, path)]


def _to_regex(token: str) -> str:
    """A regular expression for a wildcard, for a set of characters or for plain text."""
    if re.fullmatch(CHARACTERS, token):
        import fnmatch

        return f"(?!/){fnmatch.translate(token)[:-2]}"  # without the two characters for the end of the text
    return WILDCARDS.get(token, re.escape(token))


def published(folder: str, suffix: str) -> list[str]:
    """Paths of the published files of a folder with that suffix, by name."""
    if is_remote(folder):
        names = [name for name, _ in list_files(folder)]
    else:  # without a look at each file
        names = os.listdir(folder) if os.path.isdir(folder) else []
    chosen = sorted(name for name in names if name.endswith(suffix) and not name.startswith(PARTIAL))
    return [f"{folder}/{name}" for name in chosen]


def list_files(folder: str) -> Iterator[tuple[str, Stat]]:
    """Names, sizes and versions of the files in a folder, in no order; nothing where there is no such folder."""
    return _store(folder).list_files(folder)


def make_folder(folder: str | Path) -> None:
    """Create a folder that can be written to. Raises SegError where that can't be done."""
    _store(str(folder)).make_folder(str(folder))


def check_writable(folder: str | Path) -> None:
    """Raise SegError where a folder could not be made; leaves no trace of the attempt."""
    remote = _remote(str(folder))
    if remote:
        remote.make_folder(str(folder))
    else:
        disk.check_writable(str(folder))


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()
