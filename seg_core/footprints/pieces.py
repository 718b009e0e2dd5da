"""Find the buildings of a part of a run: pixels of its mask that share sides (4-connectivity), as polygons.

Polygons follow the sides of pixels. Their coordinates are columns and rows of the image, so they are whole numbers. A
building that reaches the side of the part may go on in the next part: it is a piece, which `merge` joins with others.

    ┌─────────────┬─────
    │   ■■■    ▓▓▓│▓▓       ■ whole
    │   ■■        │         ▓ a piece
    └─────────────┴─────
"""

from dataclasses import dataclass
from typing import TypeVar

import cv2
import geopandas
import numpy as np
import rasterio.features
import shapely
from numpy.typing import NDArray
from rasterio import Affine

from seg_core.chips import MISSING
from seg_core.grid import Window, intersects
from seg_core.imagery.georef import ground_size, window_transform
from seg_core.run.export_masks import decode_pixels
from seg_core.run.part_reading import read_rows
from seg_core.run.parts import Location
from seg_core.run.plan import Part, Settings
from seg_core.run.rows import decode_probability

UNKNOWN = -1  # in a side: no data, failed, or not done yet
BACKGROUND = -2
COLUMNS = (*Window._fields, "status", "valid_px", "building_px", "area_m2", "mask", "valid", "probability")
T = TypeVar("T", bound=np.generic)

CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


@dataclass(frozen=True)
class Pieces:
    """The buildings of a part that may go on in the next part."""

    window: Window
    buildings: geopandas.GeoDataFrame  # see `find_buildings`
    sides: dict[str, NDArray[np.int32]]  # for each pixel: the number of its piece, UNKNOWN, or BACKGROUND


@dataclass(frozen=True)
class _Pixels:
    """What the rows of a part say of its pixels, `(height, width)` each; `pixel_m2` of its tiles."""

    state: NDArray[np.uint8]  # 1 is building, 0 is not, else MISSING
    levels: NDArray[np.uint8] | None
    pixel_m2: NDArray[np.float64]  # (tile rows, tile columns)


def find_buildings(settings: Settings, part: Part, location: Location | None) -> tuple[geopandas.GeoDataFrame, Pieces]:
    """Return the buildings of a part that are whole, and the others. Nothing is known if its location is None.

    The window of the part may be some whole tiles of those that lie there.

    The columns are `building_px`; `building_m2`, null without a CRS; `level_sum`, of the probabilities in 255ths, null
    if they are not kept; `first`, the number of its first pixel in the image, row by row; `touches_gap`, whether it
    touches ground of which nothing is known; `pixel_height` and `pixel_width` in metres, null without a CRS; and
    `geometry`. Raises SegError if its rows can't be read, or as `decode_pixels` does.
    """
    pixels = _read_pixels(settings, part, location)
    found = cv2.connectedComponents(_ones(pixels.state == 1), connectivity=4, ltype=cv2.CV_32S)
    number, labels = found[0] - 1, np.asarray(found[1], np.int32)
    frame = _measure(pixels, labels, number, part, settings.tile_size)
    on_sides, at_edge = _sides(labels), _at_edge(part)
    touched = {True: np.zeros(number + 1, np.bool_), False: np.zeros(number + 1, np.bool_)}
    for name, side in on_sides.items():
        touched[at_edge[name]][side] = True
    frame["touches_gap"] |= touched[True][1:]
    is_piece = touched[False]
    is_piece[0] = False
    numbers = np.where(is_piece, np.cumsum(is_piece) - 1, BACKGROUND).astype(np.int32)
    sides = {
        name: np.where(state == MISSING, np.int32(UNKNOWN), numbers[on_sides[name]])
        for name, state in _sides(pixels.state).items()
    }
    return frame[~is_piece[1:]], Pieces(part.window, frame[is_piece[1:]], sides)


def _sides(pixels: NDArray[T]) -> dict[str, NDArray[T]]:
    """Return the outermost pixels of a part on each side."""
    return {"top": pixels[0], "bottom": pixels[-1], "left": pixels[:, 0], "right": pixels[:, -1]}


def _at_edge(part: Part) -> dict[str, bool]:
    """Whether each side of a part is at the edge of its image."""
    window, image = part.window, part.scene.window
    return {
        "top": window.row_off == image.row_off,
        "bottom": window.bottom == image.bottom,
        "left": window.col_off == image.col_off,
        "right": window.right == image.right,
    }


def _read_pixels(settings: Settings, part: Part, location: Location | None) -> _Pixels:
    """Read the pixels of a part, or of some tiles of it, from its rows."""
    window, size = part.window, settings.tile_size
    state = np.full(window.shape, MISSING, np.uint8)
    levels = np.zeros(window.shape, np.uint8) if settings.keep_probability else None
    pixel_m2 = np.full((-(-window.height // size), -(-window.width // size)), np.nan)
    for row in read_rows(location, COLUMNS) if location else ():
        tile = Window.from_row(row)
        if row["status"] != "done" or not row["valid_px"] or not intersects(tile, window):
            continue
        at = tile.slices(window)
        state[at] = decode_pixels(row, part, settings.scale)
        if levels is not None:
            levels[at] = decode_probability(row)
        if row["area_m2"] is not None:
            pixel_m2[at[0].start // size, at[1].start // size] = row["area_m2"] / row["valid_px"]
    return _Pixels(state, levels, pixel_m2)


def _measure(
    pixels: _Pixels, labels: NDArray[np.int32], number: int, part: Part, tile_size: int
) -> geopandas.GeoDataFrame:
    """Return polygons and figures of the buildings that are labelled 1 to `number`, in this order."""
    window, image = part.window, part.scene
    places = np.flatnonzero(pixels.state == 1)
    rows, cols = np.divmod(places, window.width)
    building = labels.ravel()[places] - 1
    first = np.empty(number, np.int64)
    # The last one that is written counts, and pixels are in the order of rows.
    first[building[::-1]] = ((rows + window.row_off) * image.width + cols + window.col_off)[::-1]
    of_pixels = pixels.pixel_m2[rows // tile_size, cols // tile_size]
    levels = None if pixels.levels is None else pixels.levels[rows, cols]
    gap, touches_gap = pixels.state == MISSING, np.zeros(number + 1, np.bool_)
    if gap.any():
        touches_gap[labels[cv2.dilate(_ones(gap), CROSS) > 0]] = True
    height, width = (np.nan, np.nan)
    if image.crs is not None:
        height, width = ground_size(image.crs, window_transform(image.transform, window), *window.shape)
    columns = {
        "building_px": np.bincount(building, minlength=number),
        "building_m2": np.bincount(building, of_pixels, number),
        "level_sum": np.full(number, np.nan) if levels is None else np.bincount(building, levels, number),
        "first": first,
        "touches_gap": touches_gap[1:],
        "pixel_height": np.full(number, height),
        "pixel_width": np.full(number, width),
    }
    return geopandas.GeoDataFrame(columns, geometry=_outline(labels, number, window))


def _outline(labels: NDArray[np.int32], number: int, window: Window) -> NDArray[np.object_]:
    """Return the polygon of each label from 1 to `number`."""
    polygons = np.full(number, None)
    shapes = rasterio.features.shapes(
        labels, labels > 0, connectivity=4, transform=Affine.translation(window.col_off, window.row_off)
    )
    for shape, label in shapes:
        shell, *holes = shape["coordinates"]
        polygons[int(label) - 1] = shapely.Polygon(shell, holes)
    return polygons


def _ones(true: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return true.view(np.uint8)
