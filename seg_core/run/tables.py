"""Write and read the tables of a run, which are the only truth about it.

RUN/scenes/scenes.parquet      one row per scene
RUN/tiles/part-<key>.parquet   one row per planned tile (GeoParquet 1.1), one file per part
"""

import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import Dataset, Fragment, dataset

from seg_core.errors import CorruptFileError
from seg_core.imagery.scene import Scene
from seg_core.run.fence import PLAIN, Store
from seg_core.run.isolated import for_each_isolated
from seg_core.run.parquet import advised, named_columns, read_file, read_table
from seg_core.run.rows import Row
from seg_core.run.schema import GEO, SCENES, SPLIT, TILES, check_columns
from seg_core.storage.files import filesystem, published, stat
from seg_core.threads import NUM_FILE_THREADS, for_each

VERSION = b"scene_version"  # key in the metadata of a part's file
REWRITE_ADVICE = "the seg segment command of the run rewrites it"
REPAIR_ADVICE = f": seg repair removes it, and {REWRITE_ADVICE}"


def part_path(run: str, key: str) -> str:
    """Return the path of a part's file."""
    return f"{run}/tiles/part-{key}.parquet"


def write_part(run: str, key: str, rows: Iterable[Row], model: str, version: str, store: Store = PLAIN) -> None:
    """Publish the rows of a part, sorted by tile. The same rows give the same bytes.

    `model` is the bundle's hash. `version` is the part's (see `Part.version`), and goes into the file's metadata.
    """
    ordered = sorted(rows, key=lambda row: (row["tile_row"], row["tile_col"]))
    schema = TILES.with_metadata({b"geo": json.dumps(_geo(ordered)), VERSION: version})
    table = pa.Table.from_pylist([{"model": model, **row} for row in ordered], schema)
    store.publish(part_path(run, key), _parquet(table))


def _geo(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the GeoParquet metadata for rows. Tiles across the antimeridian have two polygons."""
    boxes = [row["bbox"] for row in rows if row["bbox"]]
    if not any(box["xmin"] > box["xmax"] for box in boxes):
        return GEO
    return {**GEO, "columns": {"geometry": SPLIT}}


State = tuple[bool, str] | None  # whether all tiles of a part are done, and its version; None if it is damaged


def read_states(paths: Sequence[str]) -> dict[str, State]:
    """Return the state of each part by its path. This reads only the footers of the files.

    Raises SegError if the store is unavailable, or if a newer version of this program wrote a file.
    """
    return dict(zip(paths, for_each_isolated(_read_state, lambda _: None, paths, NUM_FILE_THREADS), strict=True))


def _read_state(path: str) -> State:
    try:
        return read_file(path, _state_of)
    except CorruptFileError:
        return None


def _state_of(file: Any) -> State:
    """Read the state from the footer: the greatest status of a part without failed tiles is `done`."""
    footer = pq.read_metadata(file)
    check_columns(footer.schema.to_arrow_schema(), TILES)
    index = footer.schema.names.index("status")
    groups = [footer.row_group(i).column(index).statistics for i in range(footer.num_row_groups)]
    return all(group is not None and group.max == "done" for group in groups), _version(footer.metadata)


def crashes_its_reader(path: str) -> CorruptFileError:
    """Return the error for a part that crashes the process that reads it."""
    return CorruptFileError(f"{posixpath.basename(path)}: can't be read: it crashes the process that reads it")


def write_scenes(run: str, scenes: Sequence[Scene], store: Store = PLAIN) -> None:
    """Publish the scenes table."""
    store.publish(
        scenes_path(run), _parquet(pa.Table.from_pylist([scene.to_plain() for scene in scenes], schema=SCENES))
    )


def _parquet(table: pa.Table) -> bytes:
    stream = pa.BufferOutputStream()  # Arrow writes to it without taking the interpreter's lock
    pq.write_table(table, stream, compression="zstd")
    content: bytes = stream.getvalue().to_pybytes()
    return content


def scenes_path(run: str) -> str:
    """Return the path of the scenes table."""
    return f"{run}/scenes/scenes.parquet"


def read_scenes(run: str) -> list[Scene]:
    """Read the scenes of a run, as they were planned.

    Raises CorruptFileError if the file is missing or damaged. Raises SegError if the store is unavailable, or if a
    newer version of this program wrote the file.
    """
    path = scenes_path(run)
    if stat(path) is None:
        raise CorruptFileError(f"{path}: can't be read: no such file: {REWRITE_ADVICE}")
    try:
        return read_file(path, _scenes_of)
    except CorruptFileError as error:
        raise CorruptFileError(f"{posixpath.dirname(path)}/{error}: {REWRITE_ADVICE}") from error


def _scenes_of(file: Any) -> list[Scene]:
    return [Scene.from_plain(row) for row in read_table(file, SCENES).to_pylist()]


def read_part(path: str, columns: Sequence[str] | None = None) -> list[Row]:
    """Read the rows of a part, with all columns or these ones. Columns that an older version did not write are null.

    Raises CorruptFileError if the file is damaged. Raises SegError if the store is unavailable, or if a newer version
    of this program wrote the file.
    """
    with advised(REPAIR_ADVICE):
        return read_file(path, lambda file: list(read_table(file, TILES, columns).to_pylist()))


def read_versioned(path: str) -> tuple[list[Row], str]:
    """Read the rows of a part and its version (see `Part.version`). Raises SegError as `read_part` does."""

    def parse(file: Any) -> tuple[list[Row], str]:
        table = read_table(file, TILES)
        return list(table.to_pylist()), _version(table.schema.metadata)

    return read_file(path, parse)


def _version(metadata: Mapping[bytes, bytes] | None) -> str:
    return (metadata or {}).get(VERSION, b"").decode()


def open_tiles(run: str, paths: Sequence[str]) -> Dataset:
    """Open the rows of parts as a dataset, which reads them when they are needed.

    Raises SegError as `read_part` does if the columns are wrong, and Arrow's errors if a file can't be read.
    """
    uris = {filesystem(path)[1]: path for path in paths}  # by path in the file system
    rows = dataset(list(uris), schema=TILES, filesystem=filesystem(run)[0])

    def check(fragment: Fragment) -> None:
        with named_columns(uris[fragment.path]):
            check_columns(fragment.physical_schema, TILES)

    # The dataset keeps the footers that this reads, and does not read them again.
    with advised(REPAIR_ADVICE):
        for _ in for_each(check, rows.get_fragments()):
            pass
    return rows


def open_scenes(run: str) -> Dataset:
    """Open the scenes table of a run as a dataset. Raises the errors of `open_tiles`."""
    system, path = filesystem(scenes_path(run))
    rows = dataset(path, schema=SCENES, filesystem=system)
    with named_columns(scenes_path(run)):
        check_columns(next(iter(rows.get_fragments())).physical_schema, SCENES)
    return rows


def published_parts(run: str) -> list[str]:
    """Return the paths of the published parts of a run, sorted by name."""
    return published(f"{run}/tiles", ".parquet")
