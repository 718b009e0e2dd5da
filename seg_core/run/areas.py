"""Building area of polygons, such as districts, from the masks of a run.

    areas ─▶ CRS of each scene ─┬─▶ tiles within one area: the figures of their rows
                                └─▶ tiles at its border: pixels of their masks, by the share of each within the area

A pixel at the border of an area counts by the share of it that the area covers. exactextract computes it
(https://github.com/isciences/exactextract). Areas may overlap: each is measured by itself. Square metres are geodesic.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import geopandas
import numpy as np
import pandas as pd
import shapely
from exactextract import exact_extract
from exactextract.raster import NumPyRasterSource
from numpy.typing import NDArray
from pyogrio.errors import DataLayerError, DataSourceError

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grid import Window, split
from seg_core.imagery.georef import GEOD, pixel_at, position
from seg_core.imagery.scene import Scene
from seg_core.imagery.vector_formats import PARQUET
from seg_core.imagery.vectors import Geometries, Tally, open_vectors, reading_errors, repair_polygons
from seg_core.run.export_masks import Scale, decode_pixels
from seg_core.run.plan import Part
from seg_core.run.rows import Row
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, published_parts, read_part
from seg_core.storage.disk import staged_file
from seg_core.threads import for_each

DEFAULT_ID = "area"  # name of the column of numbers that areas have without --id
LONLAT = "OGC:CRS84"
COLUMNS = (*Window._fields, "status", "valid_px", "building_px", "area_m2", "building_m2")
MASKS = ("mask", "valid")
FIGURES = ("area_m2", "valid_m2", "building_m2", "coverage", "covered", "failed_tiles", "missing_tiles")
WRITERS = {".gpkg": "GPKG", ".parquet": "Parquet", ".geojson": "GeoJSON", ".fgb": "FlatGeobuf", ".csv": "CSV"}


@dataclass(frozen=True)
class Areas:
    """Polygons to measure: an id column and valid geometries, in the CRS of the file."""

    frame: geopandas.GeoDataFrame
    num_repaired: int  # polygons that were invalid

    @property
    def id_column(self) -> str:
        """The name of the column that tells areas from each other."""
        return str(self.frame.columns[0])

    @cached_property
    def _by_crs(self) -> "dict[str, Projected]":
        return {}

    def projected(self, crs: str) -> "Projected":
        """Return the areas in the CRS of a scene."""
        if crs not in self._by_crs:
            polygons = self.frame.geometry.to_crs(crs).to_numpy()
            shapely.prepare(polygons)
            self._by_crs[crs] = Projected(polygons, shapely.STRtree(polygons))
        return self._by_crs[crs]


@dataclass(frozen=True)
class Projected:
    """Areas in one CRS."""

    polygons: Geometries
    tree: shapely.STRtree


@dataclass
class Sums:
    """What was added up for each area, `(areas,)`."""

    valid_m2: NDArray[np.float64]
    building_m2: NDArray[np.float64]
    failed: NDArray[np.int64]  # tiles
    missing: NDArray[np.int64]  # tiles
    reached: NDArray[np.bool_]  # whether a planned tile lies in it

    @classmethod
    def zeros(cls, number: int) -> "Sums":
        """Return sums of nothing for so many areas."""
        floats, counts = np.zeros((2, number)), np.zeros((2, number), np.int64)
        return cls(floats[0], floats[1], counts[0], counts[1], np.zeros(number, np.bool_))

    def add(self, other: "Sums") -> None:
        """Add other sums."""
        for name, values in vars(self).items():
            np.add(values, getattr(other, name), out=values)


def read_areas(path: str, id_column: str | None = None) -> Areas:
    """Read polygons of a GeoPackage, GeoJSON, GeoParquet, Shapefile or FlatGeobuf, all of them into memory.

    `id_column` names an attribute that tells them from each other; by default they are numbered from 1. Polygons that
    are invalid are repaired. Raises SegError for a file that can't be read, has no CRS, or holds something else than
    polygons, and for an id that is missing, or that two areas have.
    """
    source = open_vectors(path)
    with reading_errors(path):
        if source.driver == PARQUET:
            frame = geopandas.read_parquet(path)
        else:
            frame = geopandas.read_file(source.gdal_name, layer=source.layer, engine="pyogrio")
    frame = frame.set_crs(source.crs) if frame.crs is None else frame
    if frame.empty:
        raise SegError(f"{path}: holds no areas")
    tally = Tally()
    polygons = repair_polygons(frame.geometry.to_numpy(), tally)
    if lost := tally.dropped.most_common(1)[0] if +tally.dropped else None:
        raise SegError(f"{path}: areas are polygons, and {lost[1]:,} of {len(frame):,} features are {lost[0]}")
    return Areas(geopandas.GeoDataFrame(_ids(frame, path, id_column), geometry=polygons, crs=frame.crs), tally.repaired)


def _ids(frame: geopandas.GeoDataFrame, path: str, name: str | None) -> dict[str, Any]:
    """Return the id column of the areas."""
    if name is None:
        return {DEFAULT_ID: np.arange(1, len(frame) + 1)}
    columns = [str(each) for each in frame.columns if each != frame.geometry.name]
    if name not in columns:
        raise SegError(f"--id {name}: {path} has no such attribute: it has {', '.join(columns) or 'none'}")
    if name in FIGURES:
        raise SegError(f"--id {name}: the answer has a column of that name: choose another attribute")
    ids = frame[name]
    if ids.isna().any():
        raise SegError(f"--id {name}: {int(ids.isna().sum()):,} areas of {path} have none: choose another attribute")
    if ids.duplicated().any():
        twice = ids[ids.duplicated()].iloc[0]
        raise SegError(f"--id {name}: two areas of {path} have {twice}: choose another attribute, or dissolve them")
    return {name: ids.to_numpy()}


def measure_areas(run: str, areas: Areas, report: Callable[[str], None] = lambda _: None) -> geopandas.GeoDataFrame:
    """Measure each area from the rows and masks of a run. Returns a row for each, in their order and CRS.

    The columns are the id; `area_m2`, of the whole area; `valid_m2` and `building_m2`, of what the run has found in it;
    `coverage`, building_m2 / valid_m2; `covered`, valid_m2 / area_m2; and the numbers of `failed_tiles` and
    `missing_tiles` that it touches. They are null for an area that no tile of the run touches, but for its `area_m2`.
    Where scenes overlap, their ground counts twice, as in the summary of the run.

    Memory depends on the areas and on the size of a part. `report` is called with a text for each part. Raises SegError
    if a scene has no CRS, and if a part is damaged.
    """
    plan, published = read_plan(run), set(published_parts(run))
    for image in plan.images:
        if image.crs is None:
            raise SegError(f"{image.scene_id}: has no CRS, so that it is not known in which area it lies")
        areas.projected(image.crs)
    parts, sums = list(plan.parts()), Sums.zeros(len(areas.frame))
    measure = partial(_measure_part, run, published, plan.settings.tile_size, plan.settings.scale, areas)
    for number, found in enumerate(for_each(measure, parts, os.cpu_count()), 1):
        sums.add(found)
        report(f"{number} of {len(parts)} parts")
    return _to_frame(areas, sums)


def _to_frame(areas: Areas, sums: Sums) -> geopandas.GeoDataFrame:
    frame, reached = areas.frame, sums.reached
    area_m2 = np.array([_ground_area(polygon) for polygon in frame.geometry.to_crs(LONLAT)])
    with np.errstate(invalid="ignore"):  # 0 / 0, where nothing is valid
        figures: dict[str, Any] = {
            "valid_m2": sums.valid_m2,
            "building_m2": sums.building_m2,
            "coverage": np.where(sums.valid_m2 > 0, sums.building_m2 / sums.valid_m2, np.nan),
            "covered": sums.valid_m2 / area_m2,
        }
    known = {name: np.where(reached, values, np.nan) for name, values in figures.items()}
    counts = {
        name: pd.array(values, "Int64").copy()
        for name, values in (("failed_tiles", sums.failed), ("missing_tiles", sums.missing))
    }
    for values in counts.values():
        values[~reached] = pd.NA
    columns = {areas.id_column: frame[areas.id_column].to_numpy(), "area_m2": area_m2, **known, **counts}
    return geopandas.GeoDataFrame(columns, geometry=frame.geometry.to_numpy(), crs=frame.crs)


def _ground_area(polygon: shapely.Geometry) -> float:
    """Return the geodesic area in square metres of a polygon, or of several, in longitude and latitude."""
    oriented = shapely.orient_polygons(polygon)
    return abs(float(GEOD.geometry_area_perimeter(oriented)[0]))


def write_areas(frame: geopandas.GeoDataFrame, path: str) -> None:
    """Write measured areas with their geometries to a new file, in the format of its suffix.

    Raises SegError for a suffix that is not known, if the file exists, or if it can't be written.
    """
    stem, suffix = os.path.splitext(os.path.basename(path))
    if suffix.lower() not in WRITERS:
        raise SegError(f"--out {path}: not a format that areas are written in: say {', '.join(WRITERS)}")
    if os.path.exists(path):
        raise SegError(f"--out {path}: already exists: choose another name")
    try:
        with staged_file(path) as draft:
            if suffix.lower() == ".csv":
                frame.drop(columns="geometry").to_csv(draft, index=False)
            elif suffix.lower() == ".parquet":
                frame.to_parquet(draft, index=False, schema_version="1.1.0", write_covering_bbox=True)
            else:
                frame.to_file(draft, driver=WRITERS[suffix.lower()], layer=stem, engine="pyogrio")
    except (OSError, DataSourceError, DataLayerError) as error:
        raise SegError(f"--out {path}: can't be written: {error}") from error


class Pairs(NamedTuple):
    """Tiles and the areas that they share ground with, `(pairs,)` each."""

    tile: NDArray[np.intp]  # number of the tile
    area: NDArray[np.intp]  # number of the area
    piece: Geometries  # what they share, in the CRS of the scene; None if it is the whole tile

    @property
    def is_whole(self) -> NDArray[np.bool_]:
        """Whether the tile lies within the area."""
        return np.asarray(shapely.is_missing(self.piece))


def _pair(projected: Projected, boxes: Geometries) -> Pairs:
    """Find the areas that share ground with the outlines of tiles. Those that only touch them are left out."""
    tile, area = projected.tree.query(boxes, predicate="intersects")
    piece = np.full(len(tile), None, object)
    at_border = ~shapely.covers(projected.polygons[area], boxes[tile])
    piece[at_border] = shapely.intersection(projected.polygons[area[at_border]], boxes[tile[at_border]])
    shared = ~at_border | (shapely.area(piece) > 0)
    return Pairs(tile[shared], area[shared], piece[shared])


def _measure_part(run: str, published: set[str], tile_size: int, scale: Scale, areas: Areas, part: Part) -> Sums:
    """Add up what one part says of each area."""
    assert part.scene.crs is not None
    sums, projected = Sums.zeros(len(areas.frame)), areas.projected(part.scene.crs)
    tiles = list(split(part.window, tile_size))
    pairs = _pair(projected, _outlines(part.scene, tiles))
    if not len(pairs.tile):
        return sums
    path = part_path(run, part.key)
    there = {Window.from_row(row).origin: row for row in read_part(path, COLUMNS)} if path in published else {}
    rows = [there.get(tile.origin) for tile in tiles]
    sums.reached[pairs.area] = True
    status = np.array(["missing" if row is None else row["status"] for row in rows])[pairs.tile]
    np.add.at(sums.missing, pairs.area[status == "missing"], 1)
    np.add.at(sums.failed, pairs.area[status == "failed"], 1)
    _add_whole_tiles(sums, pairs, rows)
    _add_borders(sums, pairs, rows, part, path, scale)
    return sums


def _add_whole_tiles(sums: Sums, pairs: Pairs, rows: Sequence[Row | None]) -> None:
    """Add the figures of tiles that lie within an area."""
    for name, values in (("area_m2", sums.valid_m2), ("building_m2", sums.building_m2)):
        of_tiles = np.array([0.0 if row is None else row[name] or 0.0 for row in rows])
        np.add.at(values, pairs.area[pairs.is_whole], of_tiles[pairs.tile[pairs.is_whole]])


def _add_borders(sums: Sums, pairs: Pairs, rows: Sequence[Row | None], part: Part, path: str, scale: Scale) -> None:
    """Add the pixels of tiles that lie partly within an area. The masks are read only if there are such tiles."""
    pieces = defaultdict(list)
    at_border = ~pairs.is_whole
    for tile, area, piece in zip(*(each[at_border] for each in pairs), strict=True):
        row = rows[tile]
        if row is not None and row["status"] == "done" and row["valid_px"]:
            pieces[Window.from_row(row).origin].append((int(area), piece))
    for row in read_part(path, [*COLUMNS, *MASKS]) if pieces else ():
        if near := pieces.get(Window.from_row(row).origin):
            _add_border(sums, row, part, scale, near)


def _outlines(scene: Scene, tiles: list[Window]) -> Geometries:
    """Return the outlines of tiles in the CRS of their scene."""
    top, left, height, width = np.array(tiles, np.float64).T
    rows = np.stack([top, top + height, top + height, top, top], axis=1)
    cols = np.stack([left, left, left + width, left + width, left], axis=1)
    return np.asarray(shapely.polygons(np.stack(position(scene.transform, rows, cols), axis=-1)), object)


def _add_border(sums: Sums, row: Row, part: Part, scale: Scale, pieces: list[tuple[int, shapely.Geometry]]) -> None:
    """Add the pixels of a tile at the border of areas, by the share of each pixel within the area.

    `pieces` are the areas that the tile is partly in, each with the piece of it within the tile.
    """
    tile = Window.from_row(row)
    pixels = decode_pixels(row, part, scale)
    extent = (0, 0, tile.width, tile.height)
    rasters = [
        NumPyRasterSource(values.astype(np.float32), *extent, name=name)
        for name, values in (("valid", pixels != MISSING), ("building", pixels == 1))
    ]
    features = [
        {
            "type": "Feature",
            "properties": {"area": area},
            "geometry": shapely.geometry.mapping(_to_pixels(piece, part.scene, tile)),
        }
        for area, piece in pieces
    ]
    pixel_m2 = row["area_m2"] / row["valid_px"]
    for found in exact_extract(rasters, features, ["sum"], include_cols=["area"]):
        figures = found["properties"]
        sums.valid_m2[figures["area"]] += pixel_m2 * (figures["valid_sum"] or 0.0)
        sums.building_m2[figures["area"]] += pixel_m2 * (figures["building_sum"] or 0.0)


def _to_pixels(polygon: shapely.Geometry, scene: Scene, tile: Window) -> shapely.Geometry:
    """Convert a polygon of the scene's CRS to pixels of a tile: x to the right, y upwards from its last row."""

    def convert(points: NDArray[np.float64]) -> NDArray[np.float64]:
        rows, cols = pixel_at(scene.transform, points[:, 0], points[:, 1])  # type: ignore[arg-type]
        return np.stack([cols - tile.col_off, tile.bottom - rows], axis=1)

    parts: Iterator[Any] = (each for each in shapely.get_parts(polygon) if each.geom_type == "Polygon")
    return shapely.transform(shapely.multipolygons(list(parts)), convert)
