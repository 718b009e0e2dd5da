"""Mosaics: several scenes on one grid as one image. Loads no GDAL: `raster` reads windows of them.

    ┌───────────────┬───┬────────┐
    │ a             │ab │ b      │
    │           ┌───┴───┴──┬─────┘
    └───────────┤ c        │
                └──────────┘

Tiles, windows and parts are divided from the whole mosaic. Each pixel comes from the first scene that holds data there.
"""

import math
import posixpath
from collections.abc import Sequence

from seg_core.grid import Window, bounding_window
from seg_core.imagery.georef import pixel_at, pixel_size, position, window_transform
from seg_core.imagery.scene import Scene, mean_gsd
from seg_core.storage.files import folder_of

MOSAIC = "mosaic"  # scene_id of a mosaic; the scene_id of a file has a suffix
TOLERANCE = 0.01  # px by which a scene may be off the grid


def make_mosaic(scenes: Sequence[Scene]) -> tuple[Scene, list[Scene], list[str]]:
    """Return the mosaic of scenes, its pieces, and a line for each scene that can't be a piece.

    Pieces are the scenes on the grid of the first scene that has a CRS. The mosaic is not a file: its version is empty.
    """
    first = next((scene for scene in scenes if scene.crs is not None), scenes[0])
    reasons = {scene.scene_id: _why_off_grid(scene, first) for scene in scenes}
    pieces = [scene for scene in scenes if reasons[scene.scene_id] is None]
    frame = bounding_window([place_on_grid(scene, first) for scene in pieces] or [first.window])
    transform = window_transform(first.transform, frame)
    gsd_m = mean_gsd(first.crs, transform, frame.height, frame.width)
    whole = Scene(
        scene_id=MOSAIC,
        uri=posixpath.commonpath([folder_of(scene.uri) for scene in scenes]),
        size=0,
        version="",  # see Scene.is_mosaic
        height=frame.height,
        width=frame.width,
        bands=first.bands,
        dtype=first.dtype,
        nodata=None,
        masked=False,
        crs=first.crs,
        transform=transform,
        gsd_m=gsd_m,
        source_gsd_m=gsd_m,
    )
    return whole, pieces, [line for line in reasons.values() if line]


def _why_off_grid(scene: Scene, first: Scene) -> str | None:
    """Return why a scene can't be in a mosaic with the first scene, and the way out; None if it can."""
    if scene.crs is None:
        return f"{scene.scene_id}: no CRS: --mosaic joins scenes by their place on the ground: leave this scene out"
    changes = [abs(one - other) for one, other in zip(scene.transform, first.transform, strict=True)]
    largest_change = max(changes[i] for i in (0, 1, 3, 4))
    drift = largest_change * max(scene.height, scene.width)  # over the scene, in units of the CRS
    shift = max(abs(offset - round(offset)) for offset in _offset(scene, first))
    (width, _), (first_width, _) = pixel_size(scene.transform), pixel_size(first.transform)
    if scene.crs != first.crs:
        why = f"its CRS is {scene.crs}, not {first.crs}"
    elif drift > TOLERANCE * first_width:
        why = f"its pixels are {width:.6g} wide in the CRS, not {first_width:.6g}, or rotated differently"
    elif shift > TOLERANCE:
        why = f"it is shifted by {shift:.2f} px"
    else:
        return None
    problem = f"not on the grid of {first.scene_id}, which --mosaic requires"
    return f"{scene.scene_id}: {problem}: {why}: segment it in a separate run"


def _offset(scene: Scene, grid: Scene, row: int = 0, col: int = 0) -> tuple[float, float]:
    """Return the row and column on the grid of a pixel corner of the scene."""
    return pixel_at(grid.transform, *position(scene.transform, row, col))


def place_on_grid(scene: Scene, grid: Scene) -> Window:
    """Return the window of the grid that a scene touches."""
    top, left = _offset(scene, grid)
    row_off, col_off = math.floor(top + TOLERANCE), math.floor(left + TOLERANCE)
    if not grid.is_resampled:
        return Window(row_off, col_off, scene.height, scene.width)
    bottom, right = _offset(scene, grid, scene.height, scene.width)
    return Window(row_off, col_off, math.ceil(bottom - TOLERANCE) - row_off, math.ceil(right - TOLERANCE) - col_off)
