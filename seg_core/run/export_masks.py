"""Export the masks of a run as GeoTIFFs for a GIS.

They have one band: 1 is building, 0 is background, and 255 is nodata. A pixel is nodata where the scene holds no data,
or where its tile failed or is not done yet.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grid import Window, intersection, intersects
from seg_core.imagery.geotiff import write_cog
from seg_core.imagery.mosaic import read_image
from seg_core.imagery.scene import Scene
from seg_core.run.plan import Part
from seg_core.run.rows import Row, decode_mask, decode_valid
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import part_path, published_parts, read_part
from seg_core.storage.files import make_folder

Scale = tuple[float, float] | None
COLUMNS = (*Window._fields, "status", "valid_px", "building_px", "mask", "valid")


def export_masks(run: str, folder: str) -> Iterator[tuple[str, SegError | None]]:
    """Write a cloud-optimised GeoTIFF for each scene of a run, or for its mosaic, into a folder.

    Yields the path of each file with None, or with the error if it could not be written. The scenes are not read, but
    for tiles of a run of an older version of which only some pixels are valid: its rows don't say which. Then the scene
    must not have changed. Memory does not grow with the scene. Raises SegError before writing if a file exists already.
    """
    plan, published = read_plan(run), set(published_parts(run))
    paths = new_files(plan.images, folder, "--out")
    for scene_id, group in groupby(plan.parts(), key=lambda part: part.scene.scene_id):
        parts, path, problem = list(group), paths[scene_id], None
        make_folder(os.path.dirname(path))
        try:
            write_cog(path, parts[0].scene, _read_tiles(run, parts, published, plan.settings.scale), MISSING)
        except SegError as error:
            problem = error
        yield path, problem


def new_files(images: Sequence[Scene], folder: str, option: str) -> dict[str, str]:
    """Return the path in a folder for a raster of each image, by scene_id. `option` names the folder to the user.

    Raises SegError if a file exists already, or if two images would have the same one.
    """
    paths = {image.scene_id: os.path.join(folder, _file_name(image)) for image in images}
    if existing := next(filter(os.path.exists, paths.values()), None):
        raise SegError(f"{existing}: already exists: choose another {option}")
    if duplicates := [path for path, number in Counter(paths.values()).items() if number > 1]:
        raise SegError(f"{duplicates[0]}: two scenes would be exported to this file: rename one, and segment it")
    return paths


def _file_name(image: Scene) -> str:
    """Return the scene's own name, with `.tif` appended unless it ends so already."""
    is_tiff = posixpath.splitext(image.scene_id)[1].lower() in {".tif", ".tiff"}
    return image.scene_id if is_tiff else f"{image.scene_id}.tif"


def read_mask(run: str, scene_id: str, window: Window | None = None) -> NDArray[np.uint8]:
    """The mask of a scene, of a mosaic's image, or of a window within it, `uint8 (height, width)`.

    1 is building, 0 is not; MISSING is where the scene holds no data, a tile failed, or is not done yet. Raises
    SegError where there is no such scene, or the window reaches beyond it.
    """
    plan, published = read_plan(run), set(published_parts(run))
    image = next((each for each in plan.images if each.scene_id == scene_id), None)
    if image is None:
        ids = [each.scene_id for each in plan.images]
        raise SegError(f"{scene_id}: no scene of {run}: it has {', '.join(ids[:3])}{' ...' if len(ids) > 3 else ''}")
    wanted = image.window if window is None else window
    check_within(wanted, image)
    parts = [part for part in plan.parts() if part.scene.scene_id == scene_id and intersects(part.window, wanted)]
    return join_tiles(run, parts, published, plan.settings.scale, wanted)


def join_tiles(
    run: str, parts: Sequence[Part], published: Collection[str], scale: Scale, wanted: Window
) -> NDArray[np.uint8]:
    """The mask of a window, as `read_mask` has it, from the parts that touch it."""
    mask = np.full((wanted.height, wanted.width), MISSING, np.uint8)
    for tile, pixels in _read_tiles(run, parts, published, scale, wanted):
        common = intersection(tile, wanted)
        mask[common.slices(wanted)] = pixels[common.slices(tile)]
    return mask


def check_within(window: Window, image: Scene) -> None:
    """Raise SegError for a window that is empty, or reaches beyond an image."""
    if min(window.height, window.width) < 1 or intersection(window, image.window) != window:
        size = f"{image.height} rows and {image.width} columns"
        raise SegError(f"window {tuple(window)}: not within {image.scene_id}, which has {size}")


def _read_tiles(
    run: str, parts: Sequence[Part], published: Collection[str], scale: Scale, wanted: Window | None = None
) -> Iterator[tuple[Window, NDArray[np.uint8]]]:
    """Yield the window of each tile that is done, and its pixels `uint8 (height, width)`.

    If a `wanted` window is given, only the tiles that touch it are read.
    """
    for part in parts:
        path = part_path(run, part.key)
        for row in read_part(path, COLUMNS) if path in published else ():
            tile = Window.from_row(row)
            if row["status"] == "done" and row["valid_px"] and (wanted is None or intersects(tile, wanted)):
                yield tile, decode_pixels(row, part, scale)


def decode_pixels(row: Row, part: Part, scale: Scale) -> NDArray[np.uint8]:
    """Return the pixels of a tile that is done, `uint8 (height, width)`: 1 is building, 0 is not, else MISSING.

    The scene is read only if the row does not say which pixels hold data. Raises SegError if it has changed.
    """
    building, valid = decode_mask(row["mask"], row["height"], row["width"]).view(np.uint8), decode_valid(row)
    if valid is not None:
        return np.where(valid, building, np.uint8(MISSING))
    _, valid = read_image(part.scene, part.sources, Window.from_row(row), scale)
    if valid.sum() != row["valid_px"] or building[valid].sum() != row["building_px"]:
        raise SegError(
            f"{part.scene.scene_id}: has changed since it was segmented: repeat the run's seg segment command first"
        )
    return np.where(valid, building, np.uint8(MISSING))
