"""Areas in the CRS of scenes, and their size on the ground, also where they are wider than a CRS can describe."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import geopandas
import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError, ProjError
from shapely.affinity import translate

from seg_core.errors import SegError
from seg_core.grid import Window
from seg_core.imagery.georef import GEOD, position
from seg_core.imagery.scene import Scene

Bounds = tuple[float, float, float, float]  # xmin, ymin, xmax, ymax
Geometries = NDArray[np.object_]

LONLAT = "OGC:CRS84"
DENSITY = 21  # points along each side of a rectangle that is transformed to another CRS
WIDE = 30.0  # degrees; wider areas are cut to the surroundings of the scenes before they are projected
MARGIN = 1.0  # degrees of these surroundings
STEP = 0.05  # degrees between the vertices of an area that was cut
ANTIMERIDIAN = 180 - 1e-12  # degrees: PROJ changes the sign of 180 itself
STRIP = 60.0  # degrees of longitude: the size of wider polygons is added up over strips of them


def parse_crs(crs: str) -> CRS:
    """Return the coordinate reference system that the option --crs names. Raises SegError if PROJ knows none such."""
    try:
        return CRS.from_user_input(crs)
    except CRSError as error:
        raise SegError(f"--crs {crs}: not a coordinate reference system that PROJ knows, such as EPSG:3035") from error


def require_crs(scene: Scene) -> str:
    """Return the CRS of a scene. Raises SegError if it has none."""
    if scene.crs is None:
        raise SegError(f"{scene.scene_id}: has no CRS, so that it is not known in which area it lies")
    return scene.crs


def ground_area(polygon: shapely.Geometry) -> float:
    """Return the geodesic area in square metres of a polygon, or of several, in longitude and latitude."""
    parts = shapely.get_parts(polygon)
    return sum(map(_part_area, parts, _widths(parts)))


def _part_area(polygon: shapely.Polygon, width: float) -> float:
    if width > STRIP:  # otherwise PROJ may take it for the rest of the Earth
        west, south, east, north = shapely.bounds(polygon)
        edges = [*np.arange(west, east, STRIP), east]
        return sum(ground_area(shapely.clip_by_rect(polygon, a, south, b, north)) for a, b in pairwise(edges))
    return abs(float(GEOD.geometry_area_perimeter(shapely.orient_polygons(polygon))[0]))


def _widths(polygons: Geometries) -> NDArray[np.float64]:
    """Return the widths of polygons in degrees of longitude; the vertices may jump at the antimeridian."""
    plain, turned = polygons, shapely.transform(polygons, lambda points: points % [360, 720])
    west, _, east, _ = shapely.bounds(plain).T
    turned_west, _, turned_east, _ = shapely.bounds(turned).T
    turned_width = turned_east - turned_west
    # All vertices at 180 degrees, to the east and to the west: around the whole Earth.
    return np.asarray(np.where(turned_width > 0, np.minimum(east - west, turned_width), east - west))


def transformed_bounds(scene: Scene, window: Window, crs: CRS) -> list[Bounds]:
    """Return the bounding boxes in another CRS of a window of a scene: two of them across the antimeridian.

    There are none if the CRS does not cover the window. Raises SegError if PROJ knows no way to that CRS.
    """
    rows, cols = np.meshgrid((window.row_off, window.bottom), (window.col_off, window.right))
    x, y = position(scene.transform, rows, cols)
    try:
        to_crs = Transformer.from_crs(scene.crs, crs, always_xy=True)
        left, bottom, right, top = to_crs.transform_bounds(x.min(), y.min(), x.max(), y.max(), densify_pts=DENSITY)
    except (CRSError, ProjError) as error:
        raise SegError(f"{scene.uri}: PROJ knows no way from its CRS to {crs.name}") from error
    if not np.isfinite([left, bottom, right, top]).all():
        return []
    if left > right:
        return [(left, bottom, 180.0, top), (-180.0, bottom, right, top)]
    return [(left, bottom, right, top)]


def boxes_near(scene: Scene, window: Window, crs: CRS) -> list[Bounds]:
    """Return the boxes in another CRS in which polygons may lie that touch a window of a scene.

    They are those of `transformed_bounds`. Of a scene that reaches beyond the antimeridian, they are also on the other
    side, in a CRS that ends there.
    """
    boxes, half = transformed_bounds(scene, window, crs), antimeridian_x(crs.to_wkt())
    if half is None:
        return boxes
    beyond = [(left - 2 * half, bottom, right - 2 * half, top) for left, bottom, right, top in boxes if right > half]
    before = [(left + 2 * half, bottom, right + 2 * half, top) for left, bottom, right, top in boxes if left < -half]
    return boxes + beyond + before


def project_areas(areas: geopandas.GeoSeries, crs: str, scenes: Sequence[Scene]) -> Geometries:
    """Return areas in the CRS of some scenes.

    Wide areas are cut to the surroundings of the scenes, because the CRS may not describe all of them. Areas that lie
    elsewhere become empty, because it may fold them onto the scenes. If a scene reaches beyond the antimeridian in a
    CRS that ends there, the areas are repeated on the other side.
    """
    if areas.crs == crs:
        return _repeat(areas.to_numpy(), crs, scenes)
    lonlat = areas.to_crs(LONLAT).to_numpy()
    _, south, _, north = shapely.bounds(lonlat).reshape(-1, 4).T
    is_wide = (_widths(lonlat) > WIDE) | (north - south > WIDE)
    surroundings = _surroundings(tuple(scenes))
    polygons = np.full(len(areas), shapely.Polygon(), object)
    whole = ~is_wide & shapely.intersects(lonlat, surroundings)
    polygons[whole] = areas[whole].to_crs(crs).to_numpy()
    if is_wide.any():
        near = shapely.intersection(lonlat[is_wide], surroundings)
        polygons[is_wide] = geopandas.GeoSeries(shapely.segmentize(near, STEP), crs=LONLAT).to_crs(crs).to_numpy()
    return _repeat(polygons, crs, scenes)


@lru_cache(maxsize=64)  # labels are projected window by window
def _surroundings(scenes: tuple[Scene, ...]) -> shapely.Geometry:
    """Return what is near scenes in longitude and latitude, as a polygon or several.

    It is repeated a turn to the east and to the west: longitudes of areas may run from 0 to 360.
    """
    boxes = [box for scene in scenes for box in transformed_bounds(scene, scene.window, CRS.from_user_input(LONLAT))]
    west, south, east, north = np.array(boxes).reshape(-1, 4).T
    south, north = south - MARGIN, north + MARGIN
    polar = (south <= -90) | (north >= 90)  # where all longitudes are near
    west, east = np.where(polar, -180, west - MARGIN), np.where(polar, 180, east + MARGIN)
    return shapely.union_all([shapely.box(west + turn, south, east + turn, north) for turn in (-360, 0, 360)])


def _repeat(polygons: Geometries, crs: str, scenes: Sequence[Scene]) -> Geometries:
    """Repeat areas on the other side of the antimeridian, if scenes reach there in a CRS that ends there."""
    half = antimeridian_x(crs)
    if half is None:
        return polygons
    corners = [
        float(position(scene.transform, row, col)[0])
        for scene in scenes
        for row in (0, scene.height)
        for col in (0, scene.width)
    ]
    for shift, reaches in ((2 * half, max(corners) > half), (-2 * half, min(corners) < -half)):
        if reaches:
            polygons = shapely.union(polygons, np.array([translate(each, shift) for each in polygons], object))
    return polygons


@lru_cache(maxsize=64)
def antimeridian_x(crs: str) -> float | None:
    """Return x at 180 degrees, if the CRS shows the Earth from -x to x; None if the antimeridian is no edge of it."""
    to_crs = Transformer.from_crs(LONLAT, CRS.from_user_input(crs), always_xy=True)
    (east, west), _ = to_crs.transform([ANTIMERIDIAN, -ANTIMERIDIAN], [0.0, 0.0])
    return float(east) if np.isfinite(east) and east > 1 and abs(east + west) < 1e-6 * east else None
