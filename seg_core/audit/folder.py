"""A sample to be judged, as a folder: a GeoPackage with a column to fill in, and a picture of each place."""

import os
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from seg_core.audit.sample import Place, to_frame
from seg_core.audit.strata import Survey
from seg_core.chips import Pixels
from seg_core.errors import ReadError, StoreUnavailableError
from seg_core.grid import Window, intersection, intersects, split
from seg_core.imagery.raster import read_image
from seg_core.imagery.scene import Scene
from seg_core.plots.pictures import Panel, Rgb, as_rgb, assemble_panels, paint_outlines
from seg_core.run.export_masks import join_tiles
from seg_core.storage.disk import staged_folder

SAMPLE = "sample.gpkg"
PICTURES = "places"
AROUND_M = 40.0  # of ground on each side of a place
SIDE = 512  # px of the picture of a place, before it is put beside the other one
PIECE = 16  # px; side of what is read at once of an image with damaged blocks
CROSS = (255, 0, 0)


def write_sample(
    survey: Survey, places: Sequence[Place], folder: str, report: Callable[[str], None] = lambda _: None
) -> None:
    """Write the places to `sample.gpkg` in a new local folder, and a picture of each to `places/`.

    A picture shows the image around the place, and the same with the outlines of the mask. `report` is called with a
    text for each picture. What is damaged of a scene is black. Raises SegError if a store does not answer, or the
    folder can't be written to.
    """
    names = [f"{PICTURES}/{number:05}.png" for number in range(1, len(places) + 1)]
    with staged_folder(folder) as draft:
        os.mkdir(os.path.join(draft, PICTURES))
        for number, (place, name) in enumerate(zip(places, names, strict=True), 1):
            with open(os.path.join(draft, name), "wb") as file:
                file.write(_picture(survey, place, f"place {number}"))
            report(f"{number} of {len(places)} pictures")
        frame = to_frame(survey, places, names)
        frame.to_file(os.path.join(draft, SAMPLE), driver="GPKG", layer="sample", engine="pyogrio")


def _picture(survey: Survey, place: Place, title: str) -> bytes:
    """Draw a place, and the mask around it."""
    part = survey.parts[place.part]
    image, settings = part.scene, survey.plan.settings
    reach = max(8, round(AROUND_M / (image.gsd_m or 1.0)))
    window = intersection(Window(place.row - reach, place.col - reach, 2 * reach + 1, 2 * reach + 1), image.window)
    near = [
        other for other in survey.parts if other.scene.scene_id == image.scene_id and intersects(other.window, window)
    ]
    mask = join_tiles(near, survey.there, settings.scale, window)
    reached = {source.scene_id: source for other in near for source in other.sources}
    precedence = [scene.scene_id for scene in survey.plan.scenes if scene.scene_id in reached]
    sources = [reached[scene_id] for scene_id in precedence]
    pixels, is_whole = _read_around(image, sources, window, settings.scale)
    title = title if is_whole else f"{title}: black can't be read"
    rgb = as_rgb(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))
    at = place.row - window.row_off, place.col - window.col_off
    plain, outlined = (_enlarge(each, at) for each in (rgb, paint_outlines(rgb, mask)))
    return assemble_panels([Panel(title, plain), Panel("with the mask", outlined)])


def _read_around(
    image: Scene, sources: Sequence[Scene], window: Window, scale: tuple[float, float] | None
) -> tuple[Pixels, bool]:
    """Return the pixels around a place, and whether all could be read: a block beside it may be damaged."""

    def read(part: Window) -> Pixels | None:
        try:
            return read_image(image, sources, part, scale)[0]
        except StoreUnavailableError:
            raise
        except ReadError:
            return None

    whole = read(window)
    if whole is not None:
        return whole, True
    pixels = np.zeros((len(image.bands), *window.shape), np.uint8)
    for piece in split(window, PIECE):
        found = read(piece)
        if found is not None:
            pixels[:, *piece.slices(window)] = found
    return pixels, False


def _enlarge(picture: Rgb, at: tuple[int, int]) -> NDArray[np.uint8]:
    """Enlarge a picture by a whole number, and mark a pixel by four strokes that leave it free."""
    factor = max(1, SIDE // max(picture.shape[:2]))
    large = np.ascontiguousarray(np.repeat(np.repeat(picture, factor, axis=0), factor, axis=1))
    row, col = (int((each + 0.5) * factor) for each in at)
    near, far = factor + 4, factor + 20
    for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        ends = [(col + right * reach, row + down * reach) for reach in (near, far)]
        cv2.line(large, ends[0], ends[1], CROSS, 2)
    return large
