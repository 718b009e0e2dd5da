"""Prove from the files alone that a run is complete: every planned tile has exactly one row, with consistent figures.

`repair` removes the parts that have problems. The command of the run then makes them again.
"""

import posixpath
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from seg_core.errors import CorruptFileError, SegError
from seg_core.grid import num_splits
from seg_core.run import tables
from seg_core.run.check import Expected, check_part
from seg_core.run.compact import remove_parts
from seg_core.run.isolated import for_each_isolated
from seg_core.run.lease import acquire_lease
from seg_core.run.ledger import find_damaged_figures, read_ledger
from seg_core.run.part_reading import read_versioned
from seg_core.run.parts import CompactedFile, Location, PartIndex, index_parts, read_index
from seg_core.run.plan import Part, Plan
from seg_core.run.record import read_record
from seg_core.run.stored_plan import read_plan
from seg_core.run.tables import crashes_its_reader, part_name, part_path
from seg_core.storage.files import read_bytes, sha256
from seg_core.threads import for_each

PARTS_AT_ONCE = 64  # that a thread reads: to ask it for each one takes longer than to read one on disk
PlacedPart = tuple[Location, Part]


@dataclass
class VerifyReport:
    """The result of a check, in tiles, but for the parts that are missing."""

    num_planned: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_missing_parts: int = 0  # parts without a file; each is also a problem
    problems: list[str] = field(default_factory=list)
    # Paths of the files that have problems. A part of a compacted file is named by the path of a file of its own.
    bad_parts: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every planned tile has exactly one row, and all rows are consistent."""
        return not self.problems

    def describe(self) -> str:
        """Return the state of the run in a few words. A complete run may still contain failed tiles."""
        if len(self.problems) > self.num_missing_parts:
            return f"not sound: {len(self.problems):,} problems"
        if self.num_missing_parts:
            return f"not finished: {self.num_missing_parts:,} parts are missing"
        if self.num_failed:
            return f"complete, but {self.num_failed:,} of {self.num_planned:,} tiles failed"
        return f"complete: all {self.num_planned:,} tiles are done"


def verify(run: str, again: bool = False) -> VerifyReport:
    """Check every part of a run against the plan.

    Each file is read. If the rows of a file were checked when it was published, as the ledger says, its content is
    compared with the digest that it had then. The rows of all other files are checked, or `again` those of all files.

    Raises SegError if `run` is not a run, if the store is unavailable, or if a newer version of this program wrote a
    file of it.
    """
    plan, report = read_plan(run), VerifyReport()
    report.num_planned = plan.counts["tiles"]
    index, damaged = _index(run)
    report.problems += [str(error) for error in damaged.values()]
    report.bad_parts += damaged
    figures = find_damaged_figures(run)
    report.problems += [f"ledger/{posixpath.basename(path)}: its content has changed" for path in figures]
    report.bad_parts += figures
    parts, there = list(plan.parts()), index.find()
    _report_unplanned(report, index, {part.key for part in parts})
    placed = [(there[part.key], part) for part in parts if part.key in there]
    if not again:
        placed = _compare_digests(report, run, plan, placed)
    for found in chain(
        (_missing_part(part) for part in parts if part.key not in there),
        # As many threads as there are cores: decoding masks takes computing time.
        for_each_isolated(partial(_verify_part, Expected.of(plan)), _crashing_part, placed, threads=None),
    ):
        report.num_done += found.num_done
        report.num_failed += found.num_failed
        report.num_missing_parts += found.num_missing_parts
        report.problems += found.problems
        report.bad_parts += found.bad_parts
    return report


def _compare_digests(report: VerifyReport, run: str, plan: Plan, placed: Sequence[PlacedPart]) -> list[PlacedPart]:
    """Count the parts whose files are those that were checked when they were published. Returns the others."""
    expected = Expected.of(plan)
    entered = chain.from_iterable(file.entries for file in read_ledger(run) if file.expected == expected)
    checked = {(each.key, each.version, each.digest) for each in entered}
    keys = {key for key, _, _ in checked}

    def is_unchanged(at: PlacedPart) -> bool:
        location, part = at
        if location.entry is not None or part.key not in keys:
            return False
        return (part.key, part.version, sha256(read_bytes(location.path) or b"")) in checked

    others = []
    groups = [placed[first : first + PARTS_AT_ONCE] for first in range(0, len(placed), PARTS_AT_ONCE)]
    for group, unchanged in zip(groups, for_each(lambda group: list(map(is_unchanged, group)), groups), strict=True):
        for at, holds in zip(group, unchanged, strict=True):
            if holds:
                report.num_done += num_splits(at[1].window, expected.tile_size)
            else:
                others.append(at)
    return others


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
    """Remove the parts that have problems, and those of these files. Returns the report of the check before.

    Raises SegError as `verify` does, for a name that no part has, and if a driver is working on the run.
    """
    read_record(run)  # otherwise the lease would be written to a folder that is not a run
    with acquire_lease(run) as lease:
        named = {part_name(key): key for key in _index(run)[0].find()}
        names = [posixpath.basename(name) for name in names]
        unknown = next((name for name in names if name not in named), None)
        if unknown is not None:
            raise SegError(f"{unknown}: not a part of {run}: its parts are the files in {run}/tiles")
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
    return VerifyReport(num_missing_parts=1, problems=[f"{part_name(part.key)}: missing: {where}"])


def _crashing_part(where: tuple[Location, Part]) -> VerifyReport:
    location, part = where
    path = _own_path(location, part)
    return VerifyReport(problems=[str(crashes_its_reader(path))], bad_parts=[path])


def _own_path(location: Location, part: Part) -> str:
    """Return the path of a part's own file, whether it has one or not."""
    return f"{posixpath.dirname(location.path)}/{part_name(part.key)}"


def _verify_part(expected: Expected, where: tuple[Location, Part]) -> VerifyReport:
    """Check a published part, given its location and its plan."""
    location, part = where
    try:
        table, version = read_versioned(location)
    except CorruptFileError as error:  # other errors come from the store, and say nothing about the part
        problem = str(error) if location.entry is None else f"{part_name(part.key)}: in {error}"
        return VerifyReport(problems=[problem], bad_parts=[_own_path(location, part)])
    found = check_part(table, version, part, expected)
    bad = [_own_path(location, part)] if found.problems else []
    return VerifyReport(num_done=found.num_done, num_failed=found.num_failed, problems=found.problems, bad_parts=bad)
