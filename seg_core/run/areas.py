"""Building area of polygons, such as districts, from the masks of a run.

    areas ─▶ CRS of each scene ─┬─▶ tiles within one area: the figures of their rows
                                └─▶ tiles at its border: pixels of their masks, by the share of each within the area

Square metres are geodesic.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.grid import Window, split
from seg_core.run.area_files import area_table, check_id
from seg_core.run.export_masks import Scale, decode_pixels
from seg_core.run.part_reading import Batch, batch_parts
from seg_core.run.parts import find_parts
from seg_core.run.plan import Part, Settings
from seg_core.run.rows import Row, decode_mask
from seg_core.run.stored_plan import read_plan
from seg_core.run.zonal import Areas, Pairs, count_pixels, pair_tiles
from seg_core.threads import count_cpus, for_each

COLUMNS = (*Window._fields, "status", "valid_px", "building_px", "area_m2", "building_m2")
MASKS = ("mask", "valid")
FIGURES = ("area_m2", "valid_m2", "building_m2", "coverage", "covered", "failed_tiles", "missing_tiles")


@dataclass
class Sums:
    """What was added up for each area, `(areas,)`."""

    valid_m2: NDArray[np.float64]
    building_m2: NDArray[np.float64]
    failed: NDArray[np.int64]  # tiles
    missing: NDArray[np.int64]  # tiles
    reached: NDArray[np.bool_]  # whether a planned tile lies in it

    @classmethod
    def zeros(cls, number: int) -> "Sums":
        """Return sums of nothing for so many areas."""
        floats, counts = np.zeros((2, number)), np.zeros((2, number), np.int64)
        return cls(floats[0], floats[1], counts[0], counts[1], np.zeros(number, np.bool_))

    def add(self, other: "Sums") -> None:
        """Add other sums."""
        for name, values in vars(self).items():
            np.add(values, getattr(other, name), out=values)


Measure = Callable[[Batch], Sums]


Spread = Callable[[Measure, Sequence[Batch]], Iterator[Sums]]


def spread_over_threads(measure: Measure, batches: Sequence[Batch]) -> Iterator[Sums]:
    """Yield what a function measures in each group of parts, in threads."""
    return for_each(measure, batches, count_cpus())


def measure_areas(
    run: str,
    areas: Areas,
    report: Callable[[str], None] = lambda _: None,
    spread: Spread = spread_over_threads,
) -> geopandas.GeoDataFrame:
    """Measure each area from the rows and masks of a run. Returns a row for each, in their order and CRS.

    The columns are the id; `area_m2`, of the whole area; `valid_m2` and `building_m2`, of what the run has found in it;
    `coverage`, building_m2 / valid_m2; `covered`, valid_m2 / area_m2; and the numbers of `failed_tiles` and
    `missing_tiles` that it touches. They are null for an area that no tile of the run touches, but for its `area_m2`.
    Where scenes overlap, their ground counts twice, as in the summary of the run.

    `spread` maps a function to groups of parts, by default in threads. Memory depends on the areas and on the size of a
    part, or of a row group of a compacted file. `report` is called with a text for each group. Raises SegError
    if a scene has no CRS, if the id has the name of a figure, and if a part is damaged.
    """
    check_id(areas, FIGURES)
    plan = read_plan(run)
    areas.project_to(plan.images)
    batches, sums = batch_parts(plan.parts(), find_parts(run)), Sums.zeros(len(areas.frame))
    measure = partial(_measure_batch, plan.settings, areas)
    for number, found in enumerate(spread(measure, batches), 1):
        sums.add(found)
        report(f"{number} of {len(batches)} groups of parts")
    return area_table(areas, _figures(sums, areas), sums.reached)


def _figures(sums: Sums, areas: Areas) -> dict[str, NDArray[Any]]:
    """Return the figures of the areas."""
    # Where nothing is valid, nothing is known of buildings.
    building_m2 = np.where(sums.valid_m2 > 0, sums.building_m2, np.nan)
    return {
        "valid_m2": sums.valid_m2,
        "building_m2": building_m2,
        "coverage": building_m2 / sums.valid_m2,
        "covered": sums.valid_m2 / areas.ground_m2,
        "failed_tiles": sums.failed,
        "missing_tiles": sums.missing,
    }


def _measure_batch(settings: Settings, areas: Areas, batch: Batch) -> Sums:
    """Add up what some parts say of each area."""
    sums = Sums.zeros(len(areas.frame))
    scene = batch.parts[0].scene
    if not len(pair_tiles(areas, scene, [part.window for part in batch.parts]).tile):
        return sums
    if not batch.locations:
        missing = [tile for part in batch.parts for tile in split(part.window, settings.tile_size)]
        pairs = pair_tiles(areas, scene, missing)
        sums.reached[pairs.area] = True
        np.add.at(sums.missing, pairs.area, 1)
        return sums
    table = batch.read(COLUMNS)
    tiles = np.stack([table[name].to_numpy() for name in Window._fields], axis=1)
    pairs = pair_tiles(areas, scene, tiles)
    sums.reached[pairs.area] = True
    np.add.at(sums.failed, pairs.area[(table["status"].to_numpy() == "failed")[pairs.tile]], 1)
    _add_whole_tiles(sums, pairs, table)
    _add_borders(sums, pairs, table, batch, settings.scale)
    return sums


def _add_whole_tiles(sums: Sums, pairs: Pairs, table: pa.Table) -> None:
    """Add the figures of tiles that lie within an area."""
    for name, values in (("area_m2", sums.valid_m2), ("building_m2", sums.building_m2)):
        of_tiles = table[name].fill_null(0.0).to_numpy()
        np.add.at(values, pairs.area[pairs.is_whole], of_tiles[pairs.tile[pairs.is_whole]])


def _add_borders(sums: Sums, pairs: Pairs, table: pa.Table, batch: Batch, scale: Scale) -> None:
    """Add the pixels of tiles that lie partly within an area. The masks are read only if there are such tiles."""
    has_data = table["area_m2"].fill_null(0.0).to_numpy() > 0  # a tile beyond what its CRS describes has no area
    pieces = defaultdict(list)
    at_border = ~pairs.is_whole & has_data[pairs.tile]
    for tile, area, piece in zip(*(each[at_border] for each in pairs), strict=True):
        pieces[int(tile)].append((int(area), piece))
    if not pieces:
        return
    ends = np.cumsum([each.entry.rows if each.entry else len(table) for each in batch.locations])
    near = sorted(pieces)
    masks = batch.read(MASKS)
    rows = pa.table([*table.columns, *masks.columns], [*COLUMNS, *MASKS]).take(near).to_pylist()
    for tile, row in zip(near, rows, strict=True):
        part = batch.parts[int(np.searchsorted(ends, tile, side="right"))]
        pixel_m2 = row["area_m2"] / row["valid_px"]
        for area, number in count_pixels(_layers(row, part, scale), Window.from_row(row), pieces[tile]):
            sums.valid_m2[area] += pixel_m2 * number["valid"]
            sums.building_m2[area] += pixel_m2 * number["building"]


def _layers(row: Row, part: Part, scale: Scale) -> dict[str, NDArray[np.bool_]]:
    """Return which pixels of a tile are valid and which are building, `(height, width)` each."""
    height, width = row["height"], row["width"]
    if row["valid_px"] == height * width:
        return {"valid": np.ones((height, width), np.bool_), "building": decode_mask(row["mask"], height, width)}
    pixels = decode_pixels(row, part, scale)
    return {"valid": pixels != MISSING, "building": pixels == 1}
