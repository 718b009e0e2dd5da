"""Export the masks of a run as GeoTIFFs for a GIS, and its probabilities.

A mask has one band: 1 is building, 0 is background, and 255 is nodata. A pixel is nodata where the scene holds no data,
or where its tile failed or is not done yet. Beside each file is a style for QGIS.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grid import Window, intersection, intersects, translated
from seg_core.imagery.geotiff import Bands, write_cog
from seg_core.imagery.mosaic import make_mosaic, place_on_grid, read_image
from seg_core.imagery.qgis_style import BUILDING, Entry, share_stops, style_path, write_class_style, write_ramp_style
from seg_core.imagery.scene import Scene
from seg_core.run.parts import Locations, find_parts, read_rows
from seg_core.run.plan import Part, Plan
from seg_core.run.rows import Row, decode_mask, decode_probability, decode_valid
from seg_core.run.stored_plan import read_plan
from seg_core.storage.files import make_folder

Scale = tuple[float, float] | None
COLUMNS = (*Window._fields, "status", "valid_px", "building_px", "mask", "valid")
CLASSES = (Entry(1, BUILDING, "building"), Entry(0, (255, 255, 255), "background", is_shown=False))


class Kind(NamedTuple):
    """A kind of raster that a run is exported as."""

    suffix: str  # of the file's name, before `.tif`
    bands: Bands
    write_style: Callable[[str], None]
    columns: tuple[str, ...]
    decode: Callable[[Row, Part, Scale], NDArray[Any]]


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


def _decode_levels(row: Row, part: Part, scale: Scale) -> NDArray[Any]:
    """Return the probabilities of a tile that is done in 255ths, masked where a pixel is not valid."""
    return np.ma.array(decode_probability(row), mask=decode_pixels(row, part, scale) == MISSING)


MASK = Kind("", Bands(nodata=MISSING), partial(write_class_style, classes=CLASSES), COLUMNS, decode_pixels)
# Each of the 256 values is a probability, so that none is left to stand for nodata.
PROBABILITY = Kind(
    "_probability",
    Bands(nodata=None, names=("probability",), scale=1 / 255, overviews="average"),
    partial(write_ramp_style, stops=share_stops((0, 0.2, 0.4, 0.6, 0.8, 1)), is_masked=True),
    (*COLUMNS, "probability"),
    _decode_levels,
)


def export_masks(
    run: str, folder: str, *, mosaic: bool = False, probability: bool = False
) -> Iterator[tuple[str, SegError | None]]:
    """Write a cloud-optimised GeoTIFF for each scene of a run, or for its mosaic, into a folder.

    With `mosaic`, all scenes are written as one image, `mosaic.tif`, also if they were segmented each by itself. Where
    they overlap, the first one that is known counts. With `probability`, the probabilities that the run has kept are
    written too, as `_probability.tif`: uint8 with a scale of 1/255, and an internal mask. Beside each file is a style
    for QGIS.

    Yields the path of each file with None, or with the error if it could not be written. The scenes are not read, but
    for tiles of a run of an older version of which only some pixels are valid: its rows don't say which. Then the scene
    must not have changed. Memory does not grow with the scene. Raises SegError before writing if a file exists already,
    if the run keeps no probabilities, and if scenes are not on one grid.
    """
    plan, there = read_plan(run), find_parts(run)
    if probability and not plan.settings.keep_probability:
        raise SegError(f"--probability: {run} keeps none: segment with --keep-probability into another folder")
    kinds = [MASK, PROBABILITY] if probability else [MASK]
    images = [_join(plan.images)] if mosaic else plan.images
    paths = new_files(images, folder, "--out", [kind.suffix for kind in kinds])
    for image, parts in _images(plan, images[0] if mosaic else None):
        for kind, path in zip(kinds, paths[image.scene_id], strict=True):
            yield path, _write(path, kind, image, _read_pieces(image, parts, there, plan.settings.scale, kind), mosaic)


def _join(images: Sequence[Scene]) -> Scene:
    """Return the mosaic of images. Raises SegError unless all are on one grid."""
    whole, _, reasons = make_mosaic(images)
    if reasons:
        raise SegError(f"{reasons[0]}, or leave out --mosaic")
    return whole


def _images(plan: Plan, whole: Scene | None) -> Iterator[tuple[Scene, list[Part]]]:
    """Yield each image of a plan, or the `whole` that they form, and its parts."""
    for _, group in groupby(plan.parts(), key=lambda part: whole or part.scene.scene_id):
        parts = list(group)
        yield whole or parts[0].scene, parts


def _write(
    path: str, kind: Kind, image: Scene, pieces: Iterator[tuple[Window, NDArray[Any]]], keep_first: bool
) -> SegError | None:
    """Write a raster and its style. Returns the error if that can't be done."""
    make_folder(os.path.dirname(path))
    try:
        write_cog(path, image, pieces, kind.bands, keep_first)
        kind.write_style(path)
    except SegError as error:
        return error
    return None


def _read_pieces(
    image: Scene, parts: Sequence[Part], there: Locations, scale: Scale, kind: Kind
) -> Iterator[tuple[Window, NDArray[Any]]]:
    """Yield the window on an image of each tile that is done, and its pixels."""
    for part in parts:
        frame = place_on_grid(part.scene, image)
        for tile, pixels in _read_tiles([part], there, scale, kind=kind):
            yield translated(tile, frame.row_off, frame.col_off), pixels


def new_files(
    images: Sequence[Scene], folder: str, option: str, suffixes: Sequence[str] = ("",)
) -> dict[str, list[str]]:
    """Return the paths in a folder for rasters of each image, one for each suffix of their names, by scene_id.

    `option` names the folder to the user. Raises SegError if a file or its style exists already, or if two images would
    have the same one.
    """
    paths = {image.scene_id: _file_names(os.path.join(folder, _file_name(image)), suffixes) for image in images}
    rasters = [path for each in paths.values() for path in each]
    if existing := next(filter(os.path.exists, [*rasters, *map(style_path, rasters)]), None):
        raise SegError(f"{existing}: already exists: choose another {option}")
    if duplicates := [path for path, number in Counter(rasters).items() if number > 1]:
        raise SegError(f"{duplicates[0]}: two scenes would be exported to this file: rename one, and segment it")
    return paths


def _file_names(path: str, suffixes: Sequence[str]) -> list[str]:
    stem, extension = os.path.splitext(path)
    return [f"{stem}{suffix}{extension}" for suffix in suffixes]


def _file_name(image: Scene) -> str:
    """Return the scene's own name, with `.tif` appended unless it ends so already."""
    is_tiff = posixpath.splitext(image.scene_id)[1].lower() in {".tif", ".tiff"}
    return image.scene_id if is_tiff else f"{image.scene_id}.tif"


def read_mask(run: str, scene_id: str, window: Window | None = None) -> NDArray[np.uint8]:
    """The mask of a scene, of a mosaic's image, or of a window within it, `uint8 (height, width)`.

    1 is building, 0 is not; MISSING is where the scene holds no data, a tile failed, or is not done yet. Raises
    SegError where there is no such scene, or the window reaches beyond it.
    """
    plan, there = read_plan(run), find_parts(run)
    image = next((each for each in plan.images if each.scene_id == scene_id), None)
    if image is None:
        ids = [each.scene_id for each in plan.images]
        raise SegError(f"{scene_id}: no scene of {run}: it has {', '.join(ids[:3])}{' ...' if len(ids) > 3 else ''}")
    wanted = image.window if window is None else window
    check_within(wanted, image)
    parts = [part for part in plan.parts() if part.scene.scene_id == scene_id and intersects(part.window, wanted)]
    return join_tiles(parts, there, plan.settings.scale, wanted)


def join_tiles(parts: Sequence[Part], there: Locations, scale: Scale, wanted: Window) -> NDArray[np.uint8]:
    """The mask of a window, as `read_mask` has it, from the parts that touch it."""
    mask = np.full((wanted.height, wanted.width), MISSING, np.uint8)
    for tile, pixels in _read_tiles(parts, there, scale, wanted):
        common = intersection(tile, wanted)
        mask[common.slices(wanted)] = pixels[common.slices(tile)]
    return mask


def join_levels(parts: Sequence[Part], there: Locations, scale: Scale, wanted: Window) -> Any:
    """The probabilities of a window in 255ths, from the parts that touch it, of a run that keeps them.

    They are a masked array, `uint8 (height, width)`, masked where nothing is known.
    """
    levels = np.ma.array(np.zeros(wanted.shape, np.uint8), mask=True)
    for tile, pixels in _read_tiles(parts, there, scale, wanted, PROBABILITY):
        common = intersection(tile, wanted)
        levels[common.slices(wanted)] = pixels[common.slices(tile)]
    return levels


def check_within(window: Window, image: Scene) -> None:
    """Raise SegError for a window that is empty, or reaches beyond an image."""
    if min(window.height, window.width) < 1 or intersection(window, image.window) != window:
        size = f"{image.height} rows and {image.width} columns"
        raise SegError(f"window {tuple(window)}: not within {image.scene_id}, which has {size}")


def _read_tiles(
    parts: Sequence[Part], there: Locations, scale: Scale, wanted: Window | None = None, kind: Kind = MASK
) -> Iterator[tuple[Window, NDArray[Any]]]:
    """Yield the window of each tile that is done, and its pixels `(height, width)` of a kind.

    If a `wanted` window is given, only the tiles that touch it are read.
    """
    for part in parts:
        for row in read_rows(there[part.key], kind.columns) if part.key in there else ():
            tile = Window.from_row(row)
            if row["status"] == "done" and row["valid_px"] and (wanted is None or intersects(tile, wanted)):
                yield tile, kind.decode(row, part, scale)
