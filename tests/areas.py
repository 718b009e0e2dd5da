"""Polygons on the first scene of a run made by hand, and what the pixels of a mask say of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import shapely
from conftest import NORTH_UP, UTM
from numpy.typing import NDArray
from runs import rows_of

from seg_core.imagery.georef import Transform
from seg_core.run.export_masks import read_mask

Floats = NDArray[np.float64]
X, Y = NORTH_UP[2], NORTH_UP[5]  # the corner of the scene, whose pixels measure 1 m


def at(left: float, top: float, right: float, bottom: float) -> shapely.Polygon:
    """A rectangle of the scene, in m from its corner."""
    return shapely.box(X + left, Y - bottom, X + right, Y - top)


POLYGONS = {
    "one tile": at(0, 0, 32, 32),
    "within a tile": at(3, 2, 21, 19),
    "parts of pixels": at(10.25, 5.5, 70.125, 60.75),
    "a triangle": shapely.Polygon([(X + 5, Y - 90), (X + 110, Y - 70.3), (X + 40.7, Y - 3)]),
    "a hole": at(2, 2, 90, 90).difference(at(20.5, 20.5, 60, 70)),
    "two parts": shapely.MultiPolygon([at(1, 1, 20, 20.5), at(80, 40, 100.5, 99)]),
    "half outside": at(60.5, -50, 300, 50),
    "no data": at(65, 35, 105, 65),
}


def save(path: Path, polygons: Sequence[Any], crs: str = UTM, **columns: Any) -> None:
    """Write polygons and their attributes as a vector file."""
    geopandas.GeoDataFrame(columns, geometry=list(polygons), crs=crs).to_file(path)


def pixel_shares(shape: tuple[int, ...], transform: Transform, polygon: shapely.Polygon) -> Floats:
    """The share of each pixel of a scene that lies in a polygon of the scene's CRS."""
    a, b, c, d, e, f = transform
    rows, cols = np.indices(shape, np.float64)
    corners = [(cols + x, rows + y) for x, y in ((0, 0), (0, 1), (1, 1), (1, 0), (0, 0))]
    outlines = np.stack([np.stack([a * x + b * y + c, d * x + e * y + f], -1) for x, y in corners], -2)
    shared = shapely.intersection(shapely.polygons(outlines), polygon)
    return np.asarray(shapely.area(shared) / abs(a * e - b * d))


def pixel_areas(run: str, scene_id: str, shape: tuple[int, ...]) -> Floats:
    """The square metres of each pixel of a scene, even over a tile; 0 in tiles without a valid pixel."""
    found = np.zeros(shape)
    for row in rows_of(run):
        if row["scene_id"] == scene_id and row["status"] == "done" and row["valid_px"]:
            top, left = row["row_off"], row["col_off"]
            found[top : top + row["height"], left : left + row["width"]] = row["area_m2"] / row["valid_px"]
    return found


def expected_sums(run: str, scene_id: str, transform: Transform, polygon: shapely.Polygon) -> dict[str, float]:
    """Valid and building area in a polygon of the scene's CRS, from the mask and the share of each pixel within it."""
    mask = read_mask(run, scene_id)
    pixels = pixel_shares(mask.shape, transform, polygon) * pixel_areas(run, scene_id, mask.shape)
    valid = float(pixels[mask != 255].sum())
    return {"valid_m2": valid, "building_m2": float(pixels[mask == 1].sum()) if valid else np.nan}
