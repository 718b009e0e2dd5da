"""Write the buildings of a run as polygons to a file for a GIS.

    parts ─▶ buildings and pieces ─▶ pieces joined, image by image ─▶ table ─▶ sorted on disk ─▶ file

Memory depends on a part and on what reaches its sides, not on the region. Sorting takes up to SORT_MEMORY.
"""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from itertools import groupby
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyogrio import read_info, write_arrow, write_dataframe
from pyogrio.errors import DataLayerError, DataSourceError
from pyproj import CRS

from seg_core.errors import SegError
from seg_core.footprints.merge import OpenRow, join_row
from seg_core.footprints.pieces import Pieces, find_buildings
from seg_core.footprints.shape import Shape, make_shape
from seg_core.footprints.table import FOOTPRINTS, ground_transform, make_table
from seg_core.imagery.area_projection import LONLAT, Bounds, transformed_bounds
from seg_core.imagery.georef import position
from seg_core.imagery.qgis_style import style_path, write_vector_style
from seg_core.imagery.scene import Scene
from seg_core.run.parts import Location, find_parts
from seg_core.run.plan import Part, Plan
from seg_core.run.schema import GEO
from seg_core.run.stored_plan import read_plan
from seg_core.storage.disk import check_new_file, staged_file
from seg_core.storage.files import PARTIAL
from seg_core.threads import count_cpus, prefetch

log = logging.getLogger(__name__)

WRITERS = {
    ".parquet": "Parquet",
    ".gpkg": "GPKG",
    ".geojson": "GeoJSON",
    ".fgb": "FlatGeobuf",
    ".pmtiles": "PMTiles",
}
IN_LONLAT = {".geojson", ".pmtiles"}
LAYER = "footprints"
OPTIONS = {".geojson": {"COORDINATE_PRECISION": "7"}, ".pmtiles": {"MINZOOM": "10", "MAXZOOM": "16"}}
SORT_MEMORY = "1GB"  # beyond it, DuckDB sorts on disk
BATCH_ROWS = 20_000
CURVE = "curve"  # column by which buildings are sorted: their place on a Hilbert curve

Item = tuple[Part, Location | None]
Found = tuple[pa.Table, Pieces]
Find = Callable[[Item], Found]
Spread = Callable[[Find, Sequence[Item]], Iterator[Found]]


def _spread_over_threads(find: Find, items: Sequence[Item]) -> Iterator[Found]:
    number = count_cpus()
    with ThreadPoolExecutor(number) as pool:
        yield from prefetch(pool, find, items, 2 * number)


def find_footprints(
    run: str,
    shape: Shape,
    report: Callable[[str], None] = lambda _: None,
    spread: Spread = _spread_over_threads,
) -> Iterator[pa.Table]:
    """Yield tables with a row for each building of a run, with the columns of FOOTPRINTS.

    A building is the pixels of a mask that share sides. It is whole across the borders of tiles and parts, and in a
    mosaic across those of scenes. `spread` maps a function to parts, and keeps their order. `report` is called with a
    text for each part. Raises SegError if a part is damaged.
    """
    yield from _find_all(run, read_plan(run), shape, report, spread)


def _find_all(run: str, plan: Plan, shape: Shape, report: Callable[[str], None], spread: Spread) -> Iterator[pa.Table]:
    there = find_parts(run)
    items = [(part, there.get(part.key)) for part in plan.parts()]
    found = spread(partial(_find, plan, shape), items)
    of_parts = zip((part for part, _ in items), _reported(found, len(items), report), strict=True)
    for _, group in groupby(of_parts, key=lambda each: each[0].scene.scene_id):
        yield from _join_image(group, shape, plan.model)


def _find(plan: Plan, shape: Shape, item: Item) -> Found:
    whole, pieces = find_buildings(plan.settings, *item)
    return make_table(whole, item[0].scene, shape, plan.model), pieces


def _reported(found: Iterator[Found], number: int, report: Callable[[str], None]) -> Iterator[Found]:
    for at, each in enumerate(found, 1):
        report(f"{at:,} of {number:,} parts")
        yield each


def _join_image(found: Iterator[tuple[Part, Found]], shape: Shape, model: str) -> Iterator[pa.Table]:
    """Yield the tables of the parts of an image, and those of the buildings that several of them hold."""
    above = OpenRow()
    for _, group in groupby(found, key=lambda each: each[0].window.row_off):
        row = []
        for part, (table, pieces) in group:
            image = part.scene
            row.append(pieces)
            yield table
        whole, above = join_row(above, row)
        yield from (make_table(each, image, shape, model) for each in whole)
    whole, _ = join_row(above, [])
    yield from (make_table(each, image, shape, model) for each in whole)


def export_footprints(
    run: str,
    path: str,
    shape: Shape,
    report: Callable[[str], None] = lambda _: None,
    spread: Spread = _spread_over_threads,
) -> dict[str, Any]:
    """Write the buildings of a run to a new file, in the format of its suffix, sorted along a Hilbert curve.

    A style for QGIS is written beside it, unless there is one. Returns their number, how many of them touch ground of
    which nothing is known, and their pixels and area. Raises SegError if the file exists or can't be written, if there
    are no buildings for a .pmtiles file, which can't be empty, and as `find_footprints` does.
    """
    check_new_footprints(path)
    suffix = os.path.splitext(path)[1].lower()
    plan = read_plan(run)
    bounds = _bounds(plan.images, shape.crs)
    try:
        with TemporaryDirectory(prefix=PARTIAL, dir=os.path.dirname(path)) as folder:
            unsorted = f"{folder}/footprints.parquet"
            counts = _write_unsorted(_find_all(run, plan, shape, report, spread), unsorted, bounds)
            if suffix == ".pmtiles" and not counts["buildings"]:
                raise SegError(f"--out {path}: there are no buildings, and .pmtiles can't be empty: name a .gpkg file")
            report("sorting")
            with staged_file(path) as draft, _sorted(unsorted, folder) as rows:
                _write(rows, draft, os.path.basename(path), shape)
        if suffix != ".pmtiles" and os.path.exists(style_path(path)):
            log.warning("%s: was there before, and is kept: it may be the style of another file", style_path(path))
        elif suffix != ".pmtiles":
            write_vector_style(path)
    except (OSError, DataSourceError, DataLayerError, duckdb.Error) as error:
        raise SegError(f"--out {path}: can't be written: {error}") from error
    return counts if shape.crs else {**counts, "area_m2": None}


def choose_shape(
    run: str, path: str, crs: str | None, min_area: float = 0.0, simplify: float = 0.0, regularize: bool = False
) -> Shape:
    """Check how footprints of a run are to be drawn in the format of a file's suffix.

    Raises SegError for a CRS that the format can't hold, and as `make_shape` does.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in IN_LONLAT and crs is not None:
        raise SegError(f"--crs {crs}: {suffix} is always in longitude and latitude: leave it out")
    images = read_plan(run).images
    bare = next((image.scene_id for image in images if image.crs is None), None)
    if suffix in IN_LONLAT and bare:
        why = f"{suffix} is in longitude and latitude, and {bare} has no CRS"
        raise SegError(f"--out {path}: {why}: name a .gpkg, .fgb or .parquet file")
    shape = make_shape(images, LONLAT if suffix in IN_LONLAT else crs, min_area, simplify, regularize)
    if suffix == ".fgb" and shape.crs is not None:
        _check_flatgeobuf(path, CRS.from_user_input(shape.crs))
    return shape


def _check_flatgeobuf(path: str, crs: CRS) -> None:
    """Raise SegError if FlatGeobuf would name another CRS, as GDAL does for UTM in feet."""
    file = BytesIO()
    empty = geopandas.GeoDataFrame(geometry=[], crs=crs)
    write_dataframe(empty, file, driver=WRITERS[".fgb"], geometry_type="Polygon")
    named = CRS.from_user_input(read_info(file)["crs"])
    if not named.equals(crs):
        raise SegError(f"--out {path}: .fgb would say {named.name}, not {crs.name}: name a .gpkg or .parquet file")


def check_new_footprints(path: str) -> None:
    """Raise SegError unless `path` is a new file with a suffix that footprints are written in."""
    check_new_file(path, WRITERS, "footprints are")


def _bounds(images: Sequence[Scene], crs: str | None) -> Bounds:
    """Return the box of all images in a CRS, or in their own coordinates."""
    if crs is None:
        corners = [position(ground_transform(each), *np.array([[0, each.height], [0, each.width]])) for each in images]
        boxes = [(min(x), min(y), max(x), max(y)) for x, y in corners]
    else:
        boxes = [box for image in images for box in transformed_bounds(image, image.window, CRS.from_user_input(crs))]
        if not boxes:
            raise SegError(f"--crs {crs}: does not cover the scenes: name another one")
    west, south, east, north = zip(*boxes, strict=True)
    return float(min(west)), float(min(south)), float(max(east)), float(max(north))


def _write_unsorted(tables: Iterator[pa.Table], path: str, bounds: Bounds) -> dict[str, Any]:
    """Write tables to a Parquet file with the place of each building on the curve. Returns what they add up to."""
    sums = {"buildings": 0, "touch_gap": 0, "building_px": 0, "area_m2": 0.0}
    with pq.ParquetWriter(path, FOOTPRINTS.append(pa.field(CURVE, pa.int64()))) as writer:
        for table in tables:
            writer.write_table(table.append_column(CURVE, pa.array(_on_curve(table, bounds))))
            sums["buildings"] += len(table)
            for name, column in (("touch_gap", "touches_gap"), ("building_px", "building_px"), ("area_m2", "area_m2")):
                sums[name] += pc.sum(table[column]).as_py() or 0
    return sums


def _on_curve(table: pa.Table, bounds: Bounds) -> Any:
    """Return the place of the middle of each box on a Hilbert curve over the bounds, `int64 (buildings,)`."""
    west, south, east, north = (table["bbox"].combine_chunks().field(at).to_numpy() for at in range(4))
    middles = geopandas.GeoSeries.from_xy((west + east) / 2, (south + north) / 2)
    return middles.hilbert_distance(bounds).to_numpy(np.int64)


@contextmanager
def _sorted(path: str, folder: str) -> Iterator[pa.RecordBatchReader]:
    """Yield the rows of a file of footprints along the curve. What does not fit into memory goes to the folder."""
    with duckdb.connect(config={"temp_directory": folder, "memory_limit": SORT_MEMORY}) as connection:
        query = f"SELECT * EXCLUDE ({CURVE}) FROM read_parquet(?) ORDER BY {CURVE}, id"
        reader = connection.sql(query, params=[path]).to_arrow_reader(BATCH_ROWS)
        yield pa.RecordBatchReader.from_batches(FOOTPRINTS, map(_cast, reader))


def _cast(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.cast(FOOTPRINTS)


def _write(rows: pa.RecordBatchReader, path: str, name: str, shape: Shape) -> None:
    """Write footprints to a file, which will have this name, in the format of its suffix."""
    stem, suffix = os.path.splitext(name)
    suffix = suffix.lower()
    options = {**OPTIONS.get(suffix, {}), **({"NAME": stem} if suffix == ".pmtiles" else {})}
    if suffix == ".parquet":
        _write_parquet(rows, path, shape)
        return
    names = [name for name in FOOTPRINTS.names if name != "bbox"]
    schema = pa.schema([FOOTPRINTS.field(name) for name in names])
    with warnings.catch_warnings(), _errors_of(batch.select(names) for batch in rows) as batches:
        warnings.filterwarnings("ignore", "'crs' was not provided")
        write_arrow(
            pa.RecordBatchReader.from_batches(schema, batches),
            path,
            layer=LAYER,
            driver=WRITERS[suffix],
            geometry_name="geometry",
            geometry_type=shape.geometry_type,
            crs=shape.crs,
            **options,
        )


@contextmanager
def _errors_of(batches: Iterator[pa.RecordBatch]) -> Iterator[Iterator[pa.RecordBatch]]:
    """Yield batches for a library that has its own error for any that they raise, and raise theirs instead.

    A signal may be raised in them, too.
    """
    raised: list[BaseException] = []

    def guarded() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except GeneratorExit:
            raise
        except BaseException as error:
            raised.append(error)
            raise

    try:
        yield guarded()
    except Exception as error:
        raise (raised[0] if raised else error) from None


def _write_parquet(rows: pa.RecordBatchReader, path: str, shape: Shape) -> None:
    """Write GeoParquet 1.1, whose boxes let readers skip row groups."""
    column = {**GEO["columns"]["geometry"], "geometry_types": [shape.geometry_type]}
    # Without "crs" coordinates are longitudes and latitudes; null is an unknown one.
    if shape.crs != LONLAT:
        column["crs"] = None if shape.crs is None else CRS.from_user_input(shape.crs).to_json_dict()
    geo = {**GEO, "columns": {"geometry": column}}
    schema = FOOTPRINTS.with_metadata({b"geo": json.dumps(geo)})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in rows:
            writer.write_batch(batch, row_group_size=BATCH_ROWS)
