"""Strata of a run's pixels, by what the run says of them and how sure it is.

Errors are rare in most strata and common in a few small ones. A sample that is drawn from each of them tells more than
one of equal size that is drawn from all pixels at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grid import Window
from seg_core.run.export_masks import Scale, decode_pixels
from seg_core.run.part_reading import read_rows
from seg_core.run.parts import Locations, find_parts
from seg_core.run.plan import Part, Plan
from seg_core.run.rows import Row, decode_probability
from seg_core.run.stored_plan import read_plan
from seg_core.threads import count_cpus, for_each
from seg_core.training.class_names import is_building as is_building_class

EMPTY, BACKGROUND, DOUBTFUL_BACKGROUND, DOUBTFUL_BUILDING, BUILDING = range(5)
NAMES = (
    "background in tiles without building",
    "background",
    "doubtful background",
    "doubtful building",
    "building",
)
BORDER_PX = 3  # pixels so near to a border of a building are doubtful
DOUBT = 0.25  # or, if the run keeps probabilities, those whose probability is so near to the threshold
COLUMNS = (*Window._fields, "status", "valid_px", "building_px", "area_m2", "mask", "valid", "probability")
Areas = NDArray[np.float64]  # m2 by stratum, `(5,)`


def is_building(stratum: int) -> bool:
    """Return whether the run says that pixels of a stratum are building."""
    return stratum in {DOUBTFUL_BUILDING, BUILDING}


class TileStrata(NamedTuple):
    """The stratum of each pixel of a tile."""

    window: Window
    strata: NDArray[np.uint8]  # `(height, width)`, and MISSING where the tile holds no data
    pixel_m2: float

    def holds(self, row: int, col: int) -> bool:
        """Return whether a pixel of the image is in the tile."""
        return self.window.row_off <= row < self.window.bottom and self.window.col_off <= col < self.window.right

    def strata_at(self, row: int, col: int) -> int:
        """Return the stratum of a pixel of the image."""
        return int(self.strata[row - self.window.row_off, col - self.window.col_off])

    def areas(self) -> Areas:
        """Return the ground area in each stratum."""
        pixels = np.bincount(self.strata[self.strata != MISSING], minlength=len(NAMES))
        return pixels.astype(np.float64) * self.pixel_m2


class TileAreas(NamedTuple):
    """The ground area in each stratum of the tiles of a part."""

    windows: list[Window]
    m2: NDArray[np.float32]  # `(tiles, 5)`


@dataclass(frozen=True)
class Survey:
    """The strata of a run. It takes some 200 bytes a tile."""

    run: str
    plan: Plan
    there: Locations  # where its parts are, by key
    parts: list[Part]
    tiles: list[TileAreas]  # of each part

    @property
    def class_name(self) -> str:
        """The name of what the run finds."""
        name = self.plan.found_class
        return "building" if is_building_class(name) else name

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the strata, in words of what the run finds."""
        return tuple(name.replace("building", self.class_name) for name in NAMES)

    def describe(self, is_found: bool) -> str:
        """Return the word for pixels that are of the class, or are not."""
        return self.class_name if is_found else "background"

    @property
    def part_m2(self) -> NDArray[np.float64]:
        """Ground area by part and stratum, `(parts, 5)`."""
        return np.array([each.m2.sum(axis=0, dtype=np.float64) for each in self.tiles])

    @property
    def m2(self) -> Areas:
        """Ground area by stratum."""
        total: Areas = self.part_m2.sum(axis=0)
        return total

    def read_part(self, number: int) -> list[TileStrata]:
        """Read the strata of a part again."""
        return list(read_strata(self.there, self.plan, self.parts[number]))


def survey_run(run: str, report: Callable[[str], None] = lambda _: None) -> Survey:
    """Find out how much ground is in each stratum. `report` is called with a text for each part.

    Raises SegError for a scene without a CRS, for a run without a valid tile, and if a part is damaged.
    """
    plan, there = read_plan(run), find_parts(run)
    for image in plan.images:
        if image.crs is None:
            raise SegError(f"{image.scene_id}: has no CRS, so that its ground area is not known")
    parts, tiles = list(plan.parts()), []
    for number, found in enumerate(for_each(partial(_sum_part, there, plan), parts, count_cpus()), 1):
        tiles.append(found)
        report(f"{number} of {len(parts)} parts")
    survey = Survey(run, plan, there, parts, tiles)
    if not survey.m2.sum():
        raise SegError(f"{run}: no tile holds data yet: run seg segment to the end first")
    return survey


def _sum_part(there: Locations, plan: Plan, part: Part) -> TileAreas:
    tiles = list(read_strata(there, plan, part))
    m2 = np.array([tile.areas() for tile in tiles], np.float32).reshape(-1, len(NAMES))
    return TileAreas([tile.window for tile in tiles], m2)


def read_strata(there: Locations, plan: Plan, part: Part) -> Iterator[TileStrata]:
    """Yield the strata of each tile of a part that is done and holds data."""
    for row in read_rows(there[part.key], COLUMNS) if part.key in there else ():
        if row["status"] == "done" and row["area_m2"]:  # a tile beyond what its CRS describes has no area
            strata = classify(row, part, plan.settings.scale, plan.settings.threshold)
            yield TileStrata(Window.from_row(row), strata, row["area_m2"] / row["valid_px"])


def classify(row: Row, part: Part, scale: Scale, threshold: float) -> NDArray[np.uint8]:
    """Return the stratum of each pixel of a tile, `uint8 (height, width)`, and MISSING where it holds no data."""
    pixels = decode_pixels(row, part, scale)
    building = (pixels == 1).astype(np.uint8)
    strata = np.full(pixels.shape, BACKGROUND if building.any() else EMPTY, np.uint8)
    strata[building == 1] = BUILDING
    if row["probability"] is not None:
        probability = decode_probability(row)
        doubtful = np.abs(probability / np.float32(255) - np.float32(threshold)) < DOUBT
    else:
        kernel = np.ones((2 * BORDER_PX + 1,) * 2, np.uint8)
        doubtful = cv2.dilate(building, kernel) != cv2.erode(building, kernel)
    strata[doubtful & (building == 0)] = DOUBTFUL_BACKGROUND
    strata[doubtful & (building == 1)] = DOUBTFUL_BUILDING
    strata[pixels == MISSING] = MISSING
    return strata
