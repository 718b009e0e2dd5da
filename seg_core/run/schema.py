"""The columns of a run's tables, and what is read of files that an older or a newer version wrote.

A column that comes later must be nullable. Files that were written before it are read with nulls in it, for which it is
enough to add it below. A file with a column that is not known here was written by a newer version. It is no damage.

A new figure of a tile passes through `Segmenter`, `chips.WindowFigures` and `rows.measure`. It also belongs in
`check.FIGURES`, and in the table of `seg_core/run/README.md`.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Column(NamedTuple):
    """A column of a table."""

    name: str
    type: pa.DataType
    description: str
    nullable: bool = True


TILE_COLUMNS = (
    Column("status", pa.string(), "done, or failed", nullable=False),
    Column("error_class", pa.string(), "why the tile failed: ReadError, StoreUnavailableError, Crash, ..."),
    Column("error", pa.string(), "the message"),
    Column("attempts", pa.int32(), "how often the tile was tried, if it failed"),
    Column("scene_id", pa.string(), "path of the scene below the common folder of the region", nullable=False),
    Column("tile_row", pa.int32(), "number of the tile from the top of the scene, from 0", nullable=False),
    Column("tile_col", pa.int32(), "number of the tile from the left, from 0", nullable=False),
    Column("row_off", pa.int32(), "px from the top of the scene to the tile", nullable=False),
    Column("col_off", pa.int32(), "px from the left of the scene to the tile", nullable=False),
    Column("height", pa.int32(), "px", nullable=False),
    Column("width", pa.int32(), "px", nullable=False),
    Column("valid_px", pa.int64(), "pixels that hold data"),
    Column("building_px", pa.int64(), "pixels of the class that the model finds"),
    Column("coverage", pa.float64(), "building_px / valid_px; null where nothing is valid"),
    Column("area_m2", pa.float64(), "m2: geodesic ground area of the valid pixels; null without a CRS"),
    Column("building_m2", pa.float64(), "m2: geodesic ground area of the building pixels; null without a CRS"),
    Column("mean_probability", pa.float64(), "mean over the valid pixels, 0 to 1"),
    Column("mask", pa.binary(), "1-bit PNG of the building pixels; null where there are none"),
    Column(
        "valid",
        pa.binary(),
        "1-bit PNG of the pixels that hold data; null where all or none do, and in runs of older versions",
    ),
    # The mask is made before rounding: at a threshold of 0.5 it is where this is 128 or more.
    Column(
        "probability",
        pa.binary(),
        "8-bit PNG, if the run keeps it: the probability in 255ths, rounded; 0 where a pixel is not valid",
    ),
    Column("model", pa.string(), "hash of the bundle", nullable=False),
    Column("geometry", pa.binary(), "outline of the tile, WKB polygon in degrees of longitude and latitude"),
    Column("bbox", BBOX, "bounds of the tile in degrees; xmin exceeds xmax across the antimeridian"),
)

# Null where the file says nothing unusual, as in runs from before there were these columns: those from alpha on.
SCENE_COLUMNS = (
    Column("scene_id", pa.string(), "path of the scene below the common folder of the region", nullable=False),
    Column("uri", pa.string(), "where the file was when the run was planned", nullable=False),
    Column("size", pa.int64(), "bytes of the file", nullable=False),
    Column("version", pa.string(), "etag, or size and time of the last change in ns", nullable=False),
    Column("height", pa.int32(), "px", nullable=False),
    Column("width", pa.int32(), "px", nullable=False),
    Column("bands", pa.list_(pa.int32()), "bands that are read, numbered from 1", nullable=False),
    Column("dtype", pa.string(), "type of the pixels of the file", nullable=False),
    Column("nodata", pa.float64(), "value of pixels that hold no data"),
    Column("masked", pa.bool_(), "whether an alpha band or a mask says which pixels hold data", nullable=False),
    Column("crs", pa.string(), "coordinate reference system"),
    Column("transform", pa.list_(pa.float64()), "a, b, c, d, e, f of the affine transform to the CRS", nullable=False),
    Column("gsd_m", pa.float64(), "m a pixel measures on the ground, as it is segmented"),
    Column("source_gsd_m", pa.float64(), "m a pixel of the file measures; differs from gsd_m if it is resampled"),
    Column("alpha", pa.int32(), "number of the alpha band that --alpha named; 0: none"),
    Column("nodata_color", pa.list_(pa.float64()), "nodata value of each band of the file, if they differ"),
    Column("inverted", pa.bool_(), "whether 0 is white"),
    Column("premultiplied", pa.bool_(), "whether colours are multiplied by the alpha band"),
    Column("bits", pa.int32(), "bits of a value, if fewer than its type holds"),
    Column("normalize_mean", pa.list_(pa.float64()), "grey levels: mean of each band, if scenes have their own"),
    Column("normalize_std", pa.list_(pa.float64()), "grey levels: deviation of each band, if scenes have their own"),
    Column("sidecars", pa.list_(pa.string()), "files beside a remote image that belong to it"),
    Column("captured", pa.timestamp("ms"), "when it was taken, if known: UTC from STAC, else the camera's time"),
    Column("gdal_version", pa.string(), "GDAL's version when the run was planned"),
    Column("decoder_version", pa.string(), "what decodes JPEG in GDAL's place, with its version; null: GDAL does"),
)


def _schema(columns: Sequence[Column], metadata: dict[str, str] | None = None) -> pa.Schema:
    return pa.schema([pa.field(each.name, each.type, each.nullable) for each in columns], metadata=metadata)


GEO_METADATA = {"geo": json.dumps(GEO)}
TILES, SCENES = _schema(TILE_COLUMNS, GEO_METADATA), _schema(SCENE_COLUMNS)


def describe_columns() -> list[dict[str, str]]:
    """Return a row for each column of the tables that SQL can name: table, column, type, description."""
    return [
        {"table": table, "column": each.name, "type": str(each.type), "description": each.description}
        for table, columns in (("tiles, failures", TILE_COLUMNS), ("scenes", SCENE_COLUMNS))
        for each in columns
    ]


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
