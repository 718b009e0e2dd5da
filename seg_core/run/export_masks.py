"""Export the masks of a run as GeoTIFFs for a GIS, and its probabilities.

    plan ─▶ images ─▶ rasters of each, with a style for QGIS ─▶ with STAC: an item of each ─▶ a collection of all

A mask has one band: 1 is building, 0 is background, and 255 is nodata. A pixel is nodata where the scene holds no data,
or where its tile failed or is not done yet.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grid import Window, intersection, intersects, translated
from seg_core.imagery.geotiff import Bands, write_cog
from seg_core.imagery.mosaic import make_mosaic, place_on_grid
from seg_core.imagery.qgis_style import BUILDING, Entry, share_stops, style_path, write_class_style, write_ramp_style
from seg_core.imagery.raster import read_image
from seg_core.imagery.scene import Scene
from seg_core.run.part_reading import read_rows
from seg_core.run.parts import Locations, find_parts
from seg_core.run.plan import Part, Plan, Settings
from seg_core.run.rows import Row, decode_mask, decode_probability, decode_valid
from seg_core.run.stac import name_items, write_collection
from seg_core.run.stac_item import Catalogue, item_path, write_item
from seg_core.run.stac_terms import Result
from seg_core.run.stored_plan import read_plan
from seg_core.storage.files import find_existing, local_draft, make_folder

Scale = tuple[float, float] | None
COLUMNS = (*Window._fields, "status", "valid_px", "building_px", "mask", "valid")
CLASSES = (Entry(1, BUILDING, "building"), Entry(0, (255, 255, 255), "background", is_shown=False))


class Kind(NamedTuple):
    """A kind of raster that a run is exported as."""

    name: str
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


MASK = Kind("mask", "", Bands(nodata=MISSING), partial(write_class_style, classes=CLASSES), COLUMNS, decode_pixels)
# Each of the 256 values is a probability, so that none is left to stand for nodata.
PROBABILITY = Kind(
    "probability",
    "_probability",
    Bands(nodata=None, names=("probability",), scale=1 / 255, overviews="average"),
    partial(write_ramp_style, stops=share_stops((0, 0.2, 0.4, 0.6, 0.8, 1)), is_masked=True),
    (*COLUMNS, "probability"),
    _decode_levels,
)


class ImageParts(NamedTuple):
    """An image to export: all that is needed to write its rasters in another process."""

    image: Scene
    parts: Sequence[Part]
    there: Locations  # of those parts
    paths: Sequence[str]  # of its rasters, one for each kind


class Export(NamedTuple):
    """What the rasters of an export have in common."""

    kinds: Sequence[Kind]
    settings: Settings
    keep_first: bool  # where pieces of an image overlap
    catalogue: Catalogue | None  # to describe them in


Write = Callable[[ImageParts], list[Result]]
Spread = Callable[[Write, Sequence[ImageParts]], Iterable[list[Result]]]


def export_masks(
    run: str,
    folder: str,
    *,
    mosaic: bool = False,
    probability: bool = False,
    catalogue: Catalogue | None = None,
    spread: Spread = map,
) -> Iterator[Result]:
    """Write a cloud-optimised GeoTIFF for each scene of a run, or for its mosaic, into a folder or an S3 prefix.

    With `mosaic`, all scenes are written as one image, `mosaic.tif`, also if they were segmented each by itself. Where
    they overlap, the first one that is known counts. With `probability`, the probabilities that the run has kept are
    written too, as `_probability.tif`: uint8 with a scale of 1/255, and an internal mask. Beside each file is a style
    for QGIS. With a `catalogue` from `open_catalogue`, STAC items describe them, and `collection.json` leads to all.

    Yields the path of each file but the styles with None, or with the error if it could not be written. `spread` maps a
    function to images, by default one after the other; the files are the same. The scenes are not read, but for tiles
    of a run of an older version of which only some pixels are valid: its rows don't say which. Then the scene must not
    have changed. Memory does not grow with the scene. Files for S3 are first written to the temporary folder, image by
    image. Raises SegError before writing if a file exists already or the folder can't be written to, if the run keeps
    no probabilities, if scenes are not on one grid, and as `name_items` does.
    """
    plan, there = read_plan(run), find_parts(run)
    if probability and not plan.settings.keep_probability:
        raise SegError(f"--probability: {run} keeps none: segment with --keep-probability into another folder")
    kinds = [MASK, PROBABILITY] if probability else [MASK]
    whole = _join(plan.images) if mosaic else None
    images = [whole] if whole else plan.images
    paths = _name_files(images, folder, [kind.suffix for kind in kinds])
    described = name_items(catalogue, [each[0] for each in paths.values()]) if catalogue else []
    _check_new(paths, folder, "--out", described)
    make_folder(folder)
    export = Export(kinds, plan.settings, mosaic, catalogue)
    items = [_gather(image, parts, there, paths) for image, parts in _images(plan, whole)]
    written: list[str] = []
    for results in spread(partial(_write_image, export), items):
        written += [path for path, problem in results if problem is None]
        yield from results
    if catalogue:
        of_images = {item_path(paths[image.scene_id][0]): image for image in images}
        yield from write_collection(catalogue, {path: of_images[path] for path in written if path in of_images})


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


def _gather(image: Scene, parts: Sequence[Part], there: Locations, paths: dict[str, list[str]]) -> ImageParts:
    own = {part.key: there[part.key] for part in parts if part.key in there}
    return ImageParts(image, parts, own, paths[image.scene_id])


def _write_image(export: Export, item: ImageParts) -> list[Result]:
    """Write the rasters of an image, and their STAC item."""
    results = [(path, _write(path, kind, export, item)) for kind, path in zip(export.kinds, item.paths, strict=True)]
    if export.catalogue:
        done = zip(export.kinds, results, strict=True)
        rasters = {kind.name: (path, kind.bands) for kind, (path, problem) in done if problem is None}
        if rasters:
            path = item_path(item.paths[0])
            results.append(write_item(export.catalogue, path, item.image, item.parts, item.there, rasters))
    return results


def _write(path: str, kind: Kind, export: Export, item: ImageParts) -> SegError | None:
    """Write a raster and its style. Returns the error if that can't be done."""
    pieces = _read_pieces(item.image, item.parts, item.there, export.settings.scale, kind)
    try:
        with local_draft(path) as local:
            write_cog(local, item.image, pieces, kind.bands, export.keep_first)
            kind.write_style(local)
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
    paths = _name_files(images, folder, suffixes)
    _check_new(paths, folder, option)
    return paths


def _name_files(images: Sequence[Scene], folder: str, suffixes: Sequence[str]) -> dict[str, list[str]]:
    return {image.scene_id: _file_names(os.path.join(folder, _file_name(image)), suffixes) for image in images}


def _check_new(paths: dict[str, list[str]], folder: str, option: str, also: Sequence[str] = ()) -> None:
    """Raise SegError if two rasters have one path, or if one of them, its style or another file is there already."""
    rasters = [path for each in paths.values() for path in each]
    if existing := find_existing(folder, [*rasters, *map(style_path, rasters), *also]):
        raise SegError(f"{existing}: already exists: choose another {option}")
    if duplicates := [path for path, number in Counter(rasters).items() if number > 1]:
        raise SegError(f"{duplicates[0]}: two scenes would be exported to this file: rename one, and segment it")


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
