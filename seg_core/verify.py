"""Prove from the files alone that a run is complete: every planned tile has exactly one row, and rows add up."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from seg_core.coverage import Row, decode_mask
from seg_core.errors import SegError
from seg_core.results import part_path, published_parts, read_part
from seg_core.run import Part, Plan, read_plan, read_record
from seg_core.tiling import split

FIGURES = ("valid_px", "building_px", "coverage", "area_m2", "building_m2", "mean_probability", "mask", "probability")


@dataclass
class Verdict:
    """What was found."""

    num_planned: int = 0
    num_done: int = 0
    num_failed: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether the run is complete and sound."""
        return not self.problems


def verify(run: str) -> Verdict:
    """Read every part of a run and check it against the plan. Raises SegError where `run` is no run."""
    plan = read_plan(run)
    verdict = Verdict(num_planned=plan.counts["tiles"])
    if read_record(run)["plan"].get("fingerprint") != plan.fingerprint:
        verdict.problems.append("run.json or the scenes table was changed after the run was planned")
    planned = {part_path(run, part.key).name for part in plan.parts()}
    verdict.problems += [f"{p.name}: not a part of this run" for p in published_parts(run) if p.name not in planned]
    with ThreadPoolExecutor() as pool:
        for found in pool.map(lambda part: _verify_part(run, plan, part), plan.parts()):
            verdict.num_done += found.num_done
            verdict.num_failed += found.num_failed
            verdict.problems += found.problems
    return verdict


def _verify_part(run: str, plan: Plan, part: Part) -> Verdict:
    path = part_path(run, part.key)
    if not path.exists():
        return Verdict(problems=[f"{path.name}: missing: {part.scene.scene_id}, {part.window}"])
    try:
        rows = read_part(path)
    except SegError as error:
        return Verdict(problems=[str(error)])
    planned = {tuple(tile) for tile in split(part.window, plan.settings.tile_size)}
    found = [tuple(row[k] for k in ("row_off", "col_off", "height", "width")) for row in rows]
    problems = [f"{path.name}: tile {tile} has no row" for tile in sorted(planned - set(found))]
    problems += [f"{path.name}: tile {tile} was not planned" for tile in sorted(set(found) - planned)]
    problems += [f"{path.name}: tile {t} has {found.count(t)} rows" for t in sorted(set(found)) if found.count(t) > 1]
    for row in rows:
        problems += [
            f"{path.name}: tile {row['row_off']}, {row['col_off']}: {p}" for p in _row_problems(row, plan, part)
        ]
    num_failed = sum(row["status"] == "failed" for row in rows)
    return Verdict(num_done=len(rows) - num_failed, num_failed=num_failed, problems=problems)


def _row_problems(row: Row, plan: Plan, part: Part) -> Iterator[str]:
    size = plan.settings.tile_size
    if row["scene_id"] != part.scene.scene_id or row["model"] != plan.model:
        yield "is of another scene or model"
    if (row["tile_row"], row["tile_col"]) != (row["row_off"] // size, row["col_off"] // size):
        yield f"says it is tile {row['tile_row']}, {row['tile_col']}"
    if row["status"] == "done" and row["error"] is None:
        yield from _figure_problems(row)
    elif row["status"] != "failed" or not row["error"]:
        yield f"status {row['status']!r}, error {row['error']!r}"
    elif any(row[figure] is not None for figure in FIGURES):
        yield "failed, but has figures"


def _figure_problems(row: Row) -> Iterator[str]:
    valid, building = row["valid_px"], row["building_px"]
    if valid is None or building is None or not 0 <= building <= valid <= row["height"] * row["width"]:
        yield f"{building} building of {valid} valid of {row['height'] * row['width']} px"
        return
    if row["coverage"] != (building / valid if valid else None):
        yield f"coverage {row['coverage']} is not {building} / {valid}"
    try:
        in_mask = int(decode_mask(row["mask"], row["height"], row["width"]).sum())
    except SegError as error:
        yield str(error)
        return
    if in_mask != building:
        yield f"the mask holds {in_mask} building px, the row says {building}"
