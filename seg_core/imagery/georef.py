"""Where pixels are on the ground: ground sampling distance, footprints and geodesic areas.

Lengths and areas are geodesic (Karney 2013, through PROJ) on WGS 84, so that they are correct for projected,
lon/lat and web-mercator scenes alike.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import ProjError
from shapely.affinity import translate

from seg_core.errors import SegError
from seg_core.grid import Window

Transform = tuple[float, float, float, float, float, float]

GEOD = Geod(ellps="WGS84")


@lru_cache(maxsize=64)
def _to_lonlat(crs: str) -> Transformer:
    return Transformer.from_crs(CRS.from_user_input(crs), "OGC:CRS84", always_xy=True)


def position(transform: Transform, rows: Any, cols: Any) -> tuple[Any, Any]:
    """Return the coordinates x, y of pixel corners in the scene's CRS. `rows` and `cols` are numbers or arrays."""
    a, b, c, d, e, f = transform
    return a * cols + b * rows + c, d * cols + e * rows + f


def pixel_at(transform: Transform, x: float, y: float) -> tuple[float, float]:
    """Return the row and column of a point in the scene's CRS: the inverse of `position`.

    This does not use the inverse of `Affine`, which multiplies by a rounded 1 / area: its last bits would differ.
    """
    a, b, c, d, e, f = transform
    area = a * e - b * d
    return (a * (y - f) - d * (x - c)) / area, (e * (x - c) - b * (y - f)) / area


def window_transform(transform: Transform, window: Window) -> Transform:
    """Return the transform of a window of an image."""
    a, b, _, d, e, _ = transform
    x, y = position(transform, window.row_off, window.col_off)
    return a, b, float(x), d, e, float(y)


def pixel_size(transform: Transform) -> tuple[float, float]:
    """Return the width and height of a pixel, in units of the scene's CRS."""
    a, b, _, d, e, _ = transform
    return math.hypot(a, d), math.hypot(b, e)


def lonlat(
    crs: str, transform: Transform, rows: NDArray[np.float64], cols: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return longitude and latitude in degrees of pixel corners. Rows and columns count from the scene's corner."""
    with np.errstate(over="ignore", invalid="ignore"):  # if the transform is damaged
        lon, lat = _to_lonlat(crs).transform(*position(transform, rows, cols))
    return np.asarray(lon), np.asarray(lat)


def ground_size(crs: str, transform: Transform, height: int, width: int) -> tuple[float, float]:
    """Return the size of a pixel at the scene's centre in metres on the ground: along a column, and along a row.

    `height` and `width` are the scene's, in px. Raises SegError if CRS and transform do not put it on Earth.
    """
    row, col = height / 2, width / 2
    rows, cols = np.array([row - 0.5, row + 0.5, row, row]), np.array([col, col, col - 0.5, col + 0.5])
    try:
        lon, lat = lonlat(crs, transform, rows, cols)
    except ProjError as error:
        raise SegError("PROJ can't convert its CRS to longitude and latitude") from error
    metres = GEOD.inv(lon[0::2], lat[0::2], lon[1::2], lat[1::2])[2]
    a, b, _, d, e, _ = transform
    if not _on_earth(lon, lat).all() or a * e == b * d:
        raise SegError(f"its transform {', '.join(f'{v:g}' for v in transform)} does not put it on Earth")
    return float(metres[0]), float(metres[1])


def _on_earth(lon: NDArray[np.float64], lat: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(lon) & (np.abs(lat) <= 90))  # elsewhere PROJ returns inf, or its input


def footprints(crs: str, transform: Transform, windows: Sequence[tuple[int, int, int, int]]) -> NDArray[np.object_]:
    """Return the polygon of each window `(row_off, col_off, height, width)` in lon/lat, counter-clockwise.

    If a window crosses the antimeridian, its longitudes continue beyond 180 degrees: see `split_at_antimeridian`. The
    result is None for a window that reaches beyond what its CRS can describe.
    """
    box = np.asarray(windows, dtype=np.float64)
    top, left, bottom, right = box[:, 0], box[:, 1], box[:, 0] + box[:, 2], box[:, 1] + box[:, 3]
    rows = np.stack([top, bottom, bottom, top, top], axis=1)
    cols = np.stack([left, left, right, right, left], axis=1)
    lon, lat = lonlat(crs, transform, rows, cols)
    there = _on_earth(lon, lat).all(axis=1)
    found = np.full(len(box), None)
    ring = np.stack([unwrap(lon[there]), lat[there]], axis=-1)
    # A transform that mirrors the image reverses the ring, but GeoParquet expects counter-clockwise shells.
    found[there] = shapely.orient_polygons(shapely.polygons(ring))
    return found


def unwrap(lon: NDArray[np.float64]) -> NDArray[np.float64]:
    """Remove jumps from the longitudes of rings `(number, corners)`. Each starts between -180 and 180 degrees."""
    first = lon[:, :1]
    continuous = np.where(np.abs(lon - first) > 180, lon - 360 * np.round((lon - first) / 360), lon)
    turns = np.where(np.abs(first) > 180, 360 * np.round(first / 360), 0.0)
    return continuous - turns


def split_at_antimeridian(polygons: NDArray[np.object_]) -> tuple[NDArray[np.object_], list[list[float]]]:
    """Return lon/lat polygons with longitudes from -180 to 180, and their bounding boxes `xmin, ymin, xmax, ymax`.

    A polygon that crosses the antimeridian becomes two, and its `xmin` is greater than its `xmax` (RFC 7946, sections
    3.1.9 and 5.2). None stays None, with a box of NaN. So becomes one around a pole that has no area in degrees.
    """
    found, boxes = polygons.copy(), shapely.bounds(polygons).tolist()
    for at, (xmin, ymin, xmax, ymax) in enumerate(boxes):
        if xmin < -180 or xmax > 180:
            offset = 360.0 if xmin < -180 else 0.0
            found[at] = _split(translate(polygons[at], offset))
            west = xmin + offset
            box = [west if west < 180 else west - 360, ymin, xmax + offset - 360, ymax]
            boxes[at] = [math.nan] * 4 if found[at] is None else box
    return found, boxes


def _split(polygon: shapely.Polygon) -> shapely.Geometry | None:
    """Split a polygon that reaches beyond 180 degrees at that meridian, and move its eastern half to -180.

    The result is None if the polygon has no area, as some around a pole.
    """
    # The ring of a polygon around a pole may cross itself.
    whole = polygon if polygon.is_valid else shapely.make_valid(polygon, method="structure", keep_collapsed=False)
    west, east = shapely.intersection(whole, [shapely.box(-180, -90, 180, 90), shapely.box(180, -90, 540, 90)])
    # Of a polygon that merely touches a side, cutting leaves lines and points, too.
    parts = shapely.get_parts([west, translate(east, -360.0)])
    pieces = [shapely.orient_polygons(each) for each in parts if each.area]
    if not pieces:
        return None
    return pieces[0] if len(pieces) == 1 else shapely.multipolygons(pieces)


def area_m2(polygon: shapely.Polygon) -> float:
    """Return the geodesic area of a lon/lat polygon in square metres."""
    lon, lat = shapely.get_coordinates(polygon).T
    return abs(float(GEOD.polygon_area_perimeter(lon, lat)[0]))
