"""Check the rows of a part against its plan: each tile has one row, whose figures are those of its mask."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from seg_core.errors import SegError
from seg_core.grid import split
from seg_core.run.plan import Part, Plan
from seg_core.run.rows import Row, decode_bits, decode_mask
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
        mask, pixels = _read_bits(row, "mask"), _read_bits(row, "valid")
    except SegError as error:
        yield str(error)
        return
    if (found := _count(mask)) != building:
        yield f"the mask has {found} building px, the row has {building}"
    if row["valid"] is not None and (found := _count(pixels)) != valid:
        yield f"the column valid has {found} px, the row has {valid} valid px"
    elif (row["valid"] is not None or not valid) and (mask & ~pixels).any():
        yield f"{_count(mask & ~pixels)} building px are not valid"


def _read_bits(row: Row, column: str) -> NDArray[np.uint8]:
    """Return the packed lines of a mask, `uint8 (height, bytes)`; null holds no pixel."""
    png, height, width = row[column], row["height"], row["width"]
    if png is None:
        return np.zeros((height, -(-width // 8)), np.uint8)
    if (bits := decode_bits(png, height, width)) is not None:
        return bits
    return np.packbits(decode_mask(png, height, width, "mask" if column == "mask" else "column valid"), axis=-1)


def _count(bits: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))
