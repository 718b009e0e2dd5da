"""Write into a run under its lease: a driver that has lost the lease can no longer change the run.

Checking the lease before a write is not enough. Between the check and the write a process may be frozen (a sleeping
laptop, a paused container, SIGSTOP), while another driver takes the run over and finishes it. So the write itself must
fail (https://martin.kleppmann.com/2016/02/08/how-to-do-distributed-locking.html calls this fencing):

- On disk each file is written into the owner's staging folder, RUN/.partial-<owner>, and renamed from there. The next
  owner of the lease deletes all other staging folders, and a rename out of a deleted folder fails. A file is removed
  by a rename into the staging folder, which fails if that folder has been deleted.
- In S3 a file is put on the condition that it doesn't exist yet, or still has the etag that it had before the lease
  was last checked. A file that a later owner has published has another etag. The lease's own file is never created
  by its renewal. One change remains possible: a driver that was frozen just before it marked a part as in progress
  creates that mark (see `attempts`), which every later driver ignores.
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
    """The interface through which a run's files are published and removed: PLAIN, or a Lease."""

    def publish(self, path: str, content: bytes) -> None:
        """Write a file atomically."""

    def remove(self, path: str) -> None:
        """Delete a file, if it is there."""


@dataclass(frozen=True)
class PlainStore:
    """Storage without a lease. It is an object, because a module can't be sent to other processes."""

    def publish(self, path: str, content: bytes) -> None:
        """Write a file atomically."""
        files.publish(path, content)

    def remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        files.remove(path)


PLAIN = PlainStore()


@dataclass(frozen=True)
class Lease:
    """The right of one driver to change a run. Processes that it is sent to can write for that driver."""

    run: str
    owner: str

    @property
    def path(self) -> str:
        """The path of the file that names the owner."""
        return f"{self.run}/{LEASE}"

    @property
    def staging(self) -> str:
        """The folder from which the owner's files are renamed on disk. A run in S3 has none."""
        return f"{self.run}/{PARTIAL}{self.owner}"

    def is_lost(self) -> bool:
        """Whether another driver has taken the run over. That driver may have finished since, and left no lease."""
        if not is_remote(self.run) and not os.path.isdir(self.staging):
            return True
        return parse_lease(read_bytes(self.path) or b"").get("owner") != self.owner

    def lost_error(self) -> JobError:
        """Return the error for a driver that has lost the lease."""
        return JobError(f"{self.run}: another driver has taken this run over: this one ends")

    def check(self) -> None:
        """Raise JobError if another driver has taken the run over."""
        if self.is_lost():
            raise self.lost_error()

    def publish(self, path: str, content: bytes) -> None:
        """Write a file atomically, or change nothing.

        Raises JobError if the file can't be written on disk, or if the lease is lost.
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
        """Delete a file, if it is there. Raises JobError if the lease is lost.

        In S3 another driver may replace the file in the instant between the check of the lease and the deletion. The
        run then lacks a part, which `seg verify` reports.
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
        """Take the lease if nobody holds it. Returns whether it was free."""
        self._make_staging()
        # A creation whose response was lost is retried, and then finds the file that it has created itself.
        existed = not files.create(self.path, content)
        if existed and parse_lease(read_bytes(self.path) or b"").get("owner") != self.owner:
            self._delete_staging()
            return False
        self._delete_other_staging()
        return True

    def supersede(self, held: bytes, content: bytes, force: bool) -> bool:
        """Take the lease over from a driver that left its file with the content `held`.

        Returns False if another driver was faster. On disk only the first one can rename the staging folder of the
        former owner. The folder may be missing, because that owner had none or its first successor was killed halfway:
        `force` takes the lease over even then.
        """
        if is_remote(self.run):
            state = files.stat(self.path)
            unchanged = state is not None and read_bytes(self.path) == held
            return state is not None and unchanged and files.replace(self.path, content, state.version)
        self._make_staging()
        if not self._take_staging(str(parse_lease(held).get("owner"))) and not force:
            self._delete_staging()
            return False
        self.publish(self.path, content)
        self._delete_other_staging()
        return True

    def renew(self, content: bytes) -> None:
        """Replace the content of the lease's file. Raises JobError if the lease is lost, OSError if a disk fails.

        A later owner may have finished and removed the file. It is not created then: this driver would hold the lease
        again, and could change a run that is finished.
        """
        if not is_remote(self.run):
            try:
                files.publish(self.path, content, self.staging)
            except OSError:
                self.check()
                raise
            return
        state = files.stat(self.path)
        self.check()
        if state is not None and not files.replace(self.path, content, state.version):
            self.check()  # a put whose response was lost is retried, and then finds another etag

    def release(self) -> None:
        """Delete the lease's file, unless another driver holds the lease now."""
        try:
            self.check()
            self.remove(self.path)
        except JobError:
            pass
        finally:
            self._delete_staging()

    def _make_staging(self) -> None:
        if not is_remote(self.run):
            os.makedirs(self.staging, exist_ok=True)

    def _delete_staging(self) -> None:
        if not is_remote(self.run):
            shutil.rmtree(self.staging, ignore_errors=True)

    def _take_staging(self, owner: str) -> bool:
        """Move another owner's staging folder into this one and delete it. Returns False if there is none to move."""
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
        # A put whose response was lost is retried, and then finds the content that it has written itself.
        while not written and read_bytes(path) != content:
            state = files.stat(path)
            self.check()  # after reading the etag, so that a file of a later owner is never replaced
            written = files.replace(path, content, state.version) if state else files.create(path, content)

    def _delete_other_staging(self) -> None:
        for folder in [] if is_remote(self.run) else list(_staging_folders(self.run)):
            if folder != self.staging:
                _delete_folder(folder)


def parse_lease(content: bytes) -> dict[str, Any]:
    """Return the content of a lease's file as a dict, which is empty if the file is damaged."""
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
    """Delete a folder, even while its owner is still writing into it."""
    while os.path.isdir(folder):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise SegError(f"{folder}: can't be deleted ({error.strerror}): delete it by hand") from error
