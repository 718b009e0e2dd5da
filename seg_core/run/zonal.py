"""Polygons over the tiles of a run: which tiles lie within which areas, and pixels at borders by their share within.

Areas may overlap: each is measured by itself.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import NamedTuple

import geopandas
import numpy as np
import shapely
from numpy.typing import NDArray

from seg_core.grid import Window
from seg_core.imagery.area_projection import LONLAT, Geometries, ground_area, project_areas, require_crs
from seg_core.imagery.georef import pixel_at, position
from seg_core.imagery.scene import Scene

PREPARED = Lock()  # held while prepared polygons are used, which GEOS does not allow in two threads at once
ROUNDING_PX = 1e-6  # pixels; a smaller count is none, and not ground of which a coverage could be said
Tiles = Sequence[Window] | NDArray[np.int32]
"""Windows of tiles, also as an array of their fields, `(tiles, 4)`."""


class Projected(NamedTuple):
    """Areas in one CRS."""

    polygons: Geometries
    tree: shapely.STRtree


@dataclass(frozen=True)
class Areas:
    """Polygons to measure: an id column and valid geometries, in a CRS of their own."""

    frame: geopandas.GeoDataFrame
    num_repaired: int = 0  # polygons that were invalid

    @property
    def id_column(self) -> str:
        """The name of the column that tells areas from each other."""
        return str(self.frame.columns[0])

    @cached_property
    def _by_crs(self) -> dict[str, Projected]:
        return {}

    def projected(self, crs: str) -> Projected:
        """Return the areas in the CRS of a scene that they were projected to."""
        return self._by_crs[crs]

    def project_to(self, scenes: Sequence[Scene]) -> None:
        """Project the areas to the CRS of each scene ahead of use. Raises SegError for a scene without one."""
        by_crs = defaultdict(list)
        for scene in scenes:
            by_crs[require_crs(scene)].append(scene)
        for crs, its_scenes in by_crs.items():
            polygons = project_areas(self.frame.geometry, crs, its_scenes)
            shapely.prepare(polygons)
            self._by_crs[crs] = Projected(polygons, shapely.STRtree(polygons))

    @cached_property
    def ground_m2(self) -> NDArray[np.float64]:
        """The geodesic area of each polygon in square metres, `(areas,)`."""
        return np.array([ground_area(each) for each in self.frame.geometry.to_crs(LONLAT)])


class Pairs(NamedTuple):
    """Tiles and the areas that they share ground with, `(pairs,)` each."""

    tile: NDArray[np.intp]  # number of the tile
    area: NDArray[np.intp]  # number of the area
    # What they share, in pixels of the scene: x is the column, and y the row, negated. None if it is the whole tile.
    piece: Geometries

    @property
    def is_whole(self) -> NDArray[np.bool_]:
        """Whether the tile lies within the area."""
        return np.asarray(shapely.is_missing(self.piece))


def pair_tiles(areas: Areas, scene: Scene, tiles: Tiles) -> Pairs:
    """Find the areas that share ground with tiles of a scene. Those that only touch them are left out.

    Tiles that lie near each other are best asked for together: an area that covers them all, or none, is found at once.
    """
    assert scene.crs is not None  # see project_to
    with PREPARED:
        return _pair(areas.projected(scene.crs), scene, np.asarray(tiles, np.float64).reshape(-1, 4))


def _pair(projected: Projected, scene: Scene, windows: NDArray[np.float64]) -> Pairs:
    (around,) = _outlines(scene, _bounding_window(windows))
    near = projected.tree.query(around, predicate="intersects")
    covers = shapely.covers(projected.polygons[near], around)
    whole, partial = near[covers], near[~covers]
    pairs = [
        Pairs(
            np.tile(np.arange(len(windows)), len(whole)),
            np.repeat(whole, len(windows)),
            _nothing(len(windows) * len(whole)),
        )
    ]
    if len(partial):
        pairs.append(_pair_each(projected.polygons, partial, scene, _outlines(scene, windows)))
    return Pairs(*(np.concatenate(each) for each in zip(*pairs, strict=True)))


def _pair_each(polygons: Geometries, areas: NDArray[np.intp], scene: Scene, outlines: Geometries) -> Pairs:
    """Compare each of some areas with each outline of a tile."""
    area, tile = shapely.STRtree(outlines).query(polygons[areas], predicate="intersects")
    area = areas[area]
    piece = _nothing(len(tile))
    at_border = ~shapely.covers(polygons[area], outlines[tile])
    piece[at_border] = _to_pixels(shapely.intersection(polygons[area[at_border]], outlines[tile[at_border]]), scene)
    shared = ~at_border | (shapely.area(piece) > 0)
    return Pairs(tile[shared], area[shared], piece[shared])


def _nothing(number: int) -> Geometries:
    return np.full(number, None, object)


def _bounding_window(windows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the smallest window that holds all of some, `(1, 4)`."""
    first, last = windows[:, :2].min(axis=0), (windows[:, :2] + windows[:, 2:]).max(axis=0)
    return np.concatenate([first, last - first])[None]


def _outlines(scene: Scene, windows: NDArray[np.float64]) -> Geometries:
    """Return the outlines of windows `(number, 4)` in the CRS of their scene."""
    top, left, height, width = windows.T
    bottom, right = top + height, left + width
    corners = [
        position(scene.transform, *each) for each in ((top, left), (bottom, left), (bottom, right), (top, right))
    ]
    if scene.transform[1] == scene.transform[3] == 0:
        return np.asarray(shapely.box(*corners[0], *corners[2]), object)  # much quicker
    return np.asarray(shapely.polygons(np.stack([np.stack(each, axis=-1) for each in corners], axis=1)), object)


def _to_pixels(pieces: Geometries, scene: Scene) -> Geometries:
    def convert(points: NDArray[np.float64]) -> NDArray[np.float64]:
        rows, cols = pixel_at(scene.transform, points[:, 0], points[:, 1])  # type: ignore[arg-type]
        return np.stack([cols, -rows], axis=1)

    return np.asarray(shapely.transform(pieces, convert), object)


def count_pixels(
    layers: Mapping[str, NDArray[np.bool_]], tile: Window, pieces: Sequence[tuple[int, shapely.Geometry]]
) -> Iterator[tuple[int, dict[str, float]]]:
    """Count the pixels of a tile that are set in each layer, by the share of each pixel within an area.

    `layers` are `(height, width)` each. `pieces` are the numbers of areas that the tile is partly in, each with the
    piece of it within the tile, as in Pairs. Yields the number of each area, and its count in each layer.
    """
    full = {name for name, pixels in layers.items() if pixels.all()}
    mixed = {
        name: (pixels, np.flatnonzero(pixels)) for name, pixels in layers.items() if name not in full and pixels.any()
    }
    for area, piece in pieces:
        found = dict.fromkeys(layers, 0.0) | dict.fromkeys(full, float(piece.area))
        found |= _count_within(piece, tile, mixed) if mixed else {}
        yield area, {name: number if number > ROUNDING_PX else 0.0 for name, number in found.items()}


def _count_within(
    polygon: shapely.Geometry, tile: Window, layers: Mapping[str, tuple[NDArray[np.bool_], NDArray[np.intp]]]
) -> dict[str, float]:
    """Count the pixels that are set by their share within a polygon. A layer is its pixels, and where they are set.

    By Green's theorem this is the integral of f dy along the polygon's border, where f(x, y) counts the pixels of the
    row at y that lie to the left of x. Within a pixel f is linear, so that its value at the middle of each segment of
    the border is enough.
    """
    x, y, dy = _cut_at_pixels(polygon)
    x -= tile.col_off
    col = np.clip(np.floor(x).astype(np.intp), 0, tile.width - 1)
    row = np.clip(np.floor(-y).astype(np.intp) - tile.row_off, 0, tile.height - 1)
    first = row * tile.width
    counts = {}
    for name, (pixels, is_set) in layers.items():
        to_the_left = np.searchsorted(is_set, first + col) - np.searchsorted(is_set, first)
        counts[name] = float(np.dot(to_the_left + pixels[row, col] * (x - col), dy))
    return counts


def _cut_at_pixels(polygon: shapely.Geometry) -> tuple[NDArray[np.float64], ...]:
    """Cut the border of a polygon into segments within one pixel each. Returns x and y of their middle, and their dy.

    Shells go counter-clockwise and holes clockwise. Segments without dy are left out.
    """
    rings = shapely.get_rings(shapely.get_parts(shapely.orient_polygons(polygon)))
    points, ring = shapely.get_coordinates(rings, return_index=True)
    is_edge = (ring[1:] == ring[:-1]) & (points[1:, 1] != points[:-1, 1])
    start, vector = points[:-1][is_edge], np.diff(points, axis=0)[is_edge]
    end = points[1:][is_edge]
    first = np.floor(np.minimum(start, end)) + 1  # the first line between pixels that an edge crosses
    crossed = np.maximum(np.ceil(np.maximum(start, end)) - first, 0).astype(np.intp)
    edges, steps = [np.arange(len(start))] * 2, [np.zeros(len(start)), np.ones(len(start))]  # the ends of each edge
    for axis, number in enumerate(crossed.T):
        edge = np.repeat(np.arange(len(start)), number)
        line = first[edge, axis] + np.arange(len(edge)) - np.repeat(np.cumsum(number) - number, number)
        edges.append(edge)
        steps.append((line - start[edge, axis]) / vector[edge, axis])
    edge, step = np.concatenate(edges), np.concatenate(steps)
    order = np.lexsort((step, edge))
    edge, step = edge[order], step[order]
    is_segment = edge[1:] == edge[:-1]
    edge, middle, length = edge[1:][is_segment], ((step[1:] + step[:-1]) / 2)[is_segment], np.diff(step)[is_segment]
    x, y = (start[edge] + middle[:, None] * vector[edge]).T
    return x, y, length * vector[edge, 1]
