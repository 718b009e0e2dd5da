"""Several scenes on one grid as one image: where each lies on it, and what a window holds of them all.

    ┌───────────────┬───┬────────┐
    │ a             │ab │ b      │
    │           ┌───┴───┴──┬─────┘
    └───────────┤ c        │
                └──────────┘

Tiles, windows and parts are cut from the whole. Each pixel is that of the first scene that holds data there.
"""

import math
import posixpath
from collections.abc import Sequence

import numpy as np

from seg_core.chips import NewPixels, Pixels, Valid, new_pixels
from seg_core.grid import (
    Window,
    bounding_window,
    expand_reflected_mask,
    expand_reflection,
    intersection,
    overlap,
    reflect_window,
    translated,
)
from seg_core.imagery.georef import pixel_at, pixel_size, position
from seg_core.imagery.raster import read_chip
from seg_core.imagery.scene import Scene, mean_gsd
from seg_core.storage.files import folder_of

MOSAIC = "mosaic"  # scene_id of the whole; those of files have a suffix
TOLERANCE = 0.01  # px that a scene may lie off the grid


def make_mosaic(scenes: Sequence[Scene]) -> tuple[Scene, list[Scene], list[str]]:
    """The image that scenes make together, its pieces, and a line for each scene that is none.

    Pieces are those on the grid of the first scene that has a CRS. The whole is no file: its version is empty.
    """
    first = next((scene for scene in scenes if scene.crs is not None), scenes[0])
    why = {scene.scene_id: _why_off_grid(scene, first) for scene in scenes}
    pieces = [scene for scene in scenes if why[scene.scene_id] is None]
    top, left, height, width = bounding_window([place(scene, first) for scene in pieces] or [first.window])
    a, b, _, d, e, _ = first.transform
    x, y = position(first.transform, top, left)
    transform = (a, b, float(x), d, e, float(y))
    gsd_m = mean_gsd(first.crs, transform, height, width)
    whole = Scene(
        scene_id=MOSAIC,
        uri=posixpath.commonpath([folder_of(scene.uri) for scene in scenes]),
        size=0,
        version="",  # see Scene.is_mosaic
        height=height,
        width=width,
        bands=first.bands,
        dtype=first.dtype,
        nodata=None,
        masked=False,
        crs=first.crs,
        transform=transform,
        gsd_m=gsd_m,
        source_gsd_m=gsd_m,
    )
    return whole, pieces, [line for line in why.values() if line]


def _why_off_grid(scene: Scene, first: Scene) -> str | None:
    """Why a scene can't be part of a mosaic with the first one, and the way out; None where it can."""
    if scene.crs is None:
        return f"{scene.scene_id}: no CRS: --mosaic puts scenes together by their place on the ground: leave it out"
    turned = [abs(one - other) for one, other in zip(scene.transform, first.transform, strict=True)]
    drift = max(turned[at] for at in (0, 1, 3, 4)) * max(scene.height, scene.width)  # in the CRS, over the scene
    off = max(abs(at - round(at)) for at in _offset(scene, first))
    (width, _), (wanted, _) = pixel_size(scene.transform), pixel_size(first.transform)
    if scene.crs != first.crs:
        why = f"its CRS is {scene.crs}, not {first.crs}"
    elif drift > TOLERANCE * wanted:
        why = f"its pixels are {width:.6g} wide in the CRS, not {wanted:.6g}, or turned otherwise"
    elif off > TOLERANCE:
        why = f"it lies {off:.2f} px beside it"
    else:
        return None
    return f"{scene.scene_id}: not on the grid of {first.scene_id}, as --mosaic wants: {why}: make a run of its own"


def _offset(scene: Scene, grid: Scene, row: int = 0, col: int = 0) -> tuple[float, float]:
    """Row and column on the grid of a pixel corner of the scene."""
    return pixel_at(grid.transform, *position(scene.transform, row, col))


def place(scene: Scene, grid: Scene) -> Window:
    """The pixels of the grid that a scene touches."""
    top, left = _offset(scene, grid)
    row_off, col_off = math.floor(top + TOLERANCE), math.floor(left + TOLERANCE)
    if not grid.is_resampled:
        return Window(row_off, col_off, scene.height, scene.width)
    bottom, right = _offset(scene, grid, scene.height, scene.width)
    return Window(row_off, col_off, math.ceil(bottom - TOLERANCE) - row_off, math.ceil(right - TOLERANCE) - col_off)


def read_image(
    image: Scene,
    pieces: Sequence[Scene],
    window: Window,
    scale: tuple[float, float] | None = None,
    new: NewPixels = new_pixels,
) -> tuple[Pixels, Valid]:
    """Read a window of a scene, or of a mosaic: like `raster.read_chip`, which is enough where it has no pieces.

    `pieces` are all that the window reaches, by precedence. Raises ReadError where one of them can't be read.
    """
    if not pieces:
        return read_chip(image, window, scale, new=new)
    box, rows, cols = reflect_window(window, image.height, image.width)
    pixels = np.zeros((len(image.bands), box.height, box.width), np.uint8)
    valid = np.zeros((box.height, box.width), np.bool_)
    for piece in pieces:
        at = place(piece, image)
        common = intersection(at, box)
        target = common.slices(box)
        if not overlap(at, box) or valid[target].all():
            continue
        if image.is_resampled:
            found, holds = read_chip(piece, common, scale, grid=image)
        else:
            found, holds = read_chip(piece, translated(common, -at.row_off, -at.col_off), scale)
        fresh = holds & ~valid[target]
        pixels[:, *target][:, fresh] = found[:, fresh]
        valid[target] |= fresh
    chip = new((len(image.bands), len(rows), len(cols)))
    return expand_reflection(pixels, rows, cols, chip), expand_reflected_mask(valid, rows, cols)
