"""The files of a run as DuckDB sees them: named `run://...`, read-only, and nothing beside them.

DuckDB reads Parquet by itself here, and not through an Arrow dataset, to which it passes no filter (2.0.1): then each
row group would be read, whatever a query asks for.
"""

import fnmatch
from collections.abc import Mapping
from datetime import UTC, datetime
from threading import Lock, local
from typing import Any

from fsspec import AbstractFileSystem

from seg_core.storage.files import filesystem

SCHEME = "run"


class RunFiles(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A read-only file system of some files, local or in S3. It counts what is read of them."""

    protocol = SCHEME
    cachable = False

    def __init__(self, paths: Mapping[str, str]) -> None:
        """`paths` are the files' paths by the name that they have here, such as `own/part-1.parquet`."""
        super().__init__()
        self.paths = dict(paths)
        self.sizes: dict[str, int] = {}
        self.bytes_read: dict[str, int] = {}  # by name, of files that were opened
        self.error: BaseException | None = None  # the last one of the store: DuckDB only passes its text on
        self.lock = Lock()

    def glob(self, path: str, **_: Any) -> list[str]:
        """Return the names of the files that fit a pattern."""
        pattern = self._strip_protocol(path)
        return [f"{SCHEME}://{name}" for name in fnmatch.filter(self.paths, pattern)]

    def exists(self, path: str, **_: Any) -> bool:
        """Return whether there is such a file."""
        return self._strip_protocol(path) in self.paths

    isfile = exists

    def isdir(self, path: str) -> bool:  # noqa: ARG002 - the interface is fsspec's
        """Return False: there are no folders here."""
        return False

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name and size of a file."""
        name = self._strip_protocol(path)
        if name not in self.sizes:
            self.open(path).close()
        return {"name": name, "size": self.sizes[name], "type": "file"}

    def modified(self, path: str) -> datetime:  # noqa: ARG002
        """Return the same time for all files: they don't change while they are read."""
        return datetime.fromtimestamp(0, UTC)

    def open(self, path: str, mode: str = "rb", **_: Any) -> "CountingFile":
        """Open a file to read it. Raises PermissionError for any other mode."""
        name = self._strip_protocol(path)
        if mode != "rb" or name not in self.paths:
            raise PermissionError(f"{path}: the files of a run can only be read")
        try:
            system, inside = filesystem(self.paths[name])
            file = system.open_input_file(inside)
            self.sizes[name] = file.size()
        except OSError as error:
            self.error = error
            raise
        with self.lock:
            self.bytes_read.setdefault(name, 0)
        return CountingFile(self, name, file)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix(f"{SCHEME}://")


class CountingFile:
    """An open file whose reads are counted. DuckDB shares it among threads, so that each has a position of its own."""

    def __init__(self, files: RunFiles, name: str, file: Any) -> None:
        self.files, self.name, self.file, self.at = files, name, file, local()

    def read(self, size: int = -1) -> bytes:
        """Read so many bytes, or all that are left."""
        position = self.tell()
        try:
            content: bytes = self.file.read_at(self.files.sizes[self.name] - position if size < 0 else size, position)
        except OSError as error:
            self.files.error = error
            raise
        self.at.position = position + len(content)
        with self.files.lock:
            self.files.bytes_read[self.name] += len(content)
        return content

    def seek(self, position: int, whence: int = 0) -> int:
        """Move to a position."""
        start = (0, self.tell(), self.files.sizes[self.name])[whence]
        self.at.position = start + position
        return self.tell()

    def tell(self) -> int:
        """Return the position."""
        return int(getattr(self.at, "position", 0))

    def close(self) -> None:
        """Close the file."""
        self.file.close()
