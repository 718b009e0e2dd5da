"""Outlines of what was found, for a map that is zoomed in: of all of a small region, of some tiles of a large one."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import shapely

from seg_core.errors import SegError
from seg_core.footprints.export import find_footprints
from seg_core.footprints.pieces import find_buildings
from seg_core.footprints.shape import Shape
from seg_core.footprints.table import ground_transform
from seg_core.imagery.area_projection import Geometries
from seg_core.imagery.georef import pixel_at
from seg_core.imagery.scene import Scene
from seg_core.report.frame import Frame
from seg_core.report.part_finder import PartFinder
from seg_core.report.tiles import Tally
from seg_core.run.parts import find_parts
from seg_core.threads import count_cpus, for_each

MAX_PIXELS = 400_000_000  # of a region whose outlines are all looked for
MAX_VERTICES = 100_000  # of a page, some 25 bytes each
TOLERANCE = 1.0  # px that an outline may be off the mask

Lines = list[list[float]]
Found = tuple[Scene, Geometries]  # an image, and polygons `(number,)` of its pixels: x is the column, y the row


@dataclass
class Outlines:
    """Outlines as closed lines in the coordinates of the map."""

    xs: Lines = field(default_factory=list)
    ys: Lines = field(default_factory=list)
    num_shapes: int = 0
    num_vertices: int = 0
    num_tiles: int | None = None  # that are outlined; None: all of the region
    pixel: float = 1.0  # width of a pixel of the imagery on the map
    problem: str = ""  # why there are none


def draw_outlines(
    run: str, tally: Tally, frame: Frame, cells: Collection[int], report: Callable[[str], None] = lambda _: None
) -> Outlines:
    """Draw the outlines of what a run has found, at most TOLERANCE pixels off.

    If the region is large, only the best tiles of these cells of the map are outlined, those with the most first, and
    what reaches beyond a tile is cut there. `report` is called with a text for each part. Masks that can't be read are
    a `problem`, no error.
    """
    found = Outlines(pixel=_pixel(frame)) if frame.images else Outlines()
    try:
        if tally.plan.counts["pixels"] > MAX_PIXELS or not _add(found, frame, _find_all(run, tally, report)):
            found = Outlines(pixel=found.pixel, num_tiles=0)
            _add(found, frame, _find_some(run, tally, cells, report))
    except SegError as error:  # masks of a run of an older version may need the scenes
        return Outlines(problem=str(error))
    return found


def _pixel(frame: Frame) -> float:
    box, image = frame.box(frame.images[0]), frame.images[0]
    return (box.right - box.left) / image.width


def _add(outlines: Outlines, frame: Frame, found: Iterable[Found]) -> bool:
    """Add shapes as long as there is room. Returns whether all had room."""
    digits = max(0, math.ceil(-math.log10(outlines.pixel / 4)))
    for image, polygons in found:
        rings = shapely.get_rings(shapely.simplify(polygons, TOLERANCE))
        points, ring = shapely.get_coordinates(rings, return_index=True)
        if outlines.num_vertices + len(points) > MAX_VERTICES:
            return False
        x, y = frame.locate(image, points[:, 1], points[:, 0])
        ends = np.flatnonzero(np.diff(ring)) + 1
        for lines, values in ((outlines.xs, x), (outlines.ys, y)):
            lines += [each.tolist() for each in np.split(values.round(digits), ends) if len(each)]
        outlines.num_vertices += len(points)
        outlines.num_shapes += len(polygons)
        if outlines.num_tiles is not None:
            outlines.num_tiles += 1
    return True


def _find_all(run: str, tally: Tally, report: Callable[[str], None]) -> Iterator[Found]:
    """Yield all shapes of a run, whole across tiles and parts."""
    images = {image.scene_id: image for image in tally.plan.images}
    for table in find_footprints(run, Shape(crs=None), report):
        if len(table):
            image = images[table["scene_id"][0].as_py()]
            placed = shapely.from_wkb(table["geometry"].to_numpy())
            yield image, _to_pixels(placed, image)


def _to_pixels(placed: Geometries, image: Scene) -> Geometries:
    """Return polygons in the coordinates of an image as polygons of its pixels."""
    rows, cols = pixel_at(ground_transform(image), *shapely.get_coordinates(placed).T)
    pixels: Geometries = shapely.set_coordinates(placed, np.stack([cols, rows], axis=1))
    return pixels


def _find_some(run: str, tally: Tally, cells: Collection[int], report: Callable[[str], None]) -> Iterator[Found]:
    """Yield the shapes of the best tile of each cell, those with the most first."""
    plan, finder, there = tally.plan, PartFinder(tally.plan), find_parts(run)
    settings = replace(plan.settings, keep_probability=False)
    best = sorted((tally.best[cell] for cell in cells), key=lambda tile: -tile.building_px)
    tiles = [tile for tile in best if tile.building_px > 0]

    def find(number: int) -> Found:
        tile = tiles[number]
        part = finder.find(tile.image, tile.window)
        whole, cut = find_buildings(settings, replace(part, window=tile.window), there.get(part.key))
        return part.scene, np.concatenate([whole.geometry.to_numpy(), cut.buildings.geometry.to_numpy()])

    for number, found in enumerate(for_each(find, range(len(tiles)), count_cpus()), 1):
        report(f"{number:,} of {len(tiles):,} tiles")
        yield found
