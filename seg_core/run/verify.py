"""Prove from the files alone that a run is complete: every planned tile has exactly one row, with consistent figures.

`repair` removes the parts that have problems. The command of the run then makes them again.
"""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from seg_core.errors import CorruptFileError, SegError
from seg_core.grid import split
from seg_core.run.isolated import for_each_isolated
from seg_core.run.lease import acquire_lease
from seg_core.run.plan import Part
from seg_core.run.record import read_record
from seg_core.run.rows import Row, decode_mask, decode_valid
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import crashes_its_reader, part_path, published_parts, read_states, read_versioned

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
    bad_parts: list[str] = field(default_factory=list)  # paths of the files that have problems

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
    plan = read_plan(run)
    report = VerifyReport(num_planned=plan.counts["tiles"])
    published, planned = set(published_parts(run)), {part_path(run, part.key) for part in plan.parts()}
    report.bad_parts = sorted(published - planned)
    read_states(report.bad_parts)  # raises SegError for those of a newer version, which may plan other parts
    report.problems += [f"{posixpath.basename(path)}: not a part of this run" for path in report.bad_parts]
    paths = [(part_path(run, part.key), part) for part in plan.parts()]
    check = partial(_verify_part, plan.settings.tile_size, plan.model)
    for found in chain(
        (_missing_part(*each) for each in paths if each[0] not in published),
        # As many threads as there are cores: decoding masks takes computing time.
        for_each_isolated(check, _crashing_part, [each for each in paths if each[0] in published], threads=None),
    ):
        report.num_done += found.num_done
        report.num_failed += found.num_failed
        report.num_missing += found.num_missing
        report.problems += found.problems
        report.bad_parts += found.bad_parts
    return report


def repair(run: str, names: Sequence[str] = ()) -> VerifyReport:
    """Remove the parts that have problems, and those with these file names. Returns the report of the check before.

    Raises SegError as `verify` does, for a name that no part has, and if a driver is working on the run.
    """
    read_record(run)  # otherwise the lease would be written to a folder that is not a run
    published = {posixpath.basename(path): path for path in published_parts(run)}
    unknown = next((name for name in names if name not in published), None)
    if unknown is not None:
        raise SegError(f"{unknown}: not a part of {run}: seg verify --deep lists the names of its files")
    with acquire_lease(run) as lease:
        report = verify(run)
        report.bad_parts = sorted({*report.bad_parts, *(published[name] for name in names)})
        for path in report.bad_parts:
            lease.remove(path)
    return report


def _missing_part(path: str, part: Part) -> VerifyReport:
    where = f"{part.scene.scene_id}, {part.window}"
    return VerifyReport(num_missing=1, problems=[f"{posixpath.basename(path)}: missing: {where}"])


def _crashing_part(where: tuple[str, Part]) -> VerifyReport:
    return VerifyReport(problems=[str(crashes_its_reader(where[0]))], bad_parts=[where[0]])


def _verify_part(tile_size: int, model: str, where: tuple[str, Part]) -> VerifyReport:
    """Check a published part, given its path and its plan."""
    path, part = where
    name = posixpath.basename(path)
    try:
        rows, version = read_versioned(path)
    except CorruptFileError as error:  # other errors come from the store, and say nothing about the part
        return VerifyReport(problems=[str(error)], bad_parts=[path])
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
    bad = [path] if problems else []
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
