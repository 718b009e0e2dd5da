"""What a place for files must offer: `disk` and `s3` do, and a further store is one more module like them.

Each is a module whose functions have the names and types below; `files` chooses among them by a path's scheme. Every
function raises SegError, in one line, for what its store refuses or does not answer.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

PARTIAL = ".partial-"  # files and folders of this prefix are not there yet

GdalSettings = dict[str, str | float]


class Stat(NamedTuple):
    """What tells one state of a file from another."""

    size: int  # bytes
    # S3: the etag; disk: size and time of the last change in ns. It must change with each write. In an object store it
    # must also be the same for the same content: copies, and scenes that have moved, are found by it.
    version: str


class Store(Protocol):
    """The functions that every store has."""

    def stat(self, path: str, /) -> Stat | None:
        """Size and version of a file; None where there is no such file."""

    def exists(self, path: str, /) -> bool:
        """Whether there is a file or a folder, or anything below a prefix."""

    def read(self, path: str, /) -> bytes | None:
        """The content of a file, None where there is none."""

    def publish(self, path: str, content: bytes, /) -> None:
        """Write a file at once or not at all: a process killed at any moment leaves the old file, the new, or none."""

    def create(self, path: str, content: bytes, /) -> bool:
        """Write a small file where there is none yet, atomically. Returns whether it was this call that did."""

    def remove(self, path: str, /) -> None:
        """Delete a file, if it is there."""

    def walk(self, folder: str, /) -> Iterator[str]:
        """Paths of all files below a folder, as they are found; nothing where there is no such folder."""

    def list_files(self, folder: str, /) -> Iterator[tuple[str, Stat]]:
        """Names, sizes and versions of the files in a folder, not below it; nothing where there is no such folder."""

    def make_folder(self, folder: str, /) -> None:
        """Create a folder, where the store has such things, and try whether it can be written to."""

    def arrow(self, path: str, /) -> "tuple[FileSystem, str]":
        """A pyarrow file system and the path in it."""

    def gdal_path(self, path: str, /) -> str:
        """The path as GDAL names it."""

    def gdal_settings(self, path: str, /) -> GdalSettings:
        """Settings for GDAL to read imagery at a path: the same in every process, but for its credentials."""


class ObjectStore(Store, Protocol):
    """A store of objects without folders, which can make a write depend on the state of what is there."""

    def stat_beside(self, path: str, /) -> tuple[Stat | None, list[str] | None]:
        """As `stat`, and the paths of files beside it that have its stem; None where the store does not list them."""

    def upload_file(self, path: str, local: str, /) -> None:
        """Write a file from a local one, at once or not at all. Memory does not depend on its size."""

    def replace(self, path: str, content: bytes, version: str, /) -> bool:
        """Write a file in the place of the one of this version. Returns False where that is no longer there."""
