"""The tables of a run, written and read. What is in them is the truth about the run.

RUN/scenes/scenes.parquet      one row a scene
RUN/tiles/part-<key>.parquet   one row a planned tile (GeoParquet 1.1), one file a part
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

VERSION = b"scene_version"  # of a part's metadata
REWRITE_ADVICE = "the seg segment command of the run rewrites it"
REPAIR_ADVICE = f": seg repair removes it, and {REWRITE_ADVICE}"


def part_path(run: str, key: str) -> str:
    """Where the rows of a part are, once published."""
    return f"{run}/tiles/part-{key}.parquet"


def write_part(run: str, key: str, rows: Iterable[Row], model: str, version: str, store: Store = PLAIN) -> None:
    """Publish the rows of a part, in the order of their tiles: the same rows give the same bytes.

    The version of the scene's file goes into the Parquet file's metadata.
    """
    ordered = sorted(rows, key=lambda row: (row["tile_row"], row["tile_col"]))
    schema = TILES.with_metadata({b"geo": json.dumps(_geo(ordered)), VERSION: version})
    table = pa.Table.from_pylist([{"model": model, **row} for row in ordered], schema)
    store.publish(part_path(run, key), _parquet(table))


def _geo(rows: Sequence[Row]) -> dict[str, Any]:
    """GEO for these rows: a tile across the antimeridian has two polygons."""
    boxes = [row["bbox"] for row in rows if row["bbox"]]
    if not any(box["xmin"] > box["xmax"] for box in boxes):
        return GEO
    return {**GEO, "columns": {"geometry": SPLIT}}


State = tuple[bool, str] | None


def read_states(paths: Sequence[str]) -> dict[str, State]:
    """Of each part, whether all of its tiles are done, and the version of the scene they are of; None where damaged.

    It costs the footer, and the statistics of the status column in it. Raises SegError where one can't be read or a
    newer version wrote it.
    """
    return dict(zip(paths, for_each_isolated(_read_state, lambda _: None, paths, NUM_FILE_THREADS), strict=True))


def _read_state(path: str) -> State:
    try:
        return read_file(path, _state_of)
    except CorruptFileError:
        return None


def _state_of(file: Any) -> State:
    footer = pq.read_metadata(file)
    check_columns(footer.schema.to_arrow_schema(), TILES)
    index = footer.schema.names.index("status")
    groups = [footer.row_group(i).column(index).statistics for i in range(footer.num_row_groups)]
    return all(group is not None and group.max == "done" for group in groups), _version(footer.metadata)


def crashes_its_reader(path: str) -> CorruptFileError:
    """The error for a part that crashes the process that reads it."""
    return CorruptFileError(f"{posixpath.basename(path)}: can't be read: it crashes the process that reads it")


def write_scenes(run: str, scenes: Sequence[Scene], store: Store = PLAIN) -> None:
    """Publish the scenes table."""
    store.publish(
        scenes_path(run), _parquet(pa.Table.from_pylist([scene.to_plain() for scene in scenes], schema=SCENES))
    )


def _parquet(table: pa.Table) -> bytes:
    stream = pa.BufferOutputStream()  # of Arrow's own: it need not ask for the interpreter
    pq.write_table(table, stream, compression="zstd")
    content: bytes = stream.getvalue().to_pybytes()
    return content


def scenes_path(run: str) -> str:
    """Where the scenes table is."""
    return f"{run}/scenes/scenes.parquet"


def read_scenes(run: str) -> list[Scene]:
    """The scenes of a run, as they were planned.

    Raises CorruptFileError where the file is missing or is no such table, SegError where it can't be read or a newer
    version wrote it.
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
    """The rows of a part, with all columns, or those of these names: null where an older version did not write one.

    Raises CorruptFileError where the file is no such table, SegError where it can't be read, or a newer version wrote
    it.
    """
    with advised(REPAIR_ADVICE):
        return read_file(path, lambda file: list(read_table(file, TILES, columns).to_pylist()))


def read_versioned(path: str) -> tuple[list[Row], str]:
    """The rows of a part, and the version of the scene that they are of; raises SegError as `read_part` does."""

    def parse(file: Any) -> tuple[list[Row], str]:
        table = read_table(file, TILES)
        return list(table.to_pylist()), _version(table.schema.metadata)

    return read_file(path, parse)


def _version(metadata: Mapping[bytes, bytes] | None) -> str:
    return (metadata or {}).get(VERSION, b"").decode()


def open_tiles(run: str, paths: Sequence[str]) -> Dataset:
    """The rows of parts of a run, read when they are asked for.

    Raises SegError as `read_part` does for other columns, and Arrow's errors where a file can't be read.
    """
    inside = {filesystem(path)[1]: path for path in paths}
    rows = dataset(list(inside), schema=TILES, filesystem=filesystem(run)[0])

    def check(fragment: Fragment) -> None:
        with named_columns(inside[fragment.path]):
            check_columns(fragment.physical_schema, TILES)

    # What this reads of each file, its footer, is kept by the dataset, which would read it later.
    with advised(REPAIR_ADVICE):
        for _ in for_each(check, rows.get_fragments()):
            pass
    return rows


def open_scenes(run: str) -> Dataset:
    """The scenes table of a run, read when it is asked for. Raises as `open_tiles` does."""
    system, inside = filesystem(scenes_path(run))
    rows = dataset(inside, schema=SCENES, filesystem=system)
    with named_columns(scenes_path(run)):
        check_columns(next(iter(rows.get_fragments())).physical_schema, SCENES)
    return rows


def published_parts(run: str) -> list[str]:
    """Paths of the part files of a run, by name."""
    return published(f"{run}/tiles", ".parquet")
