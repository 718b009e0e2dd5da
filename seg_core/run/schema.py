"""The columns of a run's tables, and what is read of files that an older or a newer version wrote.

A column that comes later must be nullable. Files that were written before it are read with nulls in it, for which it is
enough to add it below. A file with a column that is not known here was written by a newer version. It is no damage.

A new figure of a tile passes through `Segmenter`, `chips.WindowFigures` and `rows.measure`. It also belongs in
`verify.FIGURES`, and in the table of `seg_core/run/README.md`.
"""

import json
from typing import Any

import pyarrow as pa

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
        # 1-bit PNG of the pixels that hold data; null where all or none do, and in runs that began before this column
        pa.field("valid", pa.binary()),
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
        pa.field("normalize_mean", pa.list_(pa.float64())),  # of each band, if each scene is normalized by its own
        pa.field("normalize_std", pa.list_(pa.float64())),
        pa.field("sidecars", pa.list_(pa.string())),  # files beside a remote image that belong to it
    ]
)


class ColumnsError(Exception):
    """A file has not the columns of its table: it is damaged, or no such table."""


class UnknownColumnError(Exception):
    """A file has all that its table must have, and a column that only a newer version knows: its name."""


def check_columns(found: pa.Schema, expected: pa.Schema) -> None:
    """Compare the columns of a file with those of its table, by name and type. Their order does not matter.

    A nullable one may be missing. Raises ColumnsError or UnknownColumnError.
    """
    names = found.names
    if len(set(names)) < len(names):
        raise ColumnsError("has two columns of one name")
    if missing := [each.name for each in expected if not each.nullable and each.name not in names]:
        raise ColumnsError(f"has no column {missing[0]}")
    if unknown := [name for name in names if name not in expected.names]:
        raise UnknownColumnError(unknown[0])
    for each in found:
        wanted = expected.field(each.name).type
        if each.type != wanted:
            raise ColumnsError(f"its column {each.name} is of type {each.type}, not {wanted}")


def with_columns(table: pa.Table, expected: pa.Schema) -> pa.Table:
    """The table with the expected columns in their order, null where it lacks one, and with its own metadata.

    Raises ColumnsError for a null where there must be none.
    """
    columns = []
    for each in expected:
        column = table[each.name] if each.name in table.schema.names else pa.nulls(table.num_rows, each.type)
        if column.null_count and not each.nullable:
            raise ColumnsError(f"its column {each.name} holds a null")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=expected.with_metadata(table.schema.metadata))
