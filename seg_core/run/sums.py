"""Figures of tiles, added up: of a part, of an image, of a run."""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

SUMMED_COLUMNS = ("valid_px", "building_px", "area_m2", "building_m2")
COLUMNS = ["status", "mean_probability", *SUMMED_COLUMNS]
COUNTED = ("tiles", "failed", "without_area", *SUMMED_COLUMNS[:2])
SUMS = ("tiles", "failed", "without_area", "probability_px", *SUMMED_COLUMNS)  # what `sum_table` returns


def sum_table(table: pa.Table) -> dict[str, Any]:
    """Add up COLUMNS of the tiles that are done, and count those that are done and those that failed."""
    done = table.filter(pc.equal(table["status"], "done"))
    has_data = pc.greater(done["valid_px"], 0)
    without_area = pc.sum(pc.and_(pc.is_null(done["area_m2"]), has_data)).as_py() or 0
    weighted = pc.if_else(has_data, pc.multiply(done["mean_probability"], done["valid_px"]), 0.0)
    sums: dict[str, Any] = {"tiles": len(done), "failed": len(table) - len(done), "without_area": without_area}
    sums["probability_px"] = _add_exactly(weighted)
    for name in SUMMED_COLUMNS:
        values = done[name].drop_null()
        add = _add_exactly if name.endswith("_m2") else lambda column: pc.sum(column).as_py()
        sums[name] = add(values) if len(values) else None
    return sums


def _add_exactly(values: pa.ChunkedArray) -> float:
    """Add up floats. The sum does not depend on their order, as a plain one would."""
    return math.fsum(values.to_numpy().tolist())


def add_sums(each: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up what `sum_table` returns: the numbers of tiles, their pixels and areas (m2), coverage and probability.

    A figure is None if no tile has it. Areas are also None if any tile with valid pixels has no area.
    """
    counts: Counter[str] = Counter()
    floats = {name: array("d") for name in SUMS if name not in COUNTED}  # added up together, since the sum is exact
    for part in each:
        counts.update({name: part[name] for name in COUNTED if part[name] is not None})
        for name in SUMMED_COLUMNS[2:]:
            floats[name].extend([] if part[name] is None else [part[name]])
        floats["probability_px"].extend([part["probability_px"]] if part["valid_px"] else [])
    valid_px, building_px = (counts.get(name) for name in SUMMED_COLUMNS[:2])
    area_m2, building_m2 = (
        math.fsum(floats[name]) if floats[name] and not counts["without_area"] else None for name in SUMMED_COLUMNS[2:]
    )
    return {
        **{name: counts[name] for name in ("tiles", "failed")},
        "valid_px": valid_px,
        "building_px": building_px,
        "coverage": building_px / valid_px if valid_px and building_px is not None else None,
        "mean_probability": math.fsum(floats["probability_px"]) / valid_px if valid_px else None,
        "area_m2": area_m2,
        "building_m2": building_m2,
    }
