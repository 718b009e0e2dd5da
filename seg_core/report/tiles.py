"""Add up the rows of a run for a page: by cell of the map, by image, and over all. Masks are not read."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from seg_core.grid import Window
from seg_core.report.cells import Cells, Numbers
from seg_core.report.texts import tile_text
from seg_core.run.part_reading import map_live_tables
from seg_core.run.parts import index_parts
from seg_core.run.plan import Plan

SUMS = ("done", "failed", "valid_px", "building_px", "area_m2", "building_m2", "probability_px", "without_area")
FIGURES = ("valid_px", "building_px", "area_m2", "building_m2", "mean_probability")
COLUMNS = ("status", "error_class", "error", "scene_id", "tile_row", "tile_col", *Window._fields, *FIGURES)
STEPS = 1000  # bins of the finest histogram of coverage
MAX_REASONS = 1000  # of failures that are told apart

Sums = NDArray[np.float64]  # a column for each of SUMS


class Best(NamedTuple):
    """The tile of a cell that holds the most building."""

    building_px: int
    image: int
    window: Window


class Reason(NamedTuple):
    """Why tiles failed."""

    error_class: str
    error: str


@dataclass
class Tally:
    """What the rows of a run add up to."""

    plan: Plan
    cells: Cells
    by_cell: Sums  # `(cells, sums)`
    by_image: Sums  # `(images, sums)`
    planned: Numbers  # tiles of each image
    histogram: Numbers = field(default_factory=lambda: np.zeros(STEPS, np.int64))  # tiles by coverage, from 0 to 1
    without_building: int = 0  # tiles that hold data, and no building
    best: dict[int, Best] = field(default_factory=dict)  # by cell
    reasons: Counter[Reason] = field(default_factory=Counter)  # number of failed tiles
    first_failed: dict[Reason, str] = field(default_factory=dict)  # where one of them is

    def figures(self) -> dict[str, Any]:
        """Return counts, coverage and areas of the whole run, as `seg_core.run.query.summary` has them."""
        return {
            "scenes": self.plan.counts["scenes"],
            **figures_of(self.by_image.sum(axis=0), int(self.planned.sum())),
        }


def figures_of(sums: Sums, planned: int) -> dict[str, Any]:
    """Return the figures of a row of sums: those of a cell, of an image or of the whole run.

    Areas are None if there are none, or if a tile with valid pixels has none.
    """
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    done, failed, valid_px = (int(total[name]) for name in ("done", "failed", "valid_px"))
    has_area = valid_px > 0 and not total["without_area"]
    return {
        "planned": planned,
        "tiles": done,
        "failed": failed,
        "missing": max(0, planned - done - failed),
        "valid_px": valid_px if done else None,
        "building_px": int(total["building_px"]) if done else None,
        "coverage": total["building_px"] / valid_px if valid_px else None,
        "mean_probability": total["probability_px"] / valid_px if valid_px else None,
        "area_km2": total["area_m2"] / 1e6 if has_area else None,
        "building_km2": total["building_m2"] / 1e6 if has_area else None,
    }


def add_up(run: str, plan: Plan, cells: Cells, report: Callable[[str], None] = lambda _: None) -> Tally:
    """Read the figures of all tiles of a run, and add them up. `report` is called with a text for each file.

    Memory grows with the number of cells and images only. Raises SegError if a file of the run can't be read.
    """
    images = {image.scene_id: number for number, image in enumerate(plan.images)}
    names, lock = pa.array(list(images), pa.string()), threading.Lock()
    planned = np.zeros(len(images), np.int64)
    for part in plan.parts():
        planned[images[part.scene.scene_id]] += _num_tiles(part.window, plan.settings.tile_size)
    tally = Tally(plan, cells, _zeros(cells.num_cells), _zeros(len(images)), planned)

    def add(table: pa.Table) -> None:
        numbers = pc.index_in(table["scene_id"], names).fill_null(-1).to_numpy()
        with lock:
            _add_table(tally, table.filter(pa.array(numbers >= 0)), numbers[numbers >= 0])

    for number, _ in enumerate(map_live_tables(add, index_parts(run), COLUMNS), 1):
        report(f"{number:,} files")
    return tally


def _zeros(number: int) -> Sums:
    return np.zeros((number, len(SUMS)))


def _num_tiles(window: Window, size: int) -> int:
    return -(-window.height // size) * -(-window.width // size)


def _add_table(tally: Tally, table: pa.Table, images: Numbers) -> None:
    """Add rows, of which `images` are the numbers of their images."""
    rows, cols = (table[name].to_numpy() for name in ("tile_row", "tile_col"))
    cells, sums = tally.cells.find(images, rows, cols), _sums_of(table)
    for at, target in ((cells, tally.by_cell), (images, tally.by_image)):
        known = at >= 0
        np.add.at(target, at[known], sums[known])
    valid, building = sums[:, SUMS.index("valid_px")], sums[:, SUMS.index("building_px")]
    has_data = valid > 0
    steps = (building[has_data] * STEPS // valid[has_data]).astype(np.int64).clip(max=STEPS - 1)
    tally.histogram += np.bincount(steps, minlength=STEPS)
    tally.without_building += int((has_data & (building == 0)).sum())
    _keep_best(tally, table, images, cells, np.where(has_data, building, -1))
    _count_reasons(tally, table)


def _sums_of(table: pa.Table) -> Sums:
    """Return what each row adds to the sums, `(rows, sums)`."""
    done = pc.equal(table["status"], "done").to_numpy()
    figures = {name: pc.fill_null(pc.cast(table[name], pa.float64()), 0.0).to_numpy() for name in FIGURES}
    valid, probability = figures["valid_px"], figures.pop("mean_probability")
    without_area = table["area_m2"].is_null().to_numpy() & (valid > 0)
    return np.column_stack([done, ~done, *figures.values(), probability * valid, without_area]).astype(np.float64)


def _keep_best(tally: Tally, table: pa.Table, images: Numbers, cells: Numbers, building: NDArray[np.float64]) -> None:
    """Keep the tile of each cell that holds the most building; of equal ones, the first."""
    offsets = [table[name].to_numpy() for name in Window._fields]
    order = np.lexsort((offsets[1], offsets[0], images, -building, cells))
    _, first = np.unique(cells[order], return_index=True)
    for at in order[first].tolist():
        cell = int(cells[at])
        found = Best(int(building[at]), int(images[at]), Window(*(int(each[at]) for each in offsets)))
        if cell >= 0 and found.building_px >= 0:
            known = tally.best.get(cell)
            tally.best[cell] = found if known is None else min(known, found, key=_best_first)


def _best_first(best: Best) -> tuple[int, int, Window]:
    return -best.building_px, best.image, best.window


def _count_reasons(tally: Tally, table: pa.Table) -> None:
    failed = table.filter(pc.not_equal(table["status"], "done"))
    for row in failed.select(["error_class", "error", "scene_id", "tile_row", "tile_col"]).to_pylist():
        reason = Reason(row["error_class"] or "", row["error"] or "")
        if reason not in tally.reasons and len(tally.reasons) >= MAX_REASONS:
            reason = Reason("", "other reasons")
        tally.reasons[reason] += 1
        where = tile_text(row["scene_id"], row["tile_row"], row["tile_col"])
        tally.first_failed[reason] = min(where, tally.first_failed.get(reason, where))
