"""Check the rows of a part against its plan: each tile has one row, whose figures are those of its mask."""

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from seg_core.errors import SegError
from seg_core.grid import split
from seg_core.run.plan import Part, Plan
from seg_core.run.rows import Row, decode_mask, decode_valid
from seg_core.run.tables import part_name

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


class Expected(NamedTuple):
    """What the rows of all parts of a run must agree with."""

    tile_size: int  # px
    part: int  # px
    model: str  # the bundle's hash

    @classmethod
    def of(cls, plan: Plan) -> "Expected":
        """Return what a plan expects."""
        return cls(plan.settings.tile_size, plan.settings.part, plan.model)


class PartCheck(NamedTuple):
    """What was found in the rows of a part."""

    num_done: int
    num_failed: int
    problems: list[str]  # a line each


def check_part(table: pa.Table, version: str, part: Part, expected: Expected) -> PartCheck:
    """Check the rows of a part, with all columns. `version` is the one in its file: see `Part.version`."""
    name, rows = part_name(part.key), table.to_pylist()
    planned = {tuple(tile) for tile in split(part.window, expected.tile_size)}
    found = [tuple(row[k] for k in ("row_off", "col_off", "height", "width")) for row in rows]
    problems = [f"{name}: tile {tile} has no row" for tile in sorted(planned - set(found))]
    problems += [f"{name}: tile {tile} was not planned" for tile in sorted(set(found) - planned)]
    problems += [f"{name}: tile {t} has {found.count(t)} rows" for t in sorted(set(found)) if found.count(t) > 1]
    if version != part.version:
        problems.append(f"{name}: was made from another state of {part.scene.scene_id} than the planned one")
    for row in rows:
        at = f"{name}: tile {row['row_off']}, {row['col_off']}"
        problems += [f"{at}: {problem}" for problem in _row_problems(row, expected, part)]
    num_failed = sum(row["status"] == "failed" for row in rows)
    return PartCheck(len(rows) - num_failed, num_failed, problems)


def _row_problems(row: Row, expected: Expected, part: Part) -> Iterator[str]:
    """Yield what is wrong with a row of a part."""
    size = expected.tile_size
    if row["scene_id"] != part.scene.scene_id or row["model"] != expected.model:
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
