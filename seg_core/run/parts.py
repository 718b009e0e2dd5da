"""Where the rows of each part are: in a file of its own, or in a compacted file together with many other parts.

    tiles/part-<key>.parquet          one part, as it was published
    tiles/compacted-<digest>.parquet  many parts, one after the other; its footer lists them

A part that has a file of its own is read from there, also if a compacted file holds it too: that one is then older, or
the same. If several compacted files hold a part, its rows are the same in all of them. See `compact`.
"""

import json
import posixpath
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from seg_core.errors import CorruptFileError, SegError
from seg_core.run import tables
from seg_core.run.parquet import advised, read_file, read_table
from seg_core.run.plan import Part
from seg_core.run.rows import Row
from seg_core.run.schema import TILES, check_columns
from seg_core.run.tables import OWN, REPAIR_ADVICE, SUFFIX, State, part_name, version_of
from seg_core.storage.files import published, stat
from seg_core.threads import count_cpus, for_each

T = TypeVar("T")

COMPACTED = "compacted-"  # how the name of a compacted file begins
PARTS = b"parts"  # key in the metadata of a compacted file
INDEX_ATTEMPTS = 5  # to list a run whose compacted files are replaced meanwhile
REFRESH = 5.0  # s; after it, a part that is not where it was is looked for again
SEARCH = Lock()
CACHED_GROUPS = 16  # row groups of compacted files that are in memory; they measure some 8 MB with their masks
GROUPS_AT_ONCE = 16  # row groups in a table of columns without masks: many small tables take longer
CACHED_FOOTERS = 16  # of compacted files; they measure some 10 MB


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


def read_states(locations: Mapping[str, Location]) -> dict[str, State]:
    """Return the state of each part by its key, from footers alone. Raises as `tables.read_states` does."""
    own = {location.path: key for key, location in locations.items() if location.entry is None}
    found: dict[str, State] = {own[path]: state for path, state in tables.read_states(sorted(own)).items()}
    return found | {
        key: (location.entry.all_done, location.entry.version)
        for key, location in locations.items()
        if location.entry is not None
    }


def read_rows(location: Location, columns: Sequence[str] | None = None) -> list[Row]:
    """Read the rows of a part, with all columns or these ones. Columns that an older version did not write are null.

    Raises CorruptFileError if the file is damaged. Raises SegError if the store is unavailable, or if a newer version
    of this program wrote the file.
    """
    with advised(REPAIR_ADVICE):
        return list(read_part_table(location, columns).to_pylist())


def read_versioned(location: Location) -> tuple[pa.Table, str]:
    """Read the rows of a part and its version (see `Part.version`). Raises SegError as `read_rows` does."""
    table, found = _read_where_it_is(location, None)
    return table, found.entry.version if found.entry else version_of(table.schema.metadata)


def read_part_table(location: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the rows of a part as a table. A part that was compacted meanwhile is read from where it is now."""
    return _read_where_it_is(location, columns)[0]


def _read_where_it_is(location: Location, columns: Sequence[str] | None) -> tuple[pa.Table, Location]:
    """Read the rows of a part, and return where they were found."""
    try:
        return _read(location, columns), location
    except SegError:
        moved = None if stat(location.path) else _find_again(location)
        if moved is None:
            raise
    return _read(moved, columns), moved


def _read(location: Location, columns: Sequence[str] | None) -> pa.Table:
    if location.entry is None:
        return read_file(location.path, lambda file: read_table(file, TILES, columns))
    group = _read_group(location.path, location.group, None if columns is None else tuple(columns))
    return group.slice(location.first, location.entry.rows)


@lru_cache(maxsize=CACHED_GROUPS)
def _read_group(path: str, group: int, columns: tuple[str, ...] | None) -> pa.Table:
    """Read a row group of a compacted file, whose content never changes."""
    return _read_groups(path, [group], columns)


def _read_groups(path: str, groups: Sequence[int], columns: Sequence[str] | None) -> pa.Table:
    footer = _read_footer(path)
    return read_file(path, lambda file: read_table(file, TILES, columns, groups, footer))


@lru_cache(maxsize=CACHED_FOOTERS)
def _read_footer(path: str) -> pq.FileMetaData:
    """Read the footer of a compacted file, which takes longer than a row group."""
    return read_file(path, pq.read_metadata)


def _find_again(location: Location) -> Location | None:
    """Find a part whose file is gone."""
    run = posixpath.dirname(posixpath.dirname(location.path))
    key = location.entry.key if location.entry else _key(location.path)
    with SEARCH:  # one thread lists the run for all that miss a part
        found = _find_parts_at(run, int(time.monotonic() / REFRESH)).get(key)
        if found is not None and stat(found.path) is None:  # it went away after it had been listed
            _find_parts_at.cache_clear()
            found = _find_parts_at(run, int(time.monotonic() / REFRESH)).get(key)
    return found


@lru_cache(maxsize=2)
def _find_parts_at(run: str, _: int) -> dict[str, Location]:
    """Return the locations of a run at a moment, the compacted one of a part that has two."""
    index = index_parts(run)
    return dict(index.find()) | {key: location for file in index.compacted for key, location in file.locations()}


class Batch(NamedTuple):
    """Parts of one scene that are read together, as they lie in one row group; otherwise a single part."""

    parts: Sequence[Part]
    locations: Sequence[Location]  # of each part; empty for a part that is missing

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Read the rows of all parts, in their order."""
        with advised(REPAIR_ADVICE):
            return pa.concat_tables([read_part_table(location, columns) for location in self.locations])


def batch_parts(parts: Iterable[Part], there: Locations) -> list[Batch]:
    """Group parts into those that are best read together. A part that is missing forms a batch without locations."""
    groups: defaultdict[tuple[str, ...], list[Part]] = defaultdict(list)
    for part in parts:
        location = there.get(part.key)
        if location is None or location.entry is None:
            groups[part.key,].append(part)
        else:
            groups[location.path, str(location.group), part.scene.scene_id].append(part)
    return [Batch(group, [there[part.key] for part in group if part.key in there]) for group in groups.values()]


def map_live_tables(
    function: Callable[[pa.Table], T], index: PartIndex, columns: Sequence[str], skipped: Container[str] = ()
) -> Iterator[T]:
    """Call a function, in threads, with the rows of all parts as tables with these columns, and yield what it returns.

    Each row is in one of the tables. These are of a file or of some row groups. Files of parts whose keys are in
    `skipped` are not read.
    """

    def of_part(location: Location) -> T:
        return function(read_part_table(location, columns))

    def of_groups(chunk: tuple[CompactedFile, Sequence[int], Sequence[Location] | None]) -> T:
        return function(_read_live(*chunk, columns))

    dead, chunks = index.dead_parts(), []
    with advised(REPAIR_ADVICE):
        for file in index.compacted:
            located = list(file.locations())  # refuses a list of parts that does not fit
            for first in range(0, len(file.group_rows), GROUPS_AT_ONCE):
                groups, live = range(len(file.group_rows))[first : first + GROUPS_AT_ONCE], None
                if gone := dead.get(file.name):
                    live = [place for key, place in located if place.group in groups and key not in gone]
                if live != []:
                    chunks.append((file, groups, live))
        yield from for_each(of_part, (location for key, location in index.own.items() if key not in skipped))
        yield from for_each(of_groups, chunks, count_cpus())


def _read_live(
    file: CompactedFile, groups: Sequence[int], live: Sequence[Location] | None, columns: Sequence[str]
) -> pa.Table:
    """Read row groups that follow each other, and of them only some parts, unless `live` is None.

    If the file was merged into another one meanwhile, the parts are read one by one from where they are now.
    """
    try:
        table = _read_groups(file.path, groups, columns)
    except SegError:
        if stat(file.path):
            raise
        if live is None:
            live = [place for _, place in file.locations() if place.group in groups]
        return pa.concat_tables([read_part_table(place, columns) for place in live])
    if live is None:
        return table
    starts = dict(zip(groups, accumulate([0, *(file.group_rows[group] for group in groups)]), strict=False))
    pieces = [table.slice(starts[each.group] + each.first, each.entry.rows) for each in live if each.entry]
    return pa.concat_tables([table.slice(0, 0), *pieces])
