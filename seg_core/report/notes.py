"""Sentences on a page that say what its map shows."""

from collections.abc import Iterator

from seg_core.report.cells import Cells
from seg_core.report.crops import Crops
from seg_core.report.drawn import Drawn
from seg_core.report.outlines import TOLERANCE, Outlines
from seg_core.report.quicklook import Quicklook
from seg_core.training.class_names import is_building


def describe_map(drawn: Drawn, class_name: str) -> list[str]:
    """Return sentences on what the map shows, and what was aggregated, sampled or left out."""
    lines = (
        _outlines_note(drawn.outlines, class_name),
        drawn.frame.describe(),
        _cells_note(drawn.tally.cells),
        *describe_quicklook(drawn.quicklook),
        _crops_note(drawn.crops),
    )
    return [line for line in lines if line]


def _outlines_note(outlines: Outlines, class_name: str) -> str:
    """Return which outlines there are, and how exact they are."""
    if outlines.problem:
        return f"No outlines are on the map, because masks can't be read now: {outlines.problem}"
    if not outlines.num_shapes:
        return ""
    shapes = f"{outlines.num_shapes:,} " + ("buildings" if is_building(class_name) else f"areas of {class_name}")
    exact = f"at most {TOLERANCE:g} px off the mask"
    if outlines.num_tiles is None:
        return f"Zoom in to see the outlines of all {shapes}, {exact}."
    return (
        f"Zoom in to see the outlines of {shapes}, {exact}: those of {outlines.num_tiles:,} tiles, which have the most "
        f"{class_name} of the tiles with pictures. seg export footprints has all."
    )


def _cells_note(cells: Cells) -> str:
    if cells.groups is not None:
        return f"There are many scenes: each of the {cells.num_cells:,} rectangles adds up those of a neighbourhood."
    if cells.side > 1:
        return f"There are many tiles: each rectangle adds up a block of {cells.side} x {cells.side} tiles."
    return ""


def describe_quicklook(quicklook: Quicklook) -> Iterator[str]:
    """Yield a sentence on each reason why scenes are not under the map."""
    chosen, files, failed = quicklook.num_chosen, quicklook.num_files, len(quicklook.problems)
    if chosen < files:
        yield f"The imagery under the map is a sample: {chosen:,} of {files:,} scenes."
    if failed:
        missing = "No scene is" if failed == chosen else f"{failed:,} of {chosen:,} scenes are not"
        yield f"{missing} under the map, because they can't be read now, such as: {quicklook.problems[0]}"


def _crops_note(crops: Crops) -> str:
    """Return how many tiles have pictures."""
    number = len(crops.by_cell)
    if number == crops.num_cells:
        return ""
    return (
        f"Pictures of {number:,} tiles are on the page, of {crops.num_cells:,} that could have one: half of them are "
        "those with the most building, the others are spread evenly. A dot on the map marks them."
    )
