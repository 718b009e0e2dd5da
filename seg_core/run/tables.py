"""The tables of a run: schema, write, read. What is in them is the truth about the run.

RUN/scenes/scenes.parquet      one row a scene
RUN/tiles/part-<key>.parquet   one row a planned tile (GeoParquet 1.1), one file a part
"""

import json
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from seg_core.errors import CorruptFileError, SegError
from seg_core.imagery.scene import LATER, Scene
from seg_core.run.fence import PLAIN, Store
from seg_core.run.isolated import for_each_isolated
from seg_core.run.rows import Row
from seg_core.storage.files import filesystem, published, read_bytes, stat
from seg_core.threads import READERS

T = TypeVar("T")

VERSION = b"scene_version"  # of a part's metadata
REWRITE_ADVICE = "the seg segment command of the run rewrites it"
REPAIR_ADVICE = f": seg repair removes it, and {REWRITE_ADVICE}"
BBOX = pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])

# https://geoparquet.org/releases/v1.1.0/ ; without a "crs" the coordinates are OGC:CRS84, which is what they are.
GEO: dict[str, Any] = {
    "version": "1.1.0",
    "primary_column": "geometry",
    "columns": {
        "geometry": {
            "encoding": "WKB",
            "geometry_types": ["Polygon"],
            "orientation": "counterclockwise",
            "covering": {"bbox": {side: ["bbox", side] for side in ("xmin", "ymin", "xmax", "ymax")}},
        }
    },
}

# The column where some tiles have two polygons, as those across the antimeridian.
SPLIT = {**GEO["columns"]["geometry"], "geometry_types": ["MultiPolygon", "Polygon"]}

TILES = pa.schema(
    [
        pa.field("status", pa.string(), nullable=False),  # done, or failed
        pa.field("error_class", pa.string()),  # why it failed: ReadError, StoreUnavailableError, Crash, ...
        pa.field("error", pa.string()),  # the message
        pa.field("attempts", pa.int32()),
        pa.field("scene_id", pa.string(), nullable=False),
        pa.field("tile_row", pa.int32(), nullable=False),
        pa.field("tile_col", pa.int32(), nullable=False),
        pa.field("row_off", pa.int32(), nullable=False),  # px from the scene's top
        pa.field("col_off", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("valid_px", pa.int64()),
        pa.field("building_px", pa.int64()),
        pa.field("coverage", pa.float64()),  # building_px / valid_px, null where nothing is valid
        pa.field("area_m2", pa.float64()),  # geodesic, of the valid pixels; null without a CRS
        pa.field("building_m2", pa.float64()),
        pa.field("mean_probability", pa.float64()),  # over valid pixels
        pa.field("mask", pa.binary()),  # 1-bit PNG; null where there is no building
        # 8-bit PNG, where asked for: the probability in 255ths, rounded, and 0 where a pixel is not valid. The mask is
        # made before rounding: at a threshold of 0.5 it is where this is 128 or more.
        pa.field("probability", pa.binary()),
        pa.field("model", pa.string(), nullable=False),  # the bundle's hash
        pa.field("geometry", pa.binary()),  # WKB polygon, lon/lat
        pa.field("bbox", BBOX),
    ],
    metadata={"geo": json.dumps(GEO)},
)

SCENES = pa.schema(
    [
        pa.field("scene_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),  # bytes
        pa.field("version", pa.string(), nullable=False),  # etag, or size and time of the last change in ns
        pa.field("height", pa.int32(), nullable=False),  # px
        pa.field("width", pa.int32(), nullable=False),
        pa.field("bands", pa.list_(pa.int32()), nullable=False),  # as read, numbered from 1
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("nodata", pa.float64()),
        pa.field("masked", pa.bool_(), nullable=False),  # by an alpha band or mask of the file
        pa.field("crs", pa.string()),
        pa.field("transform", pa.list_(pa.float64()), nullable=False),  # a, b, c, d, e, f
        pa.field("gsd_m", pa.float64()),
        pa.field("source_gsd_m", pa.float64()),  # differs from gsd_m where the scene is resampled
        # Null where the file says nothing unusual, as in runs from before there were these columns:
        pa.field("alpha", pa.int32()),  # the alpha band that --alpha named; 0: none
        pa.field("nodata_color", pa.list_(pa.float64())),  # the nodata value of each band of the file, if they differ
        pa.field("inverted", pa.bool_()),  # 0 is white
        pa.field("premultiplied", pa.bool_()),  # its colours by its alpha band
        pa.field("bits", pa.int32()),  # of a value, where they are fewer than its dtype holds
        pa.field("sidecars", pa.list_(pa.string())),  # files beside a remote image that belong to it
    ]
)


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

    It costs the footer, and the statistics of the status column in it. Raises SegError where one can't be read.
    """
    return dict(zip(paths, for_each_isolated(_read_state, lambda _: None, paths, READERS), strict=True))


def _read_state(path: str) -> State:
    try:
        return _read(path, _state_of)
    except CorruptFileError:
        return None


def _state_of(file: Any) -> State:
    footer = pq.read_metadata(file)
    if not footer.schema.to_arrow_schema().equals(TILES):
        return None
    index = TILES.names.index("status")
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

    Raises CorruptFileError where the file is missing or is not such a table, SegError where it can't be read.
    """
    path = scenes_path(run)
    if stat(path) is None:
        raise CorruptFileError(f"{path}: can't be read: no such file: {REWRITE_ADVICE}")
    try:
        return _read(path, _scenes_of)
    except CorruptFileError as error:
        raise CorruptFileError(f"{posixpath.dirname(path)}/{error}: {REWRITE_ADVICE}") from error


def _scenes_of(file: Any) -> list[Scene]:
    table = pq.ParquetFile(file).read()
    older = pa.schema([each for each in SCENES if each.name in table.schema.names or each.name not in LATER])
    if not table.schema.equals(older):
        raise _OtherColumnsError("its columns are not those of a scenes table")
    return [Scene.from_plain(row) for row in table.to_pylist()]


def read_part(path: str, columns: Sequence[str] | None = None) -> list[Row]:
    """The rows of a part. Raises SegError where the file can't be read, CorruptFileError where it is no such table."""
    try:
        return _read(path, lambda file: list(_read_table(file, columns).to_pylist()))
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}{REPAIR_ADVICE}") from error


def read_versioned(path: str) -> tuple[list[Row], str]:
    """The rows of a part, and the version of the scene that they are of; raises SegError as `read_part` does."""

    def parse(file: Any) -> tuple[list[Row], str]:
        table = _read_table(file, None)
        return list(table.to_pylist()), _version(table.schema.metadata)

    return _read(path, parse)


def _version(metadata: Mapping[bytes, bytes] | None) -> str:
    return (metadata or {}).get(VERSION, b"").decode()


def _read_table(file: Any, columns: Sequence[str] | None) -> pa.Table:
    table = pq.ParquetFile(file).read(columns=list(columns) if columns else None)
    if columns is None and not table.schema.equals(TILES):
        raise _OtherColumnsError("its columns are not those of a tiles table")
    return table


class _OtherColumnsError(Exception):
    """A table does not have the columns that it should have."""


def _read(path: str, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of a Parquet file. Raises CorruptFileError where it can't, SegError where it is not read.

    Arrow has the same errors for both: so where it fails all of the file is fetched, and parsed again.
    """
    system, inside = filesystem(path)
    try:
        with system.open_input_file(inside) as file:
            return parse(file)
    except pa.ArrowMemoryError as error:
        raise SegError(f"{path}: can't be read: there is too little memory") from error
    except UNREADABLE:
        content = read_bytes(path)
    name = posixpath.basename(path)
    if content is None:
        raise SegError(f"{path}: can't be read: no such file")
    try:
        return parse(pa.BufferReader(content))
    except _OtherColumnsError as error:
        raise CorruptFileError(f"{name}: {error}") from error
    except UNREADABLE as error:
        raise CorruptFileError(f"{name}: can't be read: {' '.join(str(error).split())}") from error


# Text that is not UTF-8 is a ValueError.
UNREADABLE = (OSError, ValueError, pa.ArrowException, _OtherColumnsError)


def published_parts(run: str) -> list[str]:
    """Paths of the part files of a run, by name."""
    return published(f"{run}/tiles", ".parquet")
