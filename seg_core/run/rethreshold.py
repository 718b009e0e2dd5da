"""Another threshold for a run that keeps probabilities: as a new run, or the coverage at every threshold.

A run keeps probabilities in 255ths, rounded. A pixel that is kept as `v` has a probability between `(v - 0.5) / 255`
and `(v + 0.5) / 255`. So it is known for each pixel whether it reaches a threshold of `(level - 0.5) / 255`, and for
other thresholds it is not. 0.5 is one of those that are known, for level 128.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seg_core.chips import WindowFigures
from seg_core.errors import CorruptFileError, SegError
from seg_core.grid import Window
from seg_core.run.fence import Store
from seg_core.run.lease import acquire_lease
from seg_core.run.part_reading import read_versioned
from seg_core.run.parts import Locations, find_parts
from seg_core.run.plan import Part, Plan, check_threshold
from seg_core.run.query import summary
from seg_core.run.record import RunRecord, now, read_record, write_record
from seg_core.run.resume import find_run, open_run, parts_to_do
from seg_core.run.rows import Row, decode_probability, tile_rows
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import write_part
from seg_core.storage.files import make_folder
from seg_core.threads import count_cpus, for_each

LEVELS = 255  # of probability, besides 0

CHANGED = ("building_px", "coverage", "building_m2", "mask")  # columns that depend on the threshold


class Curve(NamedTuple):
    """The coverage of a run at each threshold that is known exactly, from the lowest on."""

    thresholds: NDArray[np.float64]  # `(255,)`
    building_px: NDArray[np.int64]  # `(255,)`
    building_m2: NDArray[np.float64] | None  # `(255,)`; None if a tile with valid pixels has no area
    valid_px: int

    def rows(self) -> list[dict[str, Any]]:
        """Return the figures of each threshold: threshold, building_px, coverage, building_km2."""
        areas = [None] * len(self.thresholds) if self.building_m2 is None else (self.building_m2 / 1e6).tolist()
        return [
            {
                "threshold": threshold,
                "building_px": building,
                "coverage": building / self.valid_px if self.valid_px else None,
                "building_km2": area,
            }
            for threshold, building, area in zip(
                self.thresholds.tolist(), self.building_px.tolist(), areas, strict=True
            )
        ]


def nearest_level(threshold: float) -> int:
    """Return the level, 1 to 255, whose threshold is nearest."""
    return int(min(max(round(threshold * LEVELS + 0.5), 1), LEVELS))


def threshold_of(level: int) -> float:
    """Return the probability from which on pixels are kept as this level or a higher one."""
    return (level - 0.5) / LEVELS


def rethreshold(run: str, threshold: float, out: str, report: Callable[[str], None] = lambda _: None) -> RunRecord:
    """Make a run at `out` that is `run` at the nearest threshold that is known exactly: see `threshold_of`.

    Its rows are those that segmenting with that threshold would give. Failed tiles stay failed, and parts that are not
    done yet are missing. The same call goes on where it ended. `report` is called with a text for each part. Returns
    the record of the new run. Raises SegError for a threshold that is none, if the run keeps no probabilities, if one
    of its parts is damaged, or if `out` holds something else.
    """
    check_threshold(threshold)
    plan, level = _read_plan(run), nearest_level(threshold)
    planned = replace(plan, settings=replace(plan.settings, threshold=threshold_of(level)))
    origin = read_record(run)
    find_run(out, planned)  # what is refused is refused before anything is written
    make_folder(out)
    with acquire_lease(out) as lease:
        record = open_run(out, planned, origin.model.uri, lease)
        record.fit, record.exact, record.software = origin.fit, origin.exact, origin.software
        record.relocated, record.relocated_versions = origin.relocated, origin.relocated_versions
        write_record(out, record, lease)
        there = find_parts(run)
        todo = [part for part in parts_to_do(out, planned) if part.key in there]
        write = partial(_rewrite_part, run, there, out, level, planned, lease)
        for number, _ in enumerate(for_each(write, todo, count_cpus()), 1):
            report(f"{number} of {len(todo)} parts")
        if len(find_parts(out)) == planned.counts["parts"]:
            record.finished, record.counts = now(), summary(out)
        write_record(out, record, lease)
    return record


def _read_plan(run: str) -> Plan:
    """Read the plan of a run. Raises SegError if the run keeps no probabilities."""
    plan = read_plan(run)
    if not plan.settings.keep_probability:
        raise SegError(f"{run}: keeps no probabilities: segment with --keep-probability into another folder")
    return plan


def _rewrite_part(run: str, there: Locations, out: str, level: int, plan: Plan, store: Store, part: Part) -> None:
    changed = (_apply_level(row, part, plan.settings.tile_size, level) for row in _read_rows(run, there, part))
    write_part(out, part.key, changed, plan.model, part.version, store)


def _read_rows(run: str, there: Locations, part: Part) -> list[Row]:
    """Read the rows of a part. Raises SegError if they are damaged, or of another state of the scene."""
    table, version = read_versioned(there[part.key])
    if version != part.version:
        raise SegError(f"{part.scene.scene_id}: has changed since: repeat the seg segment command of {run} first")
    return list(table.to_pylist())


def _apply_level(row: Row, part: Part, tile_size: int, level: int) -> Row:
    """Return a row with the pixels that are kept as `level` or higher as building."""
    if row["status"] != "done" or not row["valid_px"]:
        return row
    building = _decode(row, part) >= level
    figures = WindowFigures(
        np.packbits(building, axis=-1)[:, None],
        np.array([[building.sum()]]),
        np.zeros((1, 1)),
        np.array([[row["valid_px"]]]),
    )
    (found,) = tile_rows(part.scene, Window.from_row(row), tile_size, figures)
    return {**row, **{name: found[name] for name in CHANGED}}


def _decode(row: Row, part: Part) -> NDArray[np.uint8]:
    try:
        return decode_probability(row)
    except SegError as error:
        at = f"{part.scene.scene_id}: tile {row['row_off']}, {row['col_off']}"
        raise CorruptFileError(f"{at}: {error}: seg verify says more") from error


def measure_curve(run: str, report: Callable[[str], None] = lambda _: None) -> Curve:
    """Return the coverage of what is done of a run at each threshold that is known exactly. Nothing is written.

    `report` is called with a text for each part. Raises SegError as `rethreshold` does.
    """
    plan, there = _read_plan(run), find_parts(run)
    parts = [part for part in plan.parts() if part.key in there]
    pixels, areas = np.zeros(LEVELS + 1, np.int64), np.zeros(LEVELS + 1)
    valid_px, has_areas = 0, True
    count = partial(_count_part, run, there)
    for number, found in enumerate(for_each(count, parts, count_cpus()), 1):
        for levels, valid, pixel_m2 in found:
            pixels += levels
            areas += levels * (pixel_m2 or 0.0)
            valid_px, has_areas = valid_px + valid, has_areas and pixel_m2 is not None
        report(f"{number} of {len(parts)} parts")
    thresholds = np.array([threshold_of(level) for level in range(1, LEVELS + 1)])
    building_px, building_m2 = np.cumsum(pixels[::-1])[::-1][1:], np.cumsum(areas[::-1])[::-1][1:]
    return Curve(thresholds, building_px, building_m2 if has_areas else None, valid_px)


def _count_part(run: str, there: Locations, part: Part) -> list[tuple[NDArray[np.int64], int, float | None]]:
    """Count the levels of each tile of a part. Returns counts `int64 (256,)`, valid pixels and m2 of a pixel."""
    return list(_count_tiles(_read_rows(run, there, part), part))


def _count_tiles(rows: list[Row], part: Part) -> Iterator[tuple[NDArray[np.int64], int, float | None]]:
    for row in rows:
        if row["status"] == "done" and row["valid_px"]:
            pixel_m2 = None if row["area_m2"] is None else row["area_m2"] / row["valid_px"]
            yield np.bincount(_decode(row, part).ravel(), minlength=LEVELS + 1), row["valid_px"], pixel_m2
