"""Check the rows of a part against its plan: each tile has one row, whose figures are those of its mask."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from seg_core.errors import SegError
from seg_core.grid import split
from seg_core.run.plan import Part, Plan
from seg_core.run.rows import Row, decode_bits, decode_mask, decode_probability
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
AREA_TOLERANCE = 1e-6  # of an area: another version of PROJ may have measured it


class Expected(NamedTuple):
    """What the rows of all parts of a run must agree with."""

    tile_size: int  # px
    part: int  # px
    model: str  # the bundle's hash
    keep_probability: bool

    @classmethod
    def of(cls, plan: Plan) -> "Expected":
        """Return what a plan expects."""
        return cls(plan.settings.tile_size, plan.settings.part, plan.model, plan.settings.keep_probability)


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
        yield from _figure_problems(row, expected)
    elif row["status"] != "failed" or not row["error"]:
        yield f"status {row['status']!r}, error {row['error']!r}"
    elif any(row[figure] is not None for figure in FIGURES):
        yield "failed, but has figures"


def _figure_problems(row: Row, expected: Expected) -> Iterator[str]:
    """Yield what is wrong with the figures and the pixels of a tile that is done."""
    valid, building = row["valid_px"], row["building_px"]
    if valid is None or building is None or not 0 <= building <= valid <= row["height"] * row["width"]:
        yield f"{building} building of {valid} valid of {row['height'] * row['width']} px"
        return
    if row["coverage"] != (building / valid if valid else None):
        yield f"coverage {row['coverage']} is not {building} / {valid}"
    mean, areas = row["mean_probability"], (row["area_m2"], row["building_m2"])
    if (mean is None) == (valid > 0) or not 0 <= (mean or 0) <= 1:
        yield f"mean_probability {mean} of {valid} valid px"
    if areas != (None, None) and (None in areas or not _is_share(*areas, building / valid if valid else 0)):
        yield f"building_m2 {areas[1]} of area_m2 {areas[0]} are not {building} of {valid} px"
    try:
        mask, pixels = _read_bits(row, "mask"), _read_bits(row, "valid")
        if expected.keep_probability:
            decode_probability(row)
    except SegError as error:
        yield str(error)
        return
    if (found := _count(mask)) != building:
        yield f"the mask has {found} building px, the row has {building}"
    if row["valid"] is not None and (found := _count(pixels)) != valid:
        yield f"the column valid has {found} px, the row has {valid} valid px"
    elif (row["valid"] is not None or not valid) and (mask & ~pixels).any():
        yield f"{_count(mask & ~pixels)} building px are not valid"


def _is_share(area: float, building: float, share: float) -> bool:
    """Return whether one area is this share of another. Both may be NaN, as those of a tile that holds a pole."""
    wanted = area * share
    is_close = math.isclose(building, wanted, rel_tol=AREA_TOLERANCE) or (math.isnan(building) and math.isnan(wanted))
    return is_close and not area < 0


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
