"""Give polygons of pixels the outlines of buildings: fewer vertices, and right angles.

    pixels ─▶ simplify (Douglas & Peucker 1973) ─▶ turn by the main direction ─▶ each run of edges that go the same way
                                                                                 becomes one edge, at its mean position

This is done at several tolerances and in two directions. Of the outlines that cover the pixels about as well as the
best one, the one with the fewest vertices is taken.
"""

from collections.abc import Iterator

import numpy as np
import shapely
from numpy.typing import NDArray

from seg_core.imagery.area_projection import Geometries

TOLERANCES = (1.0, 1.5, 2.0)  # px
WORSE = 0.03  # of IoU with the pixels, by which the outline that is taken may be worse than the best one
MAX_VERTICES = 5000
LEAST_IOU = 0.7  # with the pixels; below it, the outline is only simplified


def drop_collinear(polygons: Geometries) -> Geometries:
    """Return polygons without the vertices at which they go straight on, each ring from its lowest left vertex."""
    clean: Geometries = shapely.normalize(shapely.simplify(shapely.normalize(polygons), 0.0))
    return clean


def regularize(polygon: shapely.Polygon, pixel: float) -> shapely.Polygon:
    """Return an outline with right angles for a polygon of pixels, whose sides measure `pixel`.

    It is a valid polygon. A building that has no right angles, so that no such outline fits, is only simplified, and so
    is one of more than MAX_VERTICES, which is no building but takes minutes.
    """
    if shapely.get_num_coordinates(polygon) > MAX_VERTICES:
        return shapely.simplify(polygon, TOLERANCES[0] * pixel)
    found = np.array(list(_rectangular_outlines(polygon, pixel)), object)
    shared = shapely.area(shapely.intersection(found, polygon))
    iou = shared / (shapely.area(found) + polygon.area - shared)
    fits = iou >= max(iou.max() - WORSE, LEAST_IOU)
    if not fits.any():
        return shapely.simplify(polygon, TOLERANCES[0] * pixel)
    vertices = np.where(fits, shapely.get_num_coordinates(found), np.inf)
    chosen: shapely.Polygon = found[np.lexsort((-iou, vertices))[0]]
    return chosen


def _rectangular_outlines(polygon: shapely.Polygon, pixel: float) -> Iterator[shapely.Polygon]:
    """Yield outlines with right angles; one of them is the smallest rectangle around the polygon."""
    rectangle = shapely.minimum_rotated_rectangle(polygon)
    yield rectangle
    along = _edges(rectangle.exterior)[0]
    for tolerance in TOLERANCES:
        simple = shapely.simplify(polygon, tolerance * pixel)
        for angle in (np.arctan2(along[1], along[0]), _main_direction(simple)):
            outline = _straighten(simple, float(angle))
            if outline is not None:
                yield outline


def _edges(ring: shapely.LinearRing) -> NDArray[np.float64]:
    return np.diff(shapely.get_coordinates(ring), axis=0)


def _main_direction(polygon: shapely.Polygon) -> float:
    """Return the direction in radians of which the edges differ least, but for right angles."""
    edges = _edges(polygon.exterior)
    # Four times an angle is the same for all sides of a rectangle. Long edges count for more.
    turned = np.exp(4j * np.arctan2(edges[:, 1], edges[:, 0])) * np.hypot(*edges.T) ** 1.5
    return float(np.angle(turned.sum()) / 4)


def _straighten(polygon: shapely.Polygon, angle: float) -> shapely.Polygon | None:
    """Return a polygon whose edges have this angle in radians or stand upright on it; None if there is none."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = shapely.get_coordinates(polygon.centroid)
    rings = [_straighten_ring((shapely.get_coordinates(ring) - centre) @ turn) for ring in _rings(polygon)]
    if rings[0] is None:
        return None
    shell, *holes = (ring @ turn.T + centre for ring in rings if ring is not None)
    found = shapely.Polygon(shell, holes)
    return found if found.is_valid and found.area else None


def _rings(polygon: shapely.Polygon) -> list[shapely.LinearRing]:
    return [polygon.exterior, *polygon.interiors]


def _straighten_ring(corners: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return a closed ring `(vertices, 2)` of level and upright edges; None if it would have fewer than four.

    Edges that follow each other and are both more level than upright, or neither, become one edge.
    """
    edges, middles = np.diff(corners, axis=0), (corners[:-1] + corners[1:]) / 2
    is_level = np.abs(edges[:, 0]) >= np.abs(edges[:, 1])
    turns = np.flatnonzero(is_level != np.roll(is_level, 1))
    if len(turns) < 4:
        return None
    first = turns[0]
    edges, middles = (np.roll(each, -first, axis=0) for each in (edges, middles))
    is_level = np.roll(is_level, -first)
    starts = turns - first
    # A level edge keeps its y, an upright one its x. Longer edges of a run count for more.
    position = np.where(is_level, middles[:, 1], middles[:, 0])
    length = np.abs(np.where(is_level, edges[:, 0], edges[:, 1]))
    kept = np.add.reduceat(position * length, starts) / np.add.reduceat(length, starts)
    following, level = np.roll(kept, -1), is_level[starts]
    vertices = np.stack([np.where(level, following, kept), np.where(level, kept, following)], axis=1)
    return np.concatenate([vertices, vertices[:1]])
