"""Merge the many small files that hold one part each into a few large ones, which are quicker to list and to query.

    part-a, part-b, part-c, ... ─▶ in the order of a Hilbert curve ─▶ compacted-1, compacted-2 ─▶ part-a, ... removed

What is true at each moment:

- A compacted file appears whole, and never changes.
- A file of a part is removed only after a compacted file with the same rows is there. Until then it counts, and the
  compacted file's rows of that part do not.
- Compacted files that are replaced are removed before the files of parts. So a part that is in compacted files alone
  has the same rows in all of them.

So a run is complete at each moment, whether this goes on, ends or is killed. The same command then finishes the work.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector

from seg_core.errors import CorruptFileError, SegError
from seg_core.imagery.georef import footprints
from seg_core.run.fence import Lease, Store
from seg_core.run.lease import acquire_lease
from seg_core.run.ledger import ledger_folder
from seg_core.run.parquet import advised
from seg_core.run.part_reading import read_versioned
from seg_core.run.parts import COMPACTED, PARTS, CompactedFile, Entry, Location, PartIndex, index_parts
from seg_core.run.plan import Part, Plan
from seg_core.run.schema import BBOX, GEO, SPLIT, TILES
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import REPAIR_ADVICE, SUFFIX, part_name
from seg_core.storage import files
from seg_core.storage.files import filesystem, sha256
from seg_core.threads import NUM_FILE_THREADS, prefetch

FILE_MB = 256  # about how large compacted files become
GROUP_ROWS = 4096  # rows of a row group, at most, unless a part has more
GROUP_BYTES = 8_000_000  # of a row group with its masks, at most, unless a part has more: what reading one part costs
SMALL = 0.5  # of the size wanted; a smaller compacted file is made part of a larger one
WITHOUT_STATISTICS = ("mask", "valid", "probability", "geometry")  # they would fill the footer
TABLE = TILES.remove_metadata()
LEAVES = [
    leaf
    for column in TABLE
    for leaf in ([f"bbox.{side.name}" for side in BBOX] if column.type == BBOX else [column.name])
]


class Compaction(NamedTuple):
    """What was done: files and bytes of tiles before and after."""

    parts: int
    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int


def compact_run(run: str, file_mb: int = FILE_MB, report: Callable[[str], None] = lambda _: None) -> Compaction:
    """Compact the files of a run. Others may read it meanwhile, but no driver may work on it.

    `report` is called with a text for each part. Memory is some three times `file_mb`. Raises SegError if a driver
    works on the run, and if a part is damaged or does not belong to the run.
    """
    plan = read_plan(run)
    with acquire_lease(run) as lease:
        index, before = index_parts(run), _list_sizes(run)
        chosen, replaced = _choose(index, plan, before, file_mb * 1_000_000)
        new = set()
        for done, path in _write_files(run, chosen, file_mb * 1_000_000, lease):
            new.add(path)
            report(f"{done} of {len(chosen)} parts")
        for file in replaced:
            if file.path not in new:
                lease.remove(file.path)
        for number, location in enumerate(index.own.values(), 1):
            lease.remove(location.path)
            report(f"{number} of {len(index.own)} files removed")
        for name, _ in list(files.list_files(ledger_folder(run))):  # it is about files that are no more
            lease.remove(f"{ledger_folder(run)}/{name}")
    after = _list_sizes(run)
    return Compaction(len(index.find()), len(before), len(after), sum(before.values()), sum(after.values()))


def remove_parts(index: PartIndex, keys: Collection[str], store: Store) -> None:
    """Remove parts of a run, so that they are made again. Compacted files are written again without them."""
    gone = set(keys)
    for file in index.compacted:
        if gone.isdisjoint(entry.key for entry in file.entries):
            continue
        rest = [(key, location) for key, location in file.locations() if key not in gone and key not in index.own]
        for _ in _write_files(index.run, rest, None, store):
            pass
        store.remove(file.path)
    for key in gone & index.own.keys():
        store.remove(index.own[key].path)


def _list_sizes(run: str) -> dict[str, int]:
    """Return the bytes of each file of tiles, by name."""
    system, folder = filesystem(f"{run}/tiles")
    found = system.get_file_info(FileSelector(folder, allow_not_found=True))
    return {file.base_name: file.size for file in found if file.is_file and file.base_name.endswith(SUFFIX)}


def _choose(
    index: PartIndex, plan: Plan, sizes: dict[str, int], file_bytes: int
) -> tuple[list[tuple[str, Location]], list[CompactedFile]]:
    """Return the parts to write, in the order of a Hilbert curve, and the compacted files that this replaces.

    These are all files of single parts, and compacted files that are small, or of whose parts some don't count.
    """
    parts = list(plan.parts())
    planned = {part.key for part in parts}
    unplanned = [location.path for key, location in index.find().items() if key not in planned]
    if strange := [*index.other, *unplanned]:
        raise SegError(
            f"{strange[0]}: holds what is not a part of this run: seg verify says more, seg repair removes it"
        )
    numbers = Counter(entry.key for file in index.compacted for entry in file.entries)
    small = [file for file in index.compacted if sizes.get(os.path.basename(file.path), 0) < SMALL * file_bytes]
    merged = small if index.own or len(small) > 1 else []
    replaced = [
        file
        for file in index.compacted
        if file in merged or any(entry.key in index.own or numbers[entry.key] > 1 for entry in file.entries)
    ]
    found = dict(index.own)
    for file in replaced:
        found = dict(file.locations()) | found
    order = _sort_by_hilbert_curve([part for part in parts if part.key in found])
    return [(part.key, found[part.key]) for part in order], replaced


def _sort_by_hilbert_curve(parts: Sequence[Part]) -> list[Part]:
    """Sort parts so that neighbours on the ground are near each other. Those without a CRS come last."""
    placed, others = [], []
    points = []
    for part in parts:
        outline = footprints(part.scene.crs, part.scene.transform, [part.window])[0] if part.scene.crs else None
        if outline is None:
            others.append(part)
        else:
            placed.append(part)
            points.append(outline.centroid)
    if not points:
        return others
    import geopandas  # here, because removing parts does without

    distances = geopandas.GeoSeries(points).hilbert_distance()
    return [*(placed[at] for at in np.argsort(distances.to_numpy(), kind="stable")), *others]


def _write_files(
    run: str, parts: Iterable[tuple[str, Location]], file_bytes: int | None, store: Store
) -> Iterator[tuple[int, str]]:
    """Write parts to compacted files in this order. Yields how many are written, and the path of each new file.

    Without `file_bytes`, all of them go to one file.
    """
    writer, done = _Writer(), 0
    with ThreadPoolExecutor(NUM_FILE_THREADS) as pool:
        for key, table in prefetch(pool, _read_part, parts, NUM_FILE_THREADS):
            writer.add(key, table)
            done += 1
            if file_bytes is not None and writer.size >= file_bytes:
                yield done, writer.publish(run, store)
                writer = _Writer()
    if writer.entries:
        yield done, writer.publish(run, store)


def _read_part(part: tuple[str, Location]) -> tuple[str, pa.Table]:
    key, location = part
    with advised(REPAIR_ADVICE):
        table, version = read_versioned(location)
    return key, table.replace_schema_metadata({b"version": version})


class _Writer:
    """Writes one compacted file to memory."""

    def __init__(self) -> None:
        self.stream = pa.BufferOutputStream()
        self.file = pq.ParquetWriter(
            self.stream,
            TABLE,
            compression="zstd",
            write_statistics=[leaf for leaf in LEAVES if leaf not in WITHOUT_STATISTICS],
            # With Arrow's schema in the file, readers would take the metadata of that, which lack "geo" (pyarrow 26).
            store_schema=False,
        )
        self.entries: list[Entry] = []
        self.waiting: list[pa.Table] = []  # for the next row group
        self.rows = self.bytes = 0  # of these
        self.is_split = False  # whether a tile crosses the antimeridian

    @property
    def size(self) -> int:
        """How many bytes have been written."""
        return int(self.stream.tell())

    def add(self, key: str, table: pa.Table) -> None:
        """Add the rows of a part, whose version is in the table's metadata."""
        if self.waiting and (self.rows + len(table) > GROUP_ROWS or self.bytes + table.nbytes > GROUP_BYTES):
            self._write_group()
        if not len(table):
            raise CorruptFileError(f"{part_name(key)}: has no rows{REPAIR_ADVICE}")
        all_done = bool(pc.all(pc.equal(table["status"], "done")).as_py())
        self.entries.append(Entry(key, table.schema.metadata[b"version"].decode(), len(table), all_done))
        self.waiting.append(table.replace_schema_metadata(None))
        self.rows, self.bytes = self.rows + len(table), self.bytes + table.nbytes
        sides = [pc.struct_field(table["bbox"], side) for side in ("xmin", "xmax")]
        self.is_split |= bool(pc.any(pc.greater(*sides)).as_py())

    def _write_group(self) -> None:
        self.file.write_table(pa.concat_tables(self.waiting), row_group_size=self.rows)
        self.waiting, self.rows, self.bytes = [], 0, 0

    def publish(self, run: str, store: Store) -> str:
        """Publish the file, and return its path."""
        self._write_group()
        geo = {**GEO, "columns": {"geometry": SPLIT}} if self.is_split else GEO
        self.file.add_key_value_metadata({"geo": json.dumps(geo), PARTS.decode(): json.dumps(self.entries)})
        self.file.close()
        content = self.stream.getvalue().to_pybytes()
        path = f"{run}/tiles/{COMPACTED}{sha256(content)[:16]}{SUFFIX}"
        store.publish(path, content)
        if isinstance(store, Lease) and store.is_lost():
            # In S3, a driver that was frozen on the point of writing has added a file beside those of its successor.
            files.remove(path)
            raise store.lost_error()
        return path
