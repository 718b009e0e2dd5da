"""Read the rows of parts from where they are, also if `seg compact` moves them meanwhile."""

import posixpath
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from threading import Lock
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from seg_core.errors import SegError
from seg_core.run import tables
from seg_core.run.parquet import advised, read_file, read_table
from seg_core.run.parts import CompactedFile, Location, Locations, PartIndex, index_parts
from seg_core.run.plan import Part
from seg_core.run.rows import Row
from seg_core.run.schema import TILES
from seg_core.run.tables import REPAIR_ADVICE, State, version_of
from seg_core.storage.files import stat
from seg_core.threads import count_cpus, for_each

T = TypeVar("T")

REFRESH = 5.0  # s; after it, a part that is not where it was is looked for again
SEARCH = Lock()
CACHED_GROUPS = 16  # row groups of compacted files that are in memory; they measure some 8 MB with their masks
GROUPS_AT_ONCE = 16  # row groups in a table of columns without masks: many small tables take longer
CACHED_FOOTERS = 16  # of compacted files; they measure some 10 MB


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
    with SEARCH:  # one thread lists the run for all that miss a part
        found = _find_parts_at(run, int(time.monotonic() / REFRESH)).get(location.key)
        if found is not None and stat(found.path) is None:  # it went away after it had been listed
            _find_parts_at.cache_clear()
            found = _find_parts_at(run, int(time.monotonic() / REFRESH)).get(location.key)
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
