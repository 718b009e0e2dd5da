"""The table of footprints: a row for each building, with its polygon in the CRS that was chosen."""

import geopandas
import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray
from pyproj import Transformer

from seg_core.errors import SegError
from seg_core.footprints.outlines import drop_collinear, regularize
from seg_core.footprints.shape import Shape
from seg_core.imagery.area_projection import Geometries
from seg_core.imagery.georef import Transform, position, split_at_antimeridian, unwrap
from seg_core.imagery.scene import Scene
from seg_core.run.schema import BBOX

FULL_LEVEL = 255  # of a probability of 1
IDENTITY: Transform = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
ROWS_DOWN: Transform = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)

FOOTPRINTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("scene_id", pa.string(), nullable=False),
        pa.field("building_px", pa.int64(), nullable=False),
        pa.field("area_m2", pa.float64()),
        pa.field("perimeter_m", pa.float64()),
        pa.field("confidence", pa.float64()),
        pa.field("touches_gap", pa.bool_(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("geometry", pa.binary(), nullable=False),
        pa.field("bbox", BBOX, nullable=False),
    ]
)


def make_table(buildings: geopandas.GeoDataFrame, image: Scene, shape: Shape, model: str) -> pa.Table:
    """Return the table of buildings of an image, by their first pixel.

    The columns of `buildings` are those of `find_buildings`. Raises SegError if the CRS does not cover one of them.
    """
    buildings = buildings[~(buildings["building_m2"] < shape.min_area)].sort_values("first")
    unit = np.stack([buildings["pixel_width"], buildings["pixel_height"]], axis=1)
    unit = np.where(np.isnan(unit), 1.0, unit)
    polygons = _scaled(drop_collinear(buildings.geometry.to_numpy()), unit)
    if shape.regularize:
        pixels = np.sqrt(unit.prod(axis=1))
        polygons = np.array([regularize(*each) for each in zip(polygons, pixels, strict=True)], object)
    if shape.simplify:
        polygons = shapely.simplify(polygons, shape.simplify)
    pixel_m2 = buildings["building_m2"].to_numpy() / buildings["building_px"].to_numpy()
    area_m2 = shapely.area(polygons) / unit.prod(axis=1) * pixel_m2
    perimeter = np.where(np.isnan(area_m2), np.nan, shapely.length(polygons))
    rows, cols = np.divmod(buildings["first"].to_numpy(), image.width)
    geometry, boxes = _place(_scaled(polygons, 1 / unit), image, shape)
    columns = {
        "id": [f"{image.scene_id}:{row}:{col}" for row, col in zip(rows, cols, strict=True)],
        "scene_id": pa.repeat(image.scene_id, len(buildings)),
        "building_px": buildings["building_px"].to_numpy(),
        "area_m2": pa.array(area_m2, from_pandas=True),
        "perimeter_m": pa.array(perimeter, from_pandas=True),
        "confidence": pa.array(
            (buildings["level_sum"] / buildings["building_px"] / FULL_LEVEL).to_numpy(), from_pandas=True
        ),
        "touches_gap": buildings["touches_gap"].to_numpy(),
        "model": pa.repeat(model, len(buildings)),
        "geometry": shapely.to_wkb(geometry),
        "bbox": pa.StructArray.from_arrays(list(boxes.T), fields=list(BBOX)),
    }
    return pa.table(columns, schema=FOOTPRINTS)


def ground_transform(image: Scene) -> Transform:
    """Return the transform of an image; without one, rows count downwards from 0, as in QGIS."""
    return ROWS_DOWN if image.transform == IDENTITY else image.transform


def _scaled(polygons: Geometries, unit: NDArray[np.float64]) -> Geometries:
    """Return polygons `(number,)` whose coordinates are multiplied by units, `(number, 2)`."""
    points, polygon = shapely.get_coordinates(polygons, return_index=True)
    scaled: Geometries = shapely.set_coordinates(polygons.copy(), points * unit[polygon])
    return scaled


def _place(polygons: Geometries, image: Scene, shape: Shape) -> tuple[Geometries, NDArray[np.float64]]:
    """Return polygons of pixels in the chosen CRS, and their boxes `(number, 4)`."""
    transform = ground_transform(image)
    placed = shapely.transform(polygons, lambda points: np.stack(position(transform, *points.T[::-1]), axis=1))
    if shape.crs is not None and image.crs != shape.crs:
        to_crs = Transformer.from_crs(image.crs, shape.crs, always_xy=True)
        placed = shapely.transform(placed, lambda points: np.stack(to_crs.transform(*points.T), axis=1))
    boxes = shapely.bounds(placed).reshape(-1, 4)
    if not np.isfinite(boxes).all():
        raise SegError(f"--crs {shape.crs}: does not cover {image.scene_id}: name another one")
    if shape.cut or (shape.is_geographic and (np.abs(boxes[:, [0, 2]]) > 180).any()):
        whole = np.array([shapely.transform(each, _unwrap) for each in placed], object)
        placed, within = split_at_antimeridian(whole)
        boxes = np.array(within).reshape(-1, 4)
    if shape.cut:
        placed = np.array([shapely.multipolygons(shapely.get_parts(each)) for each in placed], object)
    return shapely.orient_polygons(placed), boxes


def _unwrap(points: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([unwrap(points[None, :, 0])[0], points[:, 1]], axis=1)
