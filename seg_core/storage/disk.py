"""Files on disk, or on a file system of the network that is mounted like one. See `store.Store`."""

import os
import shutil
import uuid
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING

from seg_core.errors import SegError
from seg_core.storage.store import PARTIAL, GdalSettings, Stat

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def stat(path: str) -> Stat | None:
    """Size and version of a file; None where there is no such file. Raises SegError where it may not be looked at."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SegError(f"{path}: {error.strerror}") from error
    if not S_ISREG(found.st_mode):  # a folder; or a pipe, which one would wait at for ever
        return None
    return _stat_of(found)


def _stat_of(found: os.stat_result) -> Stat:
    return Stat(found.st_size, f"{found.st_size}-{found.st_mtime_ns}")


def exists(path: str) -> bool:
    """Whether there is a file or a folder."""
    return os.path.exists(path)


def read(path: str) -> bytes | None:
    """The content of a file, None where there is none. Raises SegError where it can't be read."""
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SegError(f"{path}: can't be read: {error.strerror}") from error


def publish(path: str, content: bytes, staging: str | None = None) -> None:
    """Write a file under a temporary name, flush it, and rename it.

    The temporary file is in the folder `staging` of the same file system (default: beside the file).
    """
    target = Path(path)
    partial = Path(staging or target.parent, _partial_name())
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def create(path: str, content: bytes) -> bool:
    """Write a small file where there is none yet, atomically. Returns whether it was this call that did."""
    partial = Path(path).with_name(_partial_name())
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
    Path(path).unlink(missing_ok=True)


def walk(folder: str) -> Iterator[str]:
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


def list_files(folder: str) -> Iterator[tuple[str, Stat]]:
    """Names, sizes and versions of the files in a folder."""
    if not os.path.isdir(folder):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # it was removed meanwhile
                found = entry.stat()
                if S_ISREG(found.st_mode):
                    yield entry.name, _stat_of(found)


def _refuse_closed(error: OSError) -> None:
    """Raise SegError for a folder that can't be looked into: what is in it would be missing, and nobody would know."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise SegError(f"{error.filename}: this folder can't be looked into: {error.strerror}") from error


def make_folder(folder: str) -> None:
    """Create a folder that can be written to. Raises SegError where that can't be done."""
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        trial = target / _partial_name()
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise SegError(f"{folder}: can't be written to ({error.strerror}): choose another folder") from error


@contextmanager
def staged_folder(target: str) -> Iterator[str]:
    """Yield a new folder that is renamed to `target` if the block ends well, and else is removed.

    Raises SegError where the folder around it can't be written to.
    """
    parent = os.path.dirname(target)
    make_folder(parent)
    partial = os.path.join(parent, _partial_name())
    os.mkdir(partial)
    try:
        yield partial
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def staged_file(target: str, suffix: str | None = None) -> Iterator[str]:
    """Yield the path of a file to write, which is renamed to `target` if the block ends well, and else is removed.

    It has the suffix of `target`, or the one given, because libraries choose a format by it.
    """
    folder, name = os.path.split(target)
    ending = os.path.splitext(name)[1] if suffix is None else suffix
    partial = os.path.join(folder, f"{_partial_name()}{ending}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        with suppress(FileNotFoundError):
            os.remove(partial)


def check_new_file(path: str, suffixes: Collection[str], what: str, *beside: str) -> None:
    """Raise SegError unless `path`, the absolute value of --out, is a new file with one of the suffixes.

    Files that are written `beside` it must be new, too. `what` is for the message, such as "areas are".
    """
    if os.path.splitext(path)[1].lower() not in suffixes:
        raise SegError(f"--out {path}: not a format that {what} written in: say {', '.join(suffixes)}")
    if existing := next(filter(os.path.exists, (path, *beside)), None):
        raise SegError(f"--out {existing}: already exists: choose another name")
    if not os.path.isdir(os.path.dirname(path)):
        raise SegError(f"--out {path}: there is no such folder: create it first")


def check_writable(folder: str) -> None:
    """Raise SegError where a folder could not be made; leaves no trace of the attempt."""
    target = Path(folder)
    absent = [each for each in (target, *target.parents) if not each.exists()]
    make_folder(folder)
    for each in absent:
        each.rmdir()


def arrow(path: str) -> "tuple[FileSystem, str]":
    """The file system of pyarrow and the path in it."""
    from pyarrow.fs import LocalFileSystem

    return LocalFileSystem(), path


def gdal_path(path: str) -> str:
    """The path as GDAL names it."""
    return path


def gdal_settings(_: str) -> GdalSettings:
    """No settings: GDAL reads disks as it is."""
    return {}


def _partial_name() -> str:
    return f"{PARTIAL}{uuid.uuid4().hex}"
