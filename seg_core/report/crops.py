"""Image and mask of single tiles, side by side: of all tiles of a small run, of some tiles of a large one."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.imagery.raster import read_image
from seg_core.report.part_finder import PartFinder
from seg_core.report.pictures import data_uri, encode_image, shrink, to_rgb
from seg_core.report.texts import tile_text
from seg_core.report.tiles import Best, Tally
from seg_core.run.export_masks import join_tiles
from seg_core.run.parts import Locations, find_parts
from seg_core.run.plan import Part
from seg_core.run.rows import encode_png
from seg_core.threads import count_cpus, for_each

MAX_CROPS = 200
SIDE = 256  # px of a crop
MAX_BYTES = 4_500_000  # of all crops together
LEVELS = {0: 0, 1: 255, MISSING: 128}  # grey levels of a mask: no building, building, unknown


class Crop(NamedTuple):
    """Image and mask of a tile as URIs that hold them. They are empty if they can't be read."""

    image: str
    mask: str
    where: str


@dataclass
class Crops:
    """The crops of a page, by cell of the map."""

    by_cell: dict[int, Crop] = field(default_factory=dict)
    num_cells: int = 0  # that hold a tile with data
    num_unread: int = 0  # images that can't be read


def cut_crops(run: str, tally: Tally, report: Callable[[str], None] = lambda _: None) -> Crops:
    """Cut image and mask of a tile from each cell, or from some of them if there are many.

    From a cell of several tiles it is the one that holds the most building. `report` is called with a text for each.
    Raises SegError if a file of the run can't be read. Images that can't be read are left out and counted.
    """
    cells = choose_cells(tally.best)
    finder, there = PartFinder(tally.plan), find_parts(run)
    found, size = Crops(num_cells=len(tally.best)), 0

    def cut(cell: int) -> Crop:
        best = tally.best[cell]
        return _cut(tally, best, finder.find(best.image, best.window), there)

    for number, (cell, crop) in enumerate(zip(cells, for_each(cut, cells, count_cpus()), strict=True), 1):
        report(f"{number:,} of {len(cells):,}")
        size += len(crop.image) + len(crop.mask)
        if size > MAX_BYTES:
            break
        found.by_cell[cell] = crop
        found.num_unread += not crop.image
    return found


def choose_cells(best: dict[int, Best], most: int = MAX_CROPS) -> list[int]:
    """Choose cells: all, or else half of them for the most building, and the others evenly from the rest."""
    if len(best) <= most:
        return sorted(best)
    ordered = sorted(best, key=lambda cell: (-best[cell].building_px, cell))
    first, rest = ordered[: most // 2], sorted(ordered[most // 2 :])
    even = np.linspace(0, len(rest) - 1, most - len(first)).astype(int)
    return [cell for pair in zip(first, (rest[at] for at in even), strict=True) for cell in pair]


def _cut(tally: Tally, best: Best, part: Part, there: Locations) -> Crop:
    """Cut the image and the mask of a tile."""
    settings, window = tally.plan.settings, best.window
    side = settings.tile_size
    where = tile_text(part.scene.scene_id, window.row_off // side, window.col_off // side)
    share = min(1.0, SIDE / max(window.shape))
    shape = max(1, round(share * window.height)), max(1, round(share * window.width))
    image = mask = ""
    with suppress(SegError):  # the mask of a run of an older version may need the scene
        mask = _shrink_mask(join_tiles([part], there, settings.scale, window), shape)
        pixels, valid = read_image(part.scene, part.sources, window, settings.scale)
        image = data_uri(encode_image(*shrink(to_rgb(pixels), valid, shape)), "webp")
    return Crop(image, mask, where)


def _shrink_mask(mask: NDArray[np.uint8], shape: tuple[int, int]) -> str:
    grey = np.select([mask == value for value in LEVELS], list(LEVELS.values())).astype(np.uint8)
    small = cv2.resize(grey, (shape[1], shape[0]), interpolation=cv2.INTER_AREA)
    return data_uri(encode_png(np.asarray(small, np.uint8)), "png")
