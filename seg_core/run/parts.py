"""Where the rows of each part are: in a file of its own, or in a compacted file together with many other parts.

    tiles/part-<key>.parquet          one part, as it was published
    tiles/compacted-<digest>.parquet  many parts, one after the other; its footer lists them

A part that has a file of its own is read from there, also if a compacted file holds it too: that one is then older, or
the same. If several compacted files hold a part, its rows are the same in all of them. See `compact`.
"""

import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import pyarrow.parquet as pq

from seg_core.errors import CorruptFileError, SegError
from seg_core.run.parquet import advised, read_file
from seg_core.run.schema import TILES, check_columns
from seg_core.run.tables import OWN, REPAIR_ADVICE, SUFFIX, part_name
from seg_core.storage.files import published, stat
from seg_core.threads import for_each

T = TypeVar("T")

COMPACTED = "compacted-"  # how the name of a compacted file begins
PARTS = b"parts"  # key in the metadata of a compacted file
INDEX_ATTEMPTS = 5  # to list a run whose compacted files are replaced meanwhile


class Entry(NamedTuple):
    """A part in a compacted file, as the footer lists it."""

    key: str
    version: str  # see `Part.version`
    rows: int
    all_done: bool  # whether none of its tiles failed


class Location(NamedTuple):
    """Where the rows of a part are."""

    path: str
    entry: Entry | None = None  # None: the file holds this part alone
    first: int = 0  # row in the row group
    group: int = 0  # row group

    @property
    def name(self) -> str:
        """The name of the file."""
        return posixpath.basename(self.path)

    @property
    def key(self) -> str:
        """The key of the part."""
        return self.entry.key if self.entry else _key(self.path)


Locations = Mapping[str, Location]
"""Where each part of a run is, by its key."""


@dataclass(frozen=True)
class CompactedFile:
    """The parts of a compacted file, in the order of their rows. A part lies in one row group."""

    path: str
    entries: Sequence[Entry]
    group_rows: Sequence[int]  # number of rows of each row group

    @property
    def name(self) -> str:
        """The name of the file."""
        return posixpath.basename(self.path)

    def locations(self) -> Iterator[tuple[str, Location]]:
        """Yield the key and the location of each part."""
        ends = list(accumulate(self.group_rows))
        group, first = 0, 0
        for entry in self.entries:
            while group < len(ends) and first >= ends[group]:
                group += 1
            if group == len(ends) or first + entry.rows > ends[group]:
                raise CorruptFileError(f"{self.name}: its parts do not fit its row groups")
            before = ends[group] - self.group_rows[group]
            yield entry.key, Location(self.path, entry, first - before, group)
            first += entry.rows
        if first != sum(self.group_rows):
            raise CorruptFileError(f"{self.name}: has rows of parts that it does not list")


class OwnParts(Mapping[str, Location]):
    """The files of single parts, by key. A location is made when it is asked for: a run may have millions of them."""

    def __init__(self, folder: str, keys: Iterable[str]) -> None:
        """`folder` is the path of the folder that the files are in."""
        self.folder, self.present = folder, dict.fromkeys(keys)

    def __getitem__(self, key: str) -> Location:
        """Return the location of a part. Raises KeyError if it has no file of its own."""
        if key not in self.present:
            raise KeyError(key)
        return Location(f"{self.folder}/{part_name(key)}")

    def __contains__(self, key: object) -> bool:
        """Return whether a part has a file of its own."""
        return key in self.present

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys."""
        return iter(self.present)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.present)


@dataclass(frozen=True)
class PartIndex:
    """Where each part of a run is."""

    run: str
    own: Mapping[str, Location]  # files of single parts, by key
    compacted: Sequence[CompactedFile]
    other: Sequence[str]  # paths of Parquet files that are neither

    def find(self) -> Locations:
        """Return the location of each part, by key."""
        if not self.compacted:
            return self.own
        found: dict[str, Location] = {}
        for file in reversed(self.compacted):  # so that the first one that holds a part wins, as in `dead_parts`
            found.update(file.locations())
        return found | dict(self.own)

    def dead_parts(self) -> dict[str, set[str]]:
        """Return the keys of the parts of compacted files that don't count, by the name of the file."""
        taken, found = set(self.own), {}
        for file in self.compacted:
            keys = {entry.key for entry in file.entries}
            if dead := keys & taken:
                found[file.name] = dead
            taken |= keys
        return found


def index_parts(run: str, read: Callable[[str], CompactedFile] | None = None) -> PartIndex:
    """Find out where the parts of a run are. `read` reads a compacted file, by default `read_index`.

    Raises CorruptFileError if the footer of a compacted file is damaged, and SegError if the store is unavailable.
    """
    for attempt in range(INDEX_ATTEMPTS):
        paths = _list_files(run)
        compacted = _compacted(paths)
        try:
            files = list(for_each(read or read_index, compacted))
            break
        except SegError:
            replaced = [path for path in compacted if stat(path) is None]
            if not replaced or attempt + 1 == INDEX_ATTEMPTS:
                raise
    own = OwnParts(f"{run}/tiles", (_key(path) for path in paths if _name(path).startswith(OWN)))
    other = [path for path in paths if not _name(path).startswith((OWN, COMPACTED))]
    return PartIndex(run, own, files, other)


def check_not_empty(index: PartIndex) -> None:
    """Raise SegError if a run holds no rows."""
    if not index.own and not index.compacted:
        raise SegError(f"{index.run}: holds no rows yet: run seg segment to the end first")


def find_parts(run: str) -> Locations:
    """Return where each part of a run is, by key. Raises as `index_parts` does."""
    return index_parts(run).find()


def _list_files(run: str) -> list[str]:
    """List the Parquet files of a run.

    While a run is compacted, files of parts go away once a compacted file has them. A list that is made meanwhile may
    lack both. So a list counts only if the next one has the same compacted files: none was added while it was made.
    """
    paths = published(f"{run}/tiles", SUFFIX)
    while True:
        later = published(f"{run}/tiles", SUFFIX)
        if _compacted(later) == _compacted(paths):
            return paths
        paths = later


def _compacted(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if _name(path).startswith(COMPACTED)]


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _key(path: str) -> str:
    return _name(path)[len(OWN) : -len(SUFFIX)]


def read_index(path: str) -> CompactedFile:
    """Read the list of parts of a compacted file from its footer. Raises as `read_file` does."""

    def parse(file: Any) -> CompactedFile:
        footer = pq.read_metadata(file)
        check_columns(footer.schema.to_arrow_schema(), TILES)
        try:
            entries = [Entry(*each) for each in json.loads((footer.metadata or {})[PARTS])]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(f"{posixpath.basename(path)}: has no list of its parts") from error
        return CompactedFile(path, entries, [footer.row_group(at).num_rows for at in range(footer.num_row_groups)])

    with advised(REPAIR_ADVICE):
        return read_file(path, parse)
