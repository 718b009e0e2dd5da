"""Prove from the files alone that a run is complete: every planned tile has exactly one row, with consistent figures.

`repair` removes the parts that have problems. The command of the run then makes them again.
"""

import posixpath
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from seg_core.errors import CorruptFileError, SegError
from seg_core.grid import split
from seg_core.run import tables
from seg_core.run.compact import remove_parts
from seg_core.run.isolated import for_each_isolated
from seg_core.run.lease import acquire_lease
from seg_core.run.parts import (
    CompactedFile,
    Location,
    PartIndex,
    index_parts,
    read_index,
    read_versioned,
)
from seg_core.run.plan import Part
from seg_core.run.record import read_record
from seg_core.run.rows import Row, decode_mask, decode_valid
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import crashes_its_reader, part_name, part_path

FIGURES = (
    "valid_px",
    "building_px",
    "coverage",
    "area_m2",
    "building_m2",
    "mean_probability",
    "mask",
    "valid",
    "probability",
)


@dataclass
class VerifyReport:
    """The result of a check."""

    num_planned: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_missing: int = 0  # parts without a file; each is also a problem
    problems: list[str] = field(default_factory=list)
    # Paths of the files that have problems. A part of a compacted file is named by the path of a file of its own.
    bad_parts: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every planned tile has exactly one row, and all rows are consistent."""
        return not self.problems

    def describe(self) -> str:
        """Return the state of the run in a few words. A complete run may still contain failed tiles."""
        if len(self.problems) > self.num_missing:
            return f"not sound: {len(self.problems):,} problems"
        if self.num_missing:
            return f"not finished: {self.num_missing:,} parts are missing"
        if self.num_failed:
            return f"complete, but {self.num_failed:,} of {self.num_planned:,} tiles failed"
        return f"complete: all {self.num_planned:,} tiles are done"


def verify(run: str) -> VerifyReport:
    """Read every part of a run and check it against the plan.

    Raises SegError if `run` is not a run, if the store is unavailable, or if a newer version of this program wrote a
    file of it.
    """
    plan, report = read_plan(run), VerifyReport()
    report.num_planned = plan.counts["tiles"]
    index, damaged = _index(run)
    report.problems += [str(error) for error in damaged.values()]
    report.bad_parts += damaged
    parts, there = list(plan.parts()), index.find()
    _report_unplanned(report, index, {part.key for part in parts})
    check = partial(_verify_part, plan.settings.tile_size, plan.model)
    for found in chain(
        (_missing_part(part) for part in parts if part.key not in there),
        # As many threads as there are cores: decoding masks takes computing time.
        for_each_isolated(
            check, _crashing_part, [(there[part.key], part) for part in parts if part.key in there], threads=None
        ),
    ):
        report.num_done += found.num_done
        report.num_failed += found.num_failed
        report.num_missing += found.num_missing
        report.problems += found.problems
        report.bad_parts += found.bad_parts
    return report


def _index(run: str) -> tuple[PartIndex, dict[str, CorruptFileError]]:
    """Find the parts of a run. Returns compacted files that are damaged by path, with their errors."""
    damaged: dict[str, CorruptFileError] = {}

    def read(path: str) -> CompactedFile:
        try:
            file = read_index(path)
            deque(file.locations(), maxlen=0)
        except CorruptFileError as error:
            damaged[path] = error
            return CompactedFile(path, (), ())
        return file

    return index_parts(run, read), damaged


def _report_unplanned(report: VerifyReport, index: PartIndex, planned: Collection[str]) -> None:
    """Report files that are no part of the run, and parts of compacted files that are not planned."""
    unplanned = {key: location.path for key, location in index.own.items() if key not in planned}
    tables.read_states(sorted(unplanned.values()))  # raises SegError if a newer version wrote them: its plan may differ
    strange = sorted([*unplanned.values(), *index.other])
    report.problems += [f"{posixpath.basename(path)}: not a part of this run" for path in strange]
    report.bad_parts += strange
    for file in index.compacted:
        keys = [entry.key for entry in file.entries if entry.key not in planned]
        report.problems += [
            f"{posixpath.basename(file.path)}: {part_name(key)}: not a part of this run" for key in keys
        ]
        report.bad_parts += [part_path(index.run, key) for key in keys]


def repair(run: str, names: Sequence[str] = ()) -> VerifyReport:
    """Remove the parts that have problems, and those with these file names. Returns the report of the check before.

    Raises SegError as `verify` does, for a name that no part has, and if a driver is working on the run.
    """
    read_record(run)  # otherwise the lease would be written to a folder that is not a run
    with acquire_lease(run) as lease:
        named = {part_name(key): key for key in _index(run)[0].find()}
        unknown = next((name for name in names if name not in named), None)
        if unknown is not None:
            raise SegError(f"{unknown}: not a part of {run}: seg verify --deep lists the names of its files")
        report = verify(run)
        keys = {key for key in named.values() if part_path(run, key) in report.bad_parts} | {
            named[name] for name in names
        }
        paths = {part_path(run, key) for key in keys}
        report.bad_parts = sorted({*report.bad_parts, *paths})
        for path in report.bad_parts:
            if path not in paths:
                lease.remove(path)
        remove_parts(_index(run)[0], keys, lease)
    return report


def _missing_part(part: Part) -> VerifyReport:
    where = f"{part.scene.scene_id}, {part.window}"
    return VerifyReport(num_missing=1, problems=[f"{part_name(part.key)}: missing: {where}"])


def _crashing_part(where: tuple[Location, Part]) -> VerifyReport:
    location, part = where
    path = _own_path(location, part)
    return VerifyReport(problems=[str(crashes_its_reader(path))], bad_parts=[path])


def _own_path(location: Location, part: Part) -> str:
    """Return the path of a part's own file, whether it has one or not."""
    return f"{posixpath.dirname(location.path)}/{part_name(part.key)}"


def _verify_part(tile_size: int, model: str, where: tuple[Location, Part]) -> VerifyReport:
    """Check a published part, given its location and its plan."""
    location, part = where
    name = part_name(part.key)
    try:
        table, version = read_versioned(location)
    except CorruptFileError as error:  # other errors come from the store, and say nothing about the part
        problem = str(error) if location.entry is None else f"{name}: in {error}"
        return VerifyReport(problems=[problem], bad_parts=[_own_path(location, part)])
    rows = list(table.to_pylist())
    planned = {tuple(tile) for tile in split(part.window, tile_size)}
    found = [tuple(row[k] for k in ("row_off", "col_off", "height", "width")) for row in rows]
    problems = [f"{name}: tile {tile} has no row" for tile in sorted(planned - set(found))]
    problems += [f"{name}: tile {tile} was not planned" for tile in sorted(set(found) - planned)]
    problems += [f"{name}: tile {t} has {found.count(t)} rows" for t in sorted(set(found)) if found.count(t) > 1]
    if version != part.version:
        problems.append(f"{name}: was made from another state of {part.scene.scene_id} than the planned one")
    for row in rows:
        at = f"{name}: tile {row['row_off']}, {row['col_off']}"
        problems += [f"{at}: {problem}" for problem in _row_problems(row, tile_size, model, part)]
    num_failed = sum(row["status"] == "failed" for row in rows)
    bad = [_own_path(location, part)] if problems else []
    return VerifyReport(num_done=len(rows) - num_failed, num_failed=num_failed, problems=problems, bad_parts=bad)


def _row_problems(row: Row, size: int, model: str, part: Part) -> Iterator[str]:
    """Yield what is wrong with a row of a part, for tiles of `size` px."""
    if row["scene_id"] != part.scene.scene_id or row["model"] != model:
        yield "belongs to another scene or model"
    if (row["tile_row"], row["tile_col"]) != (row["row_off"] // size, row["col_off"] // size):
        yield f"has the numbers of tile {row['tile_row']}, {row['tile_col']}"
    if row["status"] == "done" and row["error"] is row["error_class"] is row["attempts"] is None:
        yield from _figure_problems(row)
    elif row["status"] != "failed" or not row["error"]:
        yield f"status {row['status']!r}, error {row['error']!r}"
    elif any(row[figure] is not None for figure in FIGURES):
        yield "failed, but has figures"


def _figure_problems(row: Row) -> Iterator[str]:
    """Yield what is wrong with the figures and the mask of a tile that is done."""
    valid, building = row["valid_px"], row["building_px"]
    if valid is None or building is None or not 0 <= building <= valid <= row["height"] * row["width"]:
        yield f"{building} building of {valid} valid of {row['height'] * row['width']} px"
        return
    if row["coverage"] != (building / valid if valid else None):
        yield f"coverage {row['coverage']} is not {building} / {valid}"
    try:
        mask, pixels = decode_mask(row["mask"], row["height"], row["width"]), decode_valid(row)
    except SegError as error:
        yield str(error)
        return
    if mask.sum() != building:
        yield f"the mask has {mask.sum()} building px, the row has {building}"
    if pixels is not None and pixels.sum() != valid:
        yield f"the column valid has {pixels.sum()} px, the row has {valid} valid px"
    elif pixels is not None and (mask & ~pixels).any():
        yield f"{(mask & ~pixels).sum()} building px are not valid"
