"""The label of an image, read on the image's pixel grid. It is warped if it is not on that grid.

     image ┌──────────────┐
           │        ┌─────┼──────┐ label: another frame, resolution or CRS
           │        │█████│      │
           │        └─────┼──────┘
           └──────────────┘

Labels are warped by nearest neighbour: a pixel of the image takes the pixel of the label that contains its centre.
Pixels of the image outside the label are not labelled.
"""

import posixpath
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
from seg_core.imagery.headers import read_scene
from seg_core.imagery.raster import read_chip
from seg_core.imagery.scene import Scene
from seg_core.storage.files import stat

SAME_GRID_TOLERANCE = 0.01  # px; grids of equal size are the same if their corners are within this distance
NEGLIGIBLE_OFFSET = 0.5  # px; a smaller offset changes nothing if resolution and orientation are the same
EDGE_TOLERANCE = 1e-4  # px; a centre this close to the edge between two pixels counts as past it, despite rounding
BLOCK = 1024  # px: side of the squares that are read from a label
MAX_NAMED = 3  # number of labels that messages name
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
GEOREFERENCE = "gdal_edit -a_srs EPSG:CODE -a_ullr ULX ULY LRX LRY"


@dataclass(frozen=True)
class AlignedLabel:
    """A label file, and the image whose grid it is read on."""

    file: Scene
    image: Scene
    warped: bool = False
    off_px: float = 0.0  # largest offset in rows or columns if it were matched by row and column
    label_pixels_per_pixel: float = 1.0  # number of its pixels along one pixel of the image

    def read(self, window: Window) -> tuple[Pixels, Valid]:
        """Read the label for a window of its image.

        Returns pixels `uint8 (bands, height, width)` and which of them are labelled, `bool (height, width)`. Pixels are
        not labelled if they are outside the label, or excluded by its nodata value, mask or alpha band. Memory is
        bounded, however fine the label's pixels are. Raises ReadError if the label can't be read.
        """
        if not self.warped:
            return read_chip(self.file, window)
        pixels = np.zeros((len(self.file.bands), window.height, window.width), np.uint8)
        labelled = np.zeros((window.height, window.width), np.bool_)
        for block in split(window, max(1, int(BLOCK / max(1.0, self.label_pixels_per_pixel)))):
            target = block.slices(window)
            pixels[:, *target], labelled[target] = self._warp(block)
        return pixels, labelled

    def _warp(self, block: Window) -> tuple[Pixels, Valid]:
        centres = np.mgrid[block.row_off : block.bottom, block.col_off : block.right] + 0.5
        rows, cols = (axis + EDGE_TOLERANCE for axis in _label_positions(self.file, self.image, *centres))
        inside = (rows >= 0) & (rows < self.file.height) & (cols >= 0) & (cols < self.file.width)
        pixels = np.zeros((len(self.file.bands), *inside.shape), np.uint8)
        labelled = np.zeros_like(inside)
        if inside.any():
            rows, cols = rows[inside].astype(np.intp), cols[inside].astype(np.intp)
            top, left = int(rows.min()), int(cols.min())
            box = Window(top, left, int(rows.max()) - top + 1, int(cols.max()) - left + 1)
            label, valid = read_chip(self.file, box)
            rows, cols = rows - top, cols - left
            pixels[:, inside], labelled[inside] = label[:, rows, cols], valid[rows, cols]
        return pixels, labelled

    def check_labelled(self, num_valid: int, num_labelled: int) -> None:
        """Raise SegError if a warped label holds data for none of the image's valid pixels."""
        if self.warped and num_valid and not num_labelled:
            raise SegError(
                f"{self.file.uri}: this label holds no data where its image, {self.image.uri}, does: "
                f"replace it with the label of this image, or correct its georeference ({GEOREFERENCE})"
            )


def find_label(folder: str, scene_id: str) -> str:
    """Find the label of a scene in a folder, by its name. Raises SegError if there is none."""
    stem = posixpath.splitext(scene_id)[0]
    names = list(dict.fromkeys([scene_id, f"{stem}.tif", f"{stem}.tiff"]))
    path = next((path for path in (f"{folder}/{name}" for name in names) if stat(path) is not None), None)
    if path is None:
        raise SegError(f"{folder}: no label for scene {scene_id} in this folder (looked for {', '.join(names)})")
    return path


def open_label(path: str, image: Scene, class_values: Sequence[int]) -> AlignedLabel:
    """Open the label of an image, whose grey values `class_values` stand for classes.

    The label is matched by georeference if both files have one, else by row and column. Raises SegError if the label
    does not overlap the image, can't be matched, is not uint8, or has one of the values as its nodata value.
    """
    label = replace(read_scene(path, image.scene_id), blank_is_data=True)
    aligned = _align(label, image)
    if label.dtype != "uint8":
        raise SegError(f"{path}: its pixels are {label.dtype}, but a label must be uint8 (gdal_translate -ot Byte)")
    if label.nodata in class_values:
        raise SegError(f"{path}: its nodata value {label.nodata:g} is also a class: unset it (gdal_edit -unsetnodata)")
    return aligned


def _align(label: Scene, image: Scene) -> AlignedLabel:
    same_size = (label.height, label.width) == (image.height, image.width)
    if label.crs is None or image.crs is None:
        _check_match_by_pixel(label, image, same_size)
        return AlignedLabel(label, image)
    off, label_pixels_per_pixel = _compare(label, image)
    if same_size and off <= SAME_GRID_TOLERANCE:
        return AlignedLabel(label, image)
    if not overlaps(label, image):
        raise SegError(
            f"{label.uri}: this label does not overlap its image, {image.uri}: "
            f"replace it with the label of this image, or correct its georeference ({GEOREFERENCE})"
        )
    return AlignedLabel(label, image, warped=True, off_px=off, label_pixels_per_pixel=label_pixels_per_pixel)


def _check_match_by_pixel(label: Scene, image: Scene, same_size: bool) -> None:
    """Raise SegError if a label without a georeference can't be matched to its image by row and column."""
    unreferenced = label if label.crs is None else image
    if not same_size:
        raise SegError(
            f"{label.uri}: this label measures {label.width} x {label.height} px, its image {image.width} x "
            f"{image.height}, and {unreferenced.uri} has no georeference to match them by: add one ({GEOREFERENCE})"
        )
    have_transforms = IDENTITY not in {label.transform, image.transform}
    if have_transforms and _compare(label, image)[0] > NEGLIGIBLE_OFFSET:
        raise SegError(
            f"{label.uri}: this label and its image, {image.uri}, have different transforms, and "
            f"{unreferenced.uri} has no CRS to match them by: add one (gdal_edit -a_srs EPSG:CODE), or remove its "
            "transform (gdal_edit -unsetgt)"
        )


def _compare(label: Scene, image: Scene) -> tuple[float, float]:
    """Compare the grids of a label and its image, without warping.

    Returns the largest offset at the image's corners, in rows or columns, and the number of label pixels along one
    pixel of the image.
    """
    rows, cols = np.array([0.0, 0, image.height, image.height]), np.array([0.0, image.width, 0, image.width])
    label_rows, label_cols = _label_positions(label, image, rows, cols)
    diagonal = np.hypot(label_rows[3] - label_rows[0], label_cols[3] - label_cols[0])
    off = np.nan_to_num(np.abs([label_rows - rows, label_cols - cols]).max(), nan=np.inf)
    return float(off), float(np.nan_to_num(diagonal / np.hypot(image.height, image.width), nan=1.0, posinf=1.0))


def overlaps(label: Scene, image: Scene) -> bool:
    """Whether the label overlaps the bounding rectangle of the image on the label's grid."""
    lattice = np.meshgrid(np.linspace(0, image.height, 17), np.linspace(0, image.width, 17))
    positions = np.stack(_label_positions(label, image, *lattice)).reshape(2, -1)
    positions = positions[:, np.isfinite(positions).all(axis=0)]
    if not positions.size:
        return False
    (top, left), (bottom, right) = positions.min(axis=1), positions.max(axis=1)
    return bool(top < label.height and left < label.width and bottom > 0 and right > 0)


@lru_cache(maxsize=64)
def transformer(source: str, target: str) -> Transformer:
    """Return the transformer between two CRSs, x before y."""
    return Transformer.from_crs(source, target, always_xy=True)


def _label_positions(label: Scene, image: Scene, rows: Any, cols: Any) -> tuple[Any, Any]:
    """Return the rows and columns on the label of positions on its image, as fractional pixels.

    They are not finite where the label's CRS does not cover a position.
    """
    x, y = position(image.transform, rows, cols)
    if label.crs is not None and image.crs is not None and label.crs != image.crs:
        x, y = transformer(image.crs, label.crs).transform(x, y)
    with np.errstate(invalid="ignore"):
        return pixel_at(label.transform, x, y)


def describe_warps(off_px: Mapping[str, float]) -> list[str]:
    """Return lines on the labels that were warped, given the offset in px that each would have had without it."""
    noticeable = [(path, off) for path, off in off_px.items() if off > NEGLIGIBLE_OFFSET]
    lines = [
        f"{path}: warped to the pixel grid of its image: by row and column, it would be up to {off:.1f} px off"
        for path, off in noticeable[:MAX_NAMED]
    ]
    more = len(noticeable) - MAX_NAMED
    return [*lines, f"and {more} more labels were warped"] if more > 0 else lines
