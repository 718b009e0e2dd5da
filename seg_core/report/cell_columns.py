"""What the map shows of each cell: its outline, its colours by what is known of it, and its figures as text."""

from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from seg_core.report.cells import Cells
from seg_core.report.crops import Crop, Crops
from seg_core.report.frame import Frame
from seg_core.report.texts import area_text, count_text, share_text
from seg_core.report.tiles import Tally, figures_of

RAMP = "viridis"
NICE = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # ends of the ramp
RED, DARK, GREY, PALE = "#d62728", "#333333", "#bdbdbd", "#ffffff"
NO_CROP = Crop("", "", "")
TEXTS = ("name", "state", "coverage", "valid", "building", "crop", "image", "mask")
COLUMNS = ("xs", "ys", "fill", "hatch", "hatch_color", "line", "line_width", "share", *TEXTS)


class Style(NamedTuple):
    """How a cell is drawn besides its colour of coverage."""

    fill: str | None  # None: by coverage
    hatch: str  # Bokeh's name of a pattern, or blank
    hatch_color: str
    line: str
    line_width: float
    rank: int  # those of a higher rank are drawn over the others


PLAIN = Style(None, " ", DARK, "#ffffff", 0.5, 0)
NO_DATA = Style(PALE, "dot", "#777777", "#999999", 0.5, 0)
MISSING = Style(GREY, "right_diagonal_line", DARK, DARK, 0.8, 1)
FAILED = Style("#ffe3e0", "diagonal_cross", RED, RED, 2.0, 2)
PARTLY_MISSING = PLAIN._replace(hatch="right_diagonal_line", line=DARK, line_width=0.8, rank=1)
PARTLY_FAILED = PLAIN._replace(line=RED, line_width=2.0, rank=2)


def style_of(figures: dict[str, Any]) -> Style:
    """Return how a cell with these figures is drawn."""
    if figures["failed"]:
        style = FAILED if not figures["valid_px"] else PARTLY_FAILED
    elif figures["missing"]:
        style = MISSING if not figures["valid_px"] else PARTLY_MISSING
    else:
        style = PLAIN if figures["valid_px"] else NO_DATA
    return style


def describe_state(figures: dict[str, Any]) -> str:
    """Return in words what is known of a cell."""
    states = [
        (figures["failed"], "failed"),
        (figures["missing"], "not done yet"),
        (figures["tiles"], "done" if figures["valid_px"] else "done, without data"),
    ]
    found = [(number, state) for number, state in states if number]
    if figures["planned"] == 1:
        return found[0][1]
    return ", ".join(f"{count_text(number)} {state}" for number, state in found)


def end_of_ramp(tally: Tally) -> float:
    """Return the coverage that has the last colour of the ramp: that of the densest cell, rounded up."""
    figures = (figures_of(sums, 0)["coverage"] for sums in tally.by_cell)
    densest = max((coverage for coverage in figures if coverage is not None), default=0.0)
    return next(end for end in NICE if densest <= end)


def make_columns(tally: Tally, frame: Frame, crops: Crops) -> dict[str, list[Any]]:
    """Return the columns of the map's cells, in the order in which they are drawn."""
    x, y = tally.cells.outlines(frame)
    names, end, ramp = name_cells(tally.cells), end_of_ramp(tally), colormaps[RAMP]
    digits = 7 if frame.is_geographic else 2
    rows = []
    for cell, (sums, planned) in enumerate(zip(tally.by_cell, tally.cells.planned.tolist(), strict=True)):
        figures, crop = figures_of(sums, planned), crops.by_cell.get(cell, NO_CROP)
        style, coverage = style_of(figures), figures["coverage"]
        row = {
            "xs": np.round(x[cell], digits).tolist(),
            "ys": np.round(y[cell], digits).tolist(),
            "fill": style.fill or to_hex(ramp(coverage / end)),
            **{name: value for name, value in style._asdict().items() if name != "fill"},
            "name": names[cell],
            "state": describe_state(figures),
            "share": round(coverage or 0.0, 6),
            "coverage": share_text(coverage),
            "valid": area_text(figures["area_km2"], figures["valid_px"]),
            "building": area_text(figures["building_km2"], figures["building_px"]),
            "crop": f"Pictured: {crop.where}" if crop.mask and planned > 1 else "",
            "image": crop.image,
            "mask": crop.mask,
        }
        rows.append(row)
    rows.sort(key=lambda row: row["rank"])
    return {name: [row[name] for row in rows] for name in COLUMNS}


def name_cells(cells: Cells) -> list[str]:
    """Return how each cell is called: after its scene and its place there, or after its scenes."""
    if cells.groups is not None:
        members = np.bincount(cells.groups, minlength=cells.num_cells).tolist()
        first = {int(group): number for number, group in reversed(list(enumerate(cells.groups)))}
        return [
            cells.images[first[at]].scene_id + (f" and {number - 1:,} more" if number > 1 else "")
            for at, number in enumerate(members)
        ]
    names = []
    for image, window in cells.windows():
        top, left = window.row_off // cells.tile_size, window.col_off // cells.tile_size
        bottom, right = (window.bottom - 1) // cells.tile_size, (window.right - 1) // cells.tile_size
        is_tile = cells.side == 1
        place = f"tile {top}, {left}" if is_tile else f"tiles {top} to {bottom}, {left} to {right}"
        names.append(f"{cells.images[image].scene_id}, {place}")
    return names
