"""What a page shows of a run: figures by cell of the map, imagery, pictures of tiles, and outlines."""

from collections.abc import Callable
from dataclasses import dataclass

from seg_core.report.cells import make_cells
from seg_core.report.crops import Crops, cut_crops
from seg_core.report.frame import Frame, choose_frame
from seg_core.report.outlines import Outlines, draw_outlines
from seg_core.report.quicklook import Quicklook, draw_quicklook
from seg_core.report.tiles import Tally, add_up
from seg_core.run.plan import Plan


@dataclass(frozen=True)
class Drawn:
    """What a page shows of a run."""

    frame: Frame
    tally: Tally
    quicklook: Quicklook
    crops: Crops
    outlines: Outlines


def read_overview(run: str, plan: Plan, report: Callable[[str], None]) -> tuple[Frame, Tally, Quicklook]:
    """Return the frame of a map of a run, its figures by cell, and its imagery; with messages and errors as `draw`."""
    frame = choose_frame(plan.images)
    tally = add_up(run, plan, make_cells(plan, frame), lambda text: report(f"adding up tiles: {text}"))
    return frame, tally, draw_quicklook(plan, frame, lambda text: report(f"reading the imagery: {text}"))


def draw(run: str, plan: Plan, report: Callable[[str], None]) -> Drawn:
    """Read what the page of a run shows. `report` is called with a text for each step.

    Raises SegError if a file of the run can't be read. Imagery that can't be read is left out and counted.
    """
    frame, tally, quicklook = read_overview(run, plan, report)
    crops = cut_crops(run, tally, lambda text: report(f"cutting tiles: {text}"))
    outlines = draw_outlines(run, tally, frame, crops.by_cell, lambda text: report(f"finding outlines: {text}"))
    return Drawn(frame, tally, quicklook, crops, outlines)
