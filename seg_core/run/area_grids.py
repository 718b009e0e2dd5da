"""Areas that are generated instead of read from a file: cells of a grid, H3 cells, and a bounding box.

Only cells that share ground with a scene of the run are made. Cells of one grid are the same for each run, so that runs
can be compared by them.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import geopandas
import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Geod

from seg_core.errors import SegError
from seg_core.grid import split
from seg_core.imagery.area_projection import ANTIMERIDIAN, LONLAT, Geometries, antimeridian_x, parse_crs, require_crs
from seg_core.imagery.georef import footprints, split_at_antimeridian, unwrap
from seg_core.imagery.scene import Scene
from seg_core.run.area_files import DEFAULT_ID
from seg_core.run.stored_plan import read_plan
from seg_core.run.zonal import Areas

EQUAL_AREA = "EPSG:6933"  # NSIDC EASE-Grid 2.0 Global: each cell has the same ground area
SPHERE = Geod(ellps="sphere")
MAX_CELLS = 1_000_000  # all are in memory at once
MIN_SIDE, MAX_SIDE = 0.01, 1_000_000.0  # m
SLIVER_DEGREES2 = 1e-16  # and the same for H3
SLIVER_M = 0.002  # a cell that a scene reaches by less, as by rounding, is not made
PIECE_M = 10_000.0  # a scene's outline is taken in pieces of this size, and a cell's edges too, as they are curved


def bbox_area(west: float, south: float, east: float, north: float) -> Areas:
    """Return one area: a rectangle in degrees of longitude and latitude.

    If `west` exceeds `east`, it crosses the antimeridian. Raises SegError if it is empty or reaches beyond the Earth.
    """
    text = f"--bbox {west:g} {south:g} {east:g} {north:g}"
    if not (all(abs(each) <= 180 for each in (west, east)) and south >= -90 and north <= 90):
        raise SegError(f"{text}: say degrees: west and east from -180 to 180, south and north from -90 to 90")
    if south >= north or west == east or (west, east) == (180, -180):
        raise SegError(f"{text}: is empty: say WEST SOUTH EAST NORTH")
    spans = [(west, east)] if west < east else [(west, 180.0), (-180.0, east)]
    boxes = [shapely.box(left, south, right, north) for left, right in spans if left < right]
    polygon = shapely.segmentize(shapely.multipolygons(boxes), PIECE_M / 111_000)
    return Areas(geopandas.GeoDataFrame({DEFAULT_ID: [1]}, geometry=[polygon], crs=LONLAT))


def grid_areas(
    run: str, metres: float, crs: str = EQUAL_AREA, also: str | None = None, option: str = "--grid"
) -> Areas:
    """Return the cells of a square grid that share ground with the scenes of a run, or of `also`, another one.

    Sides measure `metres` in `crs`, by default an equal-area one for the whole Earth. There, cells are stretched from
    north to south: beyond some 40 degrees of latitude, name a CRS of the country. Edges lie at multiples of `metres`.
    A cell is called after its west and south edges. `option` is what the user calls `metres`. Raises SegError for a CRS
    that does not measure in metres, for a scene without a CRS, and where there would be too many cells.
    """
    system = _metric_crs(crs)
    if not MIN_SIDE <= metres <= MAX_SIDE:
        raise SegError(f"{option} {metres:g}: say the side of a cell in metres, {MIN_SIDE:g} to {MAX_SIDE:g}")
    pieces = shapely.transform(_scene_pieces(_images(run, also)), _within_antimeridian)
    scenes = geopandas.GeoSeries(pieces, crs=LONLAT).to_crs(system)
    found: list[NDArray[np.int64]] = []
    number = 0
    for polygon in shapely.get_parts(scenes.to_numpy()):
        cells = _cells_of(polygon, metres, crs, option)
        number += len(cells)
        if number > MAX_CELLS:
            found = [np.unique(np.concatenate([*found, cells]), axis=0)]
            _check_number(number := len(found[0]), f"{option} {metres:g}")
        else:
            found.append(cells)
    west, south = np.unique(np.concatenate(found), axis=0).T * metres
    boxes = shapely.box(west, south, west + metres, south + metres)
    if edge := antimeridian_x(crs):
        boxes = shapely.intersection(boxes, shapely.box(-edge, -1e8, edge, 1e8))
    names = [f"E{x:.12g}N{y:.12g}" for x, y in zip(west, south, strict=True)]
    cells = shapely.segmentize(boxes, PIECE_M)
    return Areas(geopandas.GeoDataFrame({"cell": names}, geometry=cells, crs=system))


def _within_antimeridian(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move points at 180 degrees to the side that they are on, as PROJ changes the sign of just that longitude."""
    return np.column_stack([np.clip(points[:, 0], -ANTIMERIDIAN, ANTIMERIDIAN), points[:, 1]])


def _metric_crs(crs: str) -> CRS:
    system = parse_crs(crs)
    units = {axis.unit_name for axis in system.axis_info}
    if units != {"metre"} or not system.is_projected:
        kind = "is not that of a map" if units == {"metre"} else f"measures in {' and '.join(sorted(units))}"
        raise SegError(f"--crs {crs}: {kind}: name one in metres, such as EPSG:3035")
    return system


def _cells_of(polygon: shapely.Geometry, metres: float, crs: str, option: str) -> NDArray[np.int64]:
    """Return the cells that share ground with a polygon: their west and south edges by `metres`, `(cells, 2)`."""
    bounds = np.array(shapely.bounds(polygon))
    if not np.isfinite(bounds).all():
        raise SegError(f"--crs {crs}: does not cover the scenes: name another one")
    first, last = np.floor(bounds[:2] / metres), np.ceil(bounds[2:] / metres)
    _check_number(float(np.prod(last - first)), f"{option} {metres:g}")
    sides = (np.arange(one, two, dtype=np.int64) for one, two in zip(first, last, strict=True))
    cells = np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2)
    west, south = cells.T * metres
    boxes = shapely.box(west, south, west + metres, south + metres)
    shapely.prepare(polygon)
    shares_ground = shapely.contains_properly(polygon, boxes)
    near = np.flatnonzero(~shares_ground & shapely.intersects(polygon, boxes))
    shares_ground[near] = shapely.area(shapely.intersection(polygon, boxes[near])) > SLIVER_M * metres
    return np.asarray(cells[shares_ground])


def h3_areas(run: str, resolution: int, also: str | None = None) -> Areas:
    """Return the H3 cells of a resolution, 0 to 15, that share ground with the scenes of a run, or of `also`.

    Raises SegError if the package h3 is not installed, for a scene without a CRS, and where there would be too many
    cells.
    """
    try:
        import h3
    except ImportError as error:
        raise SegError("--h3: needs the package h3: pip install 'aerial-seg[h3]'") from error
    if not 0 <= resolution <= 15:
        raise SegError(f"--h3 {resolution}: H3 has resolutions 0 to 15")
    option = f"--h3 {resolution}"
    chosen: set[str] = set()
    scenes = _scene_pieces(_images(run, also))
    for piece in scenes:
        _check_number(_degrees2_to_m2(piece) / h3.average_hexagon_area(resolution, "m^2"), option)
        for part in shapely.get_parts(piece):
            shape = h3.geo_to_h3shape(shapely.geometry.mapping(part))
            chosen.update(h3.polygon_to_cells_experimental(shape, resolution, contain="overlap"))
        _check_number(len(chosen), option)
    # h3 takes the edges of cells for straight lines in degrees, so that it may miss neighbours.
    names = sorted({near for cell in chosen for near in h3.grid_disk(cell, 1)})
    rings = [_densify(np.array(h3.cell_to_boundary(name))[:, ::-1]) for name in names]
    polygons = np.array(_lonlat_polygons(rings), object)
    pieces = shapely.STRtree(shapely.get_parts(scenes))
    at, piece = pieces.query(polygons, predicate="intersects")
    shared = shapely.area(shapely.intersection(polygons[at], pieces.geometries[piece])) > SLIVER_DEGREES2
    kept = np.unique(at[shared])
    return Areas(geopandas.GeoDataFrame({"h3": [names[each] for each in kept]}, geometry=polygons[kept], crs=LONLAT))


def _densify(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add points along the edges of a cell in degrees, which are great circles of H3's sphere."""
    closed = [*ring, ring[0]]
    points = []
    for (lon, lat), (to_lon, to_lat) in pairwise(closed):
        length = SPHERE.inv(lon, lat, to_lon, to_lat)[2]
        between = SPHERE.npts(lon, lat, to_lon, to_lat, int(length / PIECE_M)) if length > PIECE_M else []
        points += [(lon, lat), *between]
    return np.array(points)


def _lonlat_polygons(rings: Sequence[NDArray[np.float64]]) -> list[shapely.Geometry]:
    """Return the polygons of rings in degrees. Those that cross the antimeridian are split there."""
    continuous = [np.column_stack([unwrap(ring[None, :, 0])[0], ring[:, 1]]) for ring in rings]
    return list(split_at_antimeridian(np.array([shapely.Polygon(ring) for ring in continuous], object))[0])


def _degrees2_to_m2(polygon: shapely.Geometry) -> float:
    """Return the rough area of a small polygon in degrees."""
    _, south, _, north = shapely.bounds(polygon)
    return float(shapely.area(polygon)) * 111_000**2 * math.cos(math.radians((south + north) / 2))


def _check_number(number: float, option: str) -> None:
    if number > MAX_CELLS:
        raise SegError(f"{option}: makes more than {MAX_CELLS:,} cells: choose larger ones")


def _images(run: str, also: str | None) -> list[Scene]:
    return [image for each in (run, also) if each is not None for image in read_plan(each).images]


def _scene_pieces(scenes: Sequence[Scene]) -> Geometries:
    """Return polygons in longitude and latitude that together cover each scene."""
    found = []
    for scene in scenes:
        size = max(1, math.ceil(PIECE_M / (scene.gsd_m or 1.0)))
        found.append(footprints(require_crs(scene), scene.transform, list(split(scene.window, size))))
    pieces = np.concatenate(found)
    return split_at_antimeridian(pieces[~shapely.is_missing(pieces)])[0]
