"""Polygons of vector files: read once in batches, repaired and indexed, then read again near any window of a scene.

    labels.geojson ──batches──▶ polygons near a scene, repaired ──▶ temporary FlatGeobuf ──bbox──▶ one window's polygons

The temporary file has a spatial index, which most of the formats lack, so that memory depends on the window, and not on
the size of the file.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pyogrio
import shapely
from numpy.typing import NDArray
from pyogrio.errors import DataLayerError, DataSourceError
from pyproj import CRS
from pyproj.exceptions import CRSError

from seg_core.errors import SegError
from seg_core.grid import Window
from seg_core.imagery.area_projection import Bounds, Geometries, boxes_near, project_areas
from seg_core.imagery.georef import pixel_at
from seg_core.imagery.scene import Scene
from seg_core.imagery.vector_formats import PARQUET, check_format

BATCH = 16384  # features that are read at once
POLYGONAL = (shapely.GeometryType.POLYGON, shapely.GeometryType.MULTIPOLYGON)
KINDS = {
    shapely.GeometryType.POINT: "points",
    shapely.GeometryType.MULTIPOINT: "points",
    shapely.GeometryType.LINESTRING: "lines",
    shapely.GeometryType.LINEARRING: "lines",
    shapely.GeometryType.MULTILINESTRING: "lines",
}
INDEX_SCHEMA = pa.schema(
    [
        pa.field("geometry", pa.binary(), metadata={"ARROW:extension:name": "geoarrow.wkb"}),
        pa.field("value", pa.int32()),
    ]
)


@dataclass
class Tally:
    """What was read of a file near the scenes."""

    read: int = 0  # features
    repaired: int = 0  # polygons that were invalid
    dropped: Counter[str] = field(default_factory=Counter)  # features that are no area, by kind
    numbers: dict[str | None, int] = field(default_factory=dict)  # of the values of a column, as they were found


@dataclass(frozen=True)
class Source:
    """A vector file that has been checked."""

    path: str
    driver: str
    layer: str  # empty for Parquet
    crs: CRS
    columns: tuple[str, ...]  # names of attributes
    geometry: str = ""  # name of the geometry column, for Parquet
    bbox: tuple[tuple[str, ...], ...] = ()  # of Parquet: columns of xmin, ymin, xmax, ymax; empty if it has none

    @property
    def gdal_name(self) -> str:
        """The file as GDAL is to open it: with a driver that reads that alone."""
        return gdal_name(self.path, self.driver)

    @property
    def is_indexed(self) -> bool:
        """Whether what lies far from the scenes needn't be read; nor is what lies nowhere, because it is empty."""
        return self.driver in {"GPKG", "FlatGeobuf"} or bool(self.bbox)


def gdal_name(path: str, driver: str) -> str:
    """Return what GDAL is to open so that it reads a file with this driver alone."""
    return f"GeoJSON:{path}" if driver == "GeoJSON" else path


@dataclass(frozen=True)
class PolygonIndex:
    """Polygons near the scenes, repaired, in an indexed file."""

    path: str
    crs: CRS
    tally: Tally

    def near(self, scene: Scene, window: Window) -> tuple[Geometries, NDArray[np.int32]]:
        """Return the polygons near a window of a scene, in pixels of the window, and the number of each one's value.

        x is the column and y the row, counted from the window's corner. The scene must have a CRS.
        """
        boxes = boxes_near(scene, window, self.crs) if self.tally.numbers else []  # otherwise there is no file
        if not boxes:
            return np.empty(0, object), np.empty(0, np.int32)
        frames = [geopandas.read_file(self.path, bbox=box, engine="pyogrio") for box in boxes]
        # Not in the CRS that the file names: FlatGeobuf takes UTM in feet for UTM in metres.
        found = geopandas.GeoSeries(np.concatenate([frame.geometry for frame in frames]), crs=self.crs)
        polygons = project_areas(found, str(scene.crs), [scene])
        numbers = np.concatenate([frame["value"] for frame in frames]).astype(np.int32)
        there = ~shapely.is_empty(polygons)
        return _to_pixels(polygons[there], scene, window), numbers[there]


def _to_pixels(geometries: Geometries, scene: Scene, window: Window) -> Geometries:
    def pixels(points: NDArray[np.float64]) -> NDArray[np.float64]:
        rows, cols = pixel_at(scene.transform, points[:, 0], points[:, 1])  # type: ignore[arg-type]
        return np.stack([cols - window.col_off, rows - window.row_off], axis=1)

    return np.asarray(shapely.transform(geometries, pixels), object)


def open_vectors(path: str) -> Source:
    """Check a vector file and read its header.

    Raises SegError for a file of another format, with several layers, or without a CRS.
    """
    driver = check_format(path)
    source = _open_parquet(path) if driver == PARQUET else _open_layer(path, driver)
    if source is None:
        raise SegError(
            f"{path}: has no CRS: say which one it is in (ogr2ogr -a_srs EPSG:CODE polygons.gpkg {quote(path)})"
        )
    return source


@contextmanager
def reading_errors(path: str) -> Iterator[None]:
    """Turn the errors of libraries that read vector files into SegError."""
    try:
        yield
    except (DataSourceError, DataLayerError, pa.ArrowException, OSError, CRSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SegError(f"{path}: can't be read: {lines[-1]}") from error
    except NotImplementedError as error:  # shapely knows no curves
        way_out = f"ogr2ogr polygons.gpkg {quote(path)} -nlt CONVERT_TO_LINEAR"
        raise SegError(f"{path}: has curved polygons: make them straight first ({way_out})") from error


def _open_layer(path: str, driver: str) -> Source | None:
    name = gdal_name(path, driver)
    with reading_errors(path):
        layers = [str(layer) for layer, kind in pyogrio.list_layers(name) if kind is not None]
        if len(layers) != 1:
            listed = ", ".join(layers) or "none"
            way_out = f"ogr2ogr polygons.gpkg {quote(path)} LAYER"
            raise SegError(f"{path}: needs one layer with geometries, it has {listed}: write one alone ({way_out})")
        info = pyogrio.read_info(name, layer=layers[0])
        if info["driver"] != driver:
            raise SegError(f"{path}: GDAL takes it for {info['driver']}, not {driver}, as its suffix says")
        if info["crs"] is None:
            return None
        return Source(path, driver, layers[0], CRS.from_user_input(info["crs"]), tuple(map(str, info["fields"])))


def _open_parquet(path: str) -> Source | None:
    with reading_errors(path):
        schema = pa.parquet.read_schema(path)
        described = json.loads((schema.metadata or {}).get(b"geo", b"{}"))
    column = described.get("primary_column")
    geometry = described.get("columns", {}).get(column)
    if geometry is None:
        raise SegError(f"{path}: this Parquet file is no GeoParquet: its metadata has no geo")
    if geometry.get("encoding") != "WKB":
        raise SegError(f"{path}: its geometries are encoded as {geometry.get('encoding')}, not as WKB: write it so")
    if "crs" in geometry and geometry["crs"] is None:
        return None
    with reading_errors(path):
        crs = CRS.from_user_input(geometry.get("crs", "OGC:CRS84"))
    covering = geometry.get("covering", {}).get("bbox", {})
    bbox = tuple(tuple(covering[side]) for side in ("xmin", "ymin", "xmax", "ymax")) if covering else ()
    return Source(path, PARQUET, "", crs, tuple(schema.names), geometry=column, bbox=bbox)


def index_polygons(source: Source, scenes: Sequence[Scene], folder: str, column: str | None = None) -> PolygonIndex:
    """Read the polygons of a file that lie near scenes, repair them, and write them to an indexed file in a folder.

    `column` names an attribute whose values are numbered as they are found; without it, all have the value "". What is
    no area is dropped and counted. Raises SegError if the file can't be read or lacks the column.
    """
    if column is not None and column not in source.columns:
        known = ", ".join(name for name in source.columns if name != source.geometry) or "none"
        raise SegError(f"--class-column {column}: {source.path} has no such attribute: it has {known}")
    boxes = [box for scene in scenes for box in boxes_near(scene, scene.window, source.crs)]
    path, tally = f"{folder}/{Path(source.path).stem}.fgb", Tally()
    batches = _clean(_batches(source, boxes, column), boxes, tally, source.is_indexed)
    first = next(batches, None)
    if first is not None:
        reader = pa.RecordBatchReader.from_batches(INDEX_SCHEMA, chain([first], batches))
        with reading_errors(source.path):
            options = {"driver": "FlatGeobuf", "geometry_name": "geometry", "geometry_type": "Unknown"}
            pyogrio.write_arrow(reader, path, crs=source.crs.to_wkt(), layer="polygons", **options)
    return PolygonIndex(path, source.crs, tally)


def _batches(source: Source, boxes: Sequence[Bounds], column: str | None) -> Iterator[tuple[Any, Any]]:
    """WKB of the geometries of a file that may lie in one of the boxes, and values of a column, in batches."""
    whole = shapely.MultiPolygon([shapely.box(*box) for box in boxes]).bounds if boxes else (0.0, 0.0, 0.0, 0.0)
    with reading_errors(source.path):
        if source.driver == PARQUET:
            yield from _parquet_batches(source, whole, column)
            return
        columns = [] if column is None else [column]
        options: dict[str, Any] = {
            "layer": source.layer,
            "columns": columns,
            "bbox": whole if source.is_indexed else None,
        }
        with pyogrio.open_arrow(source.gdal_name, batch_size=BATCH, use_pyarrow=True, **options) as (meta, reader):
            name = meta["geometry_name"] or "wkb_geometry"
            for batch in reader:
                yield batch[name], None if column is None else batch[column]


def _parquet_batches(source: Source, box: Bounds, column: str | None) -> Iterator[tuple[Any, Any]]:
    near = None
    if source.bbox:
        xmin, ymin, xmax, ymax = (pa.dataset.field(*names) for names in source.bbox)
        near = (xmin <= box[2]) & (ymin <= box[3]) & (xmax >= box[0]) & (ymax >= box[1])
    columns = [source.geometry, *([] if column is None else [column])]
    table = pa.dataset.dataset(source.path, format="parquet")
    for batch in table.to_batches(columns=columns, filter=near, batch_size=BATCH, batch_readahead=1):
        yield batch[source.geometry], None if column is None else batch[column]


def _clean(
    batches: Iterator[tuple[Any, Any]], boxes: Sequence[Bounds], tally: Tally, is_indexed: bool
) -> Iterator[pa.RecordBatch]:
    """Polygons that lie in one of the boxes, valid, with the numbers of their values; counts what it does."""
    tree = shapely.STRtree([shapely.box(*box) for box in boxes])
    for wkb, column in batches:
        geometries = shapely.from_wkb(np.asarray(wkb.to_numpy(zero_copy_only=False), object), on_invalid="ignore")
        near = np.unique(tree.query(shapely.envelope(geometries), predicate="intersects")[0])
        # Of an index without a hit GDAL 3.12 returns a batch without geometries.
        lost = 0 if is_indexed else int((shapely.is_missing(geometries) | shapely.is_empty(geometries)).sum())
        tally.read += len(near) + lost
        tally.dropped.update(empty=lost)
        areas = repair_polygons(geometries[near], tally)
        kept = np.flatnonzero(~shapely.is_missing(areas))
        numbers = [_number(None if column is None else column[int(near[at])].as_py(), column, tally) for at in kept]
        if len(kept):
            columns = [pa.array(shapely.to_wkb(areas[kept]), pa.binary()), pa.array(numbers, pa.int32())]
            yield pa.record_batch(columns, schema=INDEX_SCHEMA)


def _number(value: Any, column: Any, tally: Tally) -> int:
    """Return the number of a value, which is new if the value is. Blank text is no value."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # whole numbers are stored as floats where one is absent
    is_absent = value is None or value != value or not str(value).strip()  # noqa: PLR0124 - NaN
    text = "" if column is None else None if is_absent else str(value)
    return tally.numbers.setdefault(text, len(tally.numbers))


def repair_polygons(geometries: Geometries, tally: Tally) -> Geometries:
    """Return the area of each geometry as a valid polygon; None where it has none. Counts what is repaired or dropped.

    Where parts of a multipolygon overlap, the repaired one covers all of both (GEOS, method structure).
    """
    found = shapely.force_2d(geometries)
    kinds = shapely.get_type_id(found)
    no_area = np.isin(kinds, list(KINDS))
    tally.dropped.update(KINDS[kind] for kind in kinds[no_area])
    found[no_area] = None
    wrong = ~no_area & ~shapely.is_valid(found)
    repaired = shapely.make_valid(found[wrong], method="structure", keep_collapsed=False)
    found[wrong] = repaired
    for at in np.flatnonzero(~no_area & ~np.isin(shapely.get_type_id(found), POLYGONAL)):
        parts = shapely.get_parts(shapely.get_parts(found[at]))  # of a collection, which may hold multipolygons
        found[at] = shapely.union_all(parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON])
    flat = ~no_area & ~(shapely.area(found) > 0)
    tally.dropped.update({"without area": int(flat.sum())})
    found[flat] = None
    tally.repaired += int((wrong & ~flat).sum())
    return np.asarray(found, object)


def read_bounds(source: Source) -> Bounds:
    """Return the bounding box of all that a file holds, in its CRS. Raises SegError if it holds nothing."""
    found = _read_boxes(source)
    found = found[np.isfinite(found).all(axis=1)]
    if not len(found):
        raise SegError(f"{source.path}: holds no polygon")
    (left, bottom), (right, top) = found[:, :2].min(axis=0), found[:, 2:].max(axis=0)
    return float(left), float(bottom), float(right), float(top)


def _read_boxes(source: Source) -> NDArray[np.float64]:
    """Boxes of what a file holds, `(boxes, 4)`: of all of it, or of each batch. They are NaN where that is nothing."""
    with reading_errors(source.path):
        if source.driver == PARQUET:
            table = pa.dataset.dataset(source.path, format="parquet")
            batches = table.to_batches(columns=[source.geometry], batch_size=BATCH, batch_readahead=1)
            return np.array([_box_of(batch[0]) for batch in batches if len(batch)]).reshape(-1, 4)
        info = pyogrio.read_info(
            source.gdal_name, layer=source.layer, force_feature_count=True, force_total_bounds=True
        )
        box = info["total_bounds"] if info["features"] else None  # of an empty shapefile it is 0, 0, 0, 0
        return np.array([] if box is None else [box], np.float64).reshape(-1, 4)


def _box_of(wkb: pa.Array) -> NDArray[np.float64]:
    return np.asarray(shapely.total_bounds(shapely.from_wkb(wkb.to_numpy(zero_copy_only=False), on_invalid="ignore")))
