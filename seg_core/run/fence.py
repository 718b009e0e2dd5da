"""Writing into a run under its lease: a driver that has lost the lease can no longer change the run.

To check the lease before a write is not enough. Between the two a process may be frozen (a sleeping laptop, a paused
container, SIGSTOP) for as long as another driver needs to take the run over and finish it. So the write itself fails:

- On disk each file is written into the owner's staging folder, RUN/.partial-<owner>, and renamed from there. Whoever
  takes the lease deletes all other staging folders, and a rename out of a deleted folder fails. Files are removed by a
  rename into the staging folder, which fails likewise.
- In S3 a file is put on the condition that there is none yet, or that it is still in the state (etag) in which it was
  before the lease was last checked. A file that a later owner has published is in another state.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from seg_core.errors import JobError, SegError
from seg_core.storage import files
from seg_core.storage.files import PARTIAL, is_remote, read_bytes

LEASE = "driver.json"


class Store(Protocol):
    """Where files are published and removed: PLAIN, or under a Lease."""

    def publish(self, path: str, content: bytes) -> None:
        """Write a file atomically."""

    def remove(self, path: str) -> None:
        """Delete a file, if it is there."""


@dataclass(frozen=True)
class PlainStore:
    """Plain storage, for who needs no lease. A value, unlike the module, so that it may be sent to other processes."""

    def publish(self, path: str, content: bytes) -> None:
        """Write a file atomically."""
        files.publish(path, content)

    def remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        files.remove(path)


PLAIN = PlainStore()


@dataclass(frozen=True)
class Lease:
    """The right of one driver to change a run. It may be sent to other processes, which then write for that driver."""

    run: str
    owner: str

    @property
    def path(self) -> str:
        """The file that names the owner."""
        return f"{self.run}/{LEASE}"

    @property
    def staging(self) -> str:
        """On disk: the folder that the owner's files are renamed from."""
        return f"{self.run}/{PARTIAL}{self.owner}"

    def is_lost(self) -> bool:
        """Whether another driver has taken the run over; it may have finished since, and left no lease."""
        if not is_remote(self.run) and not os.path.isdir(self.staging):
            return True
        return parse(read_bytes(self.path) or b"").get("owner") != self.owner

    def loss(self) -> JobError:
        """The error of a driver that has lost the lease."""
        return JobError(f"{self.run}: another driver has taken this run over: this one ends")

    def check(self) -> None:
        """Raise JobError where another driver has taken the run over."""
        if self.is_lost():
            raise self.loss()

    def publish(self, path: str, content: bytes) -> None:
        """Write a file atomically, or else change nothing.

        Raises JobError where it can't be written on disk, or the lease is lost.
        """
        if is_remote(path):
            self._put(path, content)
            return
        try:
            files.publish(path, content, self.staging)
        except OSError as error:
            self.check()
            raise JobError(f"{path}: can't be written: {error.strerror}") from error

    def remove(self, path: str) -> None:
        """Delete a file, if it is there. Raises JobError where the lease is lost.

        In S3 the file may have been replaced since the lease was checked, an instant before: then the run lacks a part,
        which `seg verify` names.
        """
        if is_remote(path):
            self.check()
            files.remove(path)
            return
        removed = f"{self.staging}/{PARTIAL}{uuid.uuid4().hex}"
        try:
            os.replace(path, removed)
            os.unlink(removed)
        except FileNotFoundError:
            self.check()

    def acquire(self, content: bytes) -> bool:
        """Take the lease where nobody has it. Returns whether that was so."""
        self._open()
        # A creation whose answer was lost is tried again, and then finds what it has written itself.
        if not files.create(self.path, content) and parse(read_bytes(self.path) or b"").get("owner") != self.owner:
            self._close()
            return False
        self._fence_off_others()
        return True

    def supersede(self, held: bytes, content: bytes, force: bool) -> bool:
        """Take the lease from a driver that left it as `held`. Returns False where somebody else was faster.

        On disk only the first can rename the staging folder of the former owner. Where it is missing, that owner knew
        of no such folder, or its first successor was killed halfway; `force` takes the lease even so.
        """
        if is_remote(self.run):
            found = files.stat(self.path)
            unchanged = found is not None and read_bytes(self.path) == held
            return found is not None and unchanged and files.replace(self.path, content, found.version)
        self._open()
        if not self._fence_off(str(parse(held).get("owner"))) and not force:
            self._close()
            return False
        self.publish(self.path, content)
        self._fence_off_others()
        return True

    def release(self) -> None:
        """Give the lease back, unless it is another driver's by now."""
        try:
            self.check()
            self.remove(self.path)
        except JobError:
            pass
        finally:
            self._close()

    def _open(self) -> None:
        if not is_remote(self.run):
            os.makedirs(self.staging, exist_ok=True)

    def _close(self) -> None:
        if not is_remote(self.run):
            shutil.rmtree(self.staging, ignore_errors=True)

    def _fence_off(self, owner: str) -> bool:
        """Delete the staging folder of another owner. Returns whether it was this call that did."""
        folder = f"{self.staging}/{owner}"
        try:
            os.rename(f"{self.run}/{PARTIAL}{owner}", folder)
        except (FileNotFoundError, NotADirectoryError):
            return False
        _delete_folder(folder)
        return True

    def _put(self, path: str, content: bytes) -> None:
        self.check()
        written = files.create(path, content)
        # A put whose answer was lost is tried again, and then finds what it has written itself.
        while not written and read_bytes(path) != content:
            found = files.stat(path)
            self.check()  # after the look at the file: so what a later owner publishes is never taken for its old state
            written = files.replace(path, content, found.version) if found else files.create(path, content)

    def _fence_off_others(self) -> None:
        for folder in [] if is_remote(self.run) else list(_staging_folders(self.run)):
            if folder != self.staging:
                _delete_folder(folder)


def parse(content: bytes) -> dict[str, Any]:
    """What a lease says; nothing where it is damaged."""
    try:
        return dict(json.loads(content))
    except (TypeError, ValueError):
        return {}


def _staging_folders(run: str) -> Iterator[str]:
    with os.scandir(run) as entries:
        for entry in entries:
            if entry.name.startswith(PARTIAL) and entry.is_dir(follow_symlinks=False):
                yield f"{run}/{entry.name}"


def _delete_folder(folder: str) -> None:
    """Delete a folder into which its owner may still be writing."""
    while os.path.isdir(folder):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise SegError(f"{folder}: can't be deleted ({error.strerror}): delete it") from error
