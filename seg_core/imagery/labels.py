"""The label of an image, read on the image's own pixel grid: as it is where it lies on that grid, else warped to it.

     image ┌──────────────┐
           │        ┌─────┼──────┐ label: another frame, resolution or CRS
           │        │█████│      │
           │        └─────┼──────┘
           └──────────────┘

Warping is by nearest neighbour: a pixel of the image takes the pixel of the label that its centre lies in. Where there
is none, it is not labelled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from pyproj import Transformer

from seg_core.chips import Pixels, Valid
from seg_core.errors import SegError
from seg_core.grid import Window, split
from seg_core.imagery.georef import pixel_at, position
from seg_core.imagery.raster import read_chip
from seg_core.imagery.scene import Scene, read_scene

SAME_GRID_TOLERANCE = 0.01  # px; grids of one size whose corners lie within this distance are taken for the same
NEGLIGIBLE_OFFSET = 0.5  # px; a smaller offset changes nothing where resolution and orientation are the same
EDGE_TOLERANCE = 1e-4  # px; a centre this close to the edge between two pixels counts as past it, whatever the rounding
BLOCK = 1024  # px a side of what is read of a label at once
MAX_NAMED = 3  # labels that messages name
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
GEOREFERENCE = "gdal_edit -a_srs EPSG:CODE -a_ullr ULX ULY LRX LRY"


@dataclass(frozen=True)
class AlignedLabel:
    """A label file, and the image whose grid it is read on."""

    file: Scene
    image: Scene
    warped: bool = False
    off_px: float = 0.0  # by how many rows or columns its pixels would be off at most, laid on by row and column
    finer: float = 1.0  # how many of its pixels there are along a pixel of the image

    def read(self, window: Window) -> tuple[Pixels, Valid]:
        """What the label holds for a window of its image.

        Returns pixels `uint8 (bands, height, width)` and which of them are labelled, `bool (height, width)`: not those
        beyond the label, nor those that its nodata value, mask or alpha band leaves out. What is read of the file at
        once is bounded, however fine it is. Raises ReadError where it can't be read.
        """
        if not self.warped:
            return read_chip(self.file, window)
        pixels = np.zeros((len(self.file.bands), window.height, window.width), np.uint8)
        labelled = np.zeros((window.height, window.width), np.bool_)
        for block in split(window, max(1, int(BLOCK / max(1.0, self.finer)))):
            at = block.slices(window)
            pixels[:, *at], labelled[at] = self._warp(block)
        return pixels, labelled

    def _warp(self, block: Window) -> tuple[Pixels, Valid]:
        centres = np.mgrid[block.row_off : block.bottom, block.col_off : block.right] + 0.5
        rows, cols = (place + EDGE_TOLERANCE for place in _places(self.file, self.image, *centres))
        inside = (rows >= 0) & (rows < self.file.height) & (cols >= 0) & (cols < self.file.width)
        pixels = np.zeros((len(self.file.bands), *inside.shape), np.uint8)
        labelled = np.zeros_like(inside)
        if inside.any():
            rows, cols = rows[inside].astype(np.intp), cols[inside].astype(np.intp)
            top, left = int(rows.min()), int(cols.min())
            box = Window(top, left, int(rows.max()) - top + 1, int(cols.max()) - left + 1)
            found, valid = read_chip(self.file, box)
            pixels[:, inside], labelled[inside] = found[:, rows - top, cols - left], valid[rows - top, cols - left]
        return pixels, labelled

    def check_use(self, num_valid: int, num_labelled: int) -> None:
        """Raise SegError for a warped label that holds data for none of its image's valid pixels."""
        if self.warped and num_valid and not num_labelled:
            raise SegError(
                f"{self.file.uri}: this label holds no data where its image, {self.image.uri}, does: "
                f"replace it with the image's own, or correct its georeference ({GEOREFERENCE})"
            )


def open_label(path: str, image: Scene, meanings: Sequence[int]) -> AlignedLabel:
    """The label of an image, in which those grey values have a meaning.

    A label and an image that say where they lie are matched by that, others by row and column. Raises SegError where
    the label lies elsewhere, can't be matched, is not uint8, or one of the values is its nodata value.
    """
    label = replace(read_scene(path, image.scene_id), blank_is_data=True)
    aligned = _align(label, image)
    if label.dtype != "uint8":
        raise SegError(f"{path}: its pixels are {label.dtype}, a label's are uint8 (gdal_translate -ot Byte)")
    if label.nodata in meanings:
        raise SegError(f"{path}: its nodata value is {label.nodata:g}, which is a class: gdal_edit -unsetnodata")
    return aligned


def _align(label: Scene, image: Scene) -> AlignedLabel:
    one_size = (label.height, label.width) == (image.height, image.width)
    if label.crs is None or image.crs is None:
        _check_rows_and_columns(label, image, one_size)
        return AlignedLabel(label, image)
    off, finer = _compare(label, image)
    if one_size and off <= SAME_GRID_TOLERANCE:
        return AlignedLabel(label, image)
    if not _overlaps(label, image):
        raise SegError(
            f"{label.uri}: this label lies elsewhere than its image, {image.uri}: "
            f"replace it with the image's own, or correct its georeference ({GEOREFERENCE})"
        )
    return AlignedLabel(label, image, warped=True, off_px=off, finer=finer)


def _check_rows_and_columns(label: Scene, image: Scene, one_size: bool) -> None:
    """Raise SegError where a label can't be laid on its image by row and column, for want of a georeference."""
    bare = label if label.crs is None else image
    if not one_size:
        raise SegError(
            f"{label.uri}: this label measures {label.width} x {label.height} px, its image {image.width} x "
            f"{image.height}, and {bare.uri} has no georeference to match them by: give it one ({GEOREFERENCE})"
        )
    placed = IDENTITY not in {label.transform, image.transform}
    if placed and _compare(label, image)[0] > NEGLIGIBLE_OFFSET:
        raise SegError(
            f"{label.uri}: this label and its image, {image.uri}, have different transforms, and {bare.uri} has no CRS "
            f"to match them by: give it one (gdal_edit -a_srs EPSG:CODE), or remove its transform (gdal_edit -unsetgt)"
        )


def _compare(label: Scene, image: Scene) -> tuple[float, float]:
    """By how many rows or columns the label's grid is off at the image's corners, and its pixels along the image's."""
    rows, cols = np.array([0.0, 0, image.height, image.height]), np.array([0.0, image.width, 0, image.width])
    found_rows, found_cols = _places(label, image, rows, cols)
    diagonal = np.hypot(found_rows[3] - found_rows[0], found_cols[3] - found_cols[0])
    off = np.nan_to_num(np.abs([found_rows - rows, found_cols - cols]).max(), nan=np.inf)
    return float(off), float(np.nan_to_num(diagonal / np.hypot(image.height, image.width), nan=1.0, posinf=1.0))


def _overlaps(label: Scene, image: Scene) -> bool:
    """Whether the label's frame reaches into the rectangle of its pixels around the image."""
    lattice = np.meshgrid(np.linspace(0, image.height, 17), np.linspace(0, image.width, 17))
    places = np.stack(_places(label, image, *lattice)).reshape(2, -1)
    places = places[:, np.isfinite(places).all(axis=0)]
    if not places.size:
        return False
    (top, left), (bottom, right) = places.min(axis=1), places.max(axis=1)
    return bool(top < label.height and left < label.width and bottom > 0 and right > 0)


@lru_cache(maxsize=64)
def _between(crs: str, other: str) -> Transformer:
    return Transformer.from_crs(crs, other, always_xy=True)


def _places(label: Scene, image: Scene, rows: Any, cols: Any) -> tuple[Any, Any]:
    """Rows and columns on the label, as numbers, of places on its image; not finite where its CRS has none."""
    x, y = position(image.transform, rows, cols)
    if label.crs is not None and image.crs is not None and label.crs != image.crs:
        x, y = _between(image.crs, label.crs).transform(x, y)
    with np.errstate(invalid="ignore"):
        return pixel_at(label.transform, x, y)


def describe_warps(off_px: Mapping[str, float]) -> list[str]:
    """Lines on the labels that were warped, by the distance in px that they would have been off."""
    noticed = [(path, off) for path, off in off_px.items() if off > NEGLIGIBLE_OFFSET]
    lines = [
        f"{path}: warped to the pixel grid of its image: laid on by row and column, it would be up to {off:.1f} px off"
        for path, off in noticed[:MAX_NAMED]
    ]
    more = len(noticed) - MAX_NAMED
    return [*lines, f"and {more} more labels were warped"] if more > 0 else lines
