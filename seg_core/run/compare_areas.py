"""Compare two runs by areas, such as districts: building that is gained, lost or kept in each.

same grid:   tiles of both runs ─▶ pixels by class ─▶ whole tiles, and shares of pixels at borders
other grid:  each run measured by itself; what was gained and what was lost is not known, only the difference
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import geopandas
import numpy as np
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.grid import Window, split
from seg_core.run.area_files import area_table, check_id
from seg_core.run.areas import measure_areas
from seg_core.run.compare import CLASSES, OtherGridError, Pair, PairReader, pair_parts
from seg_core.run.stored_plan import read_plan
from seg_core.run.zonal import Areas, count_pixels, pair_tiles
from seg_core.threads import count_cpus, for_each

Floats = NDArray[np.float64]
LAYERS = ("compared", *CLASSES)
KNOWN_SHARE = 0.99  # of an area that runs on other grids must both know: else their buildings are of other ground
FIGURES = (
    *("area_m2", "compared_m2", "before_m2", "after_m2", "difference_m2", "kept_m2", "gained_m2", "lost_m2"),
    *("coverage_before", "coverage_after", "covered", "unknown_tiles"),
)


class Comparison(NamedTuple):
    """Two runs by area."""

    frame: geopandas.GeoDataFrame  # a row for each area, see `compare_areas`
    reason: str | None  # why the runs were not compared pixel by pixel

    @property
    def num_without_difference(self) -> int:
        """How many areas a run knows something of, but not both know enough for a difference."""
        known = self.frame[["before_m2", "after_m2"]].notna().any(axis=1)
        return int((known & self.frame["difference_m2"].isna()).sum())


def compare_areas(before: str, after: str, areas: Areas, report: Callable[[str], None] = lambda _: None) -> Comparison:
    """Compare two runs in each area. The frame has a row for each, in their order and CRS.

    The columns are the id; `area_m2`, of the whole area; `compared_m2`, valid in both runs; `before_m2`, `after_m2` and
    `difference_m2`, of building; `kept_m2`, `gained_m2` and `lost_m2`; `coverage_before` and `coverage_after`;
    `covered`, compared_m2 / area_m2; and `unknown_tiles`, which failed in a run or are not done. All but `area_m2` are
    null for an area that tiles of one run, or of none, touch.

    Runs of other scenes, grids or tiles are each measured by themselves, over what is valid in that run. Then
    `compared_m2` is the smaller one of the valid areas, kept, gained and lost are null, and `reason` says why. The
    difference is null for areas of which a run knows less than KNOWN_SHARE. Raises SegError if a scene has no CRS, if
    the id has the name of a figure, and if a part is damaged.
    """
    check_id(areas, FIGURES)
    plans = read_plan(before), read_plan(after)
    for plan in plans:
        areas.project_to(plan.images)
    try:
        pairs = pair_parts(*plans)
    except OtherGridError as error:
        return Comparison(_measure_each(before, after, areas, report), str(error).partition(": compare them")[0])
    reader = PairReader((before, after), plans)
    total = _Sums(len(areas.frame))
    for number, found in enumerate(for_each(partial(_compare_part, reader, areas), pairs, count_cpus()), 1):
        total.add(found)
        report(f"{number} of {len(pairs)} parts")
    kept, gained, lost = (total.m2[name] for name in CLASSES)
    valid = total.m2["compared"]
    always = np.ones(len(areas.frame), np.bool_)
    figures = _figures(areas, (valid, valid), (kept + lost, kept + gained), total.unknown, always)
    figures |= {f"{name}_m2": np.where(valid > 0, total.m2[name], np.nan) for name in CLASSES}
    return Comparison(area_table(areas, figures, total.reached), None)


class _Sums:
    """What was added up for each area, `(areas,)`."""

    def __init__(self, number: int) -> None:
        self.m2 = {name: np.zeros(number) for name in LAYERS}
        self.unknown = np.zeros(number, np.int64)  # tiles
        self.reached = np.zeros(number, np.bool_)  # whether a tile lies in it

    def add(self, other: "_Sums") -> None:
        for name, values in other.m2.items():
            self.m2[name] += values
        self.unknown += other.unknown
        self.reached |= other.reached


def _compare_part(reader: PairReader, areas: Areas, pair: Pair) -> _Sums:
    """Add up what a part of both runs says of each area."""
    sums = _Sums(len(areas.frame))
    scene, tiles = pair.before.scene, list(split(pair.before.window, reader.tile_size))
    pairs = pair_tiles(areas, scene, tiles)
    if not len(pairs.tile):
        return sums
    sums.reached[pairs.area] = True
    near = defaultdict(list)
    for tile, area, piece in zip(*pairs, strict=True):
        near[tiles[tile].origin].append((int(area), piece))
    for row, change in reader.compare(pair):
        tile = Window.from_row(row)
        within = near.get(tile.origin, [])
        if change is None:
            sums.unknown[[area for area, _ in within]] += 1
            continue
        for area in [area for area, piece in within if piece is None]:
            for name in LAYERS:
                sums.m2[name][area] += row[f"{name}_m2"] or 0.0
        if row["compared_m2"] and (pieces := [each for each in within if each[1] is not None]):
            layers = {"compared": change != MISSING, **{name: change == value for name, value in CLASSES.items()}}
            pixel_m2 = row["compared_m2"] / row["compared_px"]
            for area, number in count_pixels(layers, tile, pieces):
                for name in LAYERS:
                    sums.m2[name][area] += pixel_m2 * number[name]
    return sums


def _measure_each(before: str, after: str, areas: Areas, report: Callable[[str], None]) -> geopandas.GeoDataFrame:
    """Measure the areas in each run by itself."""
    frames = [
        measure_areas(run, areas, partial(_report_run, report, name))
        for name, run in (("first run", before), ("second run", after))
    ]
    unknown = sum(frame[name].fillna(0) for frame in frames for name in ("failed_tiles", "missing_tiles"))
    valid = [frame["valid_m2"].to_numpy() for frame in frames]
    buildings = [frame["building_m2"].to_numpy() for frame in frames]
    know_all = np.minimum(*valid) >= KNOWN_SHARE * areas.ground_m2
    figures = _figures(areas, valid, buildings, unknown.to_numpy(np.int64), know_all)
    return area_table(areas, figures, np.isfinite(valid[0] + valid[1]))


def _report_run(report: Callable[[str], None], name: str, text: str) -> None:
    report(f"{name}: {text}")


def _figures(
    areas: Areas,
    valid: Sequence[Floats],
    buildings: Sequence[Floats],
    unknown: NDArray[np.int64],
    same_ground: NDArray[np.bool_],
) -> dict[str, NDArray[Any]]:
    """Return the figures of the areas from the valid and the building m2 in them, of the run before and after.

    They have a difference only where both runs know the same ground.
    """
    unclassified = np.full(len(areas.frame), np.nan)
    compared = np.minimum(*valid)
    # Where nothing is valid, nothing is known of buildings.
    before, after = (np.where(of > 0, m2, np.nan) for m2, of in zip(buildings, valid, strict=True))
    return {
        "compared_m2": compared,
        "before_m2": before,
        "after_m2": after,
        "difference_m2": np.where(same_ground, after - before, np.nan),
        **{f"{name}_m2": unclassified for name in CLASSES},
        "coverage_before": before / valid[0],
        "coverage_after": after / valid[1],
        "covered": compared / areas.ground_m2,
        "unknown_tiles": unknown,
    }
