"""Some windows of a run side by side with the imagery: the prediction, and the truth or the probability."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grid import Window, intersects
from seg_core.imagery.raster import read_image
from seg_core.plots.pictures import MISSING_GREY, Panel, Rgb, assemble_panels, paint_state, truth_panels
from seg_core.report.pictures import to_rgb
from seg_core.report.views import Place, View, choose_views
from seg_core.run.export_masks import join_levels, join_tiles
from seg_core.run.parts import Locations, find_parts
from seg_core.run.places import Places
from seg_core.run.plan import Part, Plan
from seg_core.run.score import LabelReader, SceneLabelReader, SceneLabels, open_readers
from seg_core.run.stored_plan import read_plan
from seg_core.training.dataset import Classes
from seg_core.training.metrics import Counts, count, scores

Report = Callable[[str], None]


class Labels(NamedTuple):
    """The truth: a label file of one scene, a folder of them, or labels of all scenes; and how colours mean classes."""

    source: str | SceneLabels
    classes: Classes | None = None


def draw_panels(
    run: str, places: Sequence[Place], labels: Labels | None = None, given: Places = (), report: Report = lambda _: None
) -> tuple[bytes, dict[str, Any]]:
    """Draw places of a run as a PNG, a row for each: image, prediction, and the probability if the run keeps it.

    With labels these are image, truth, prediction and errors. Pixels of which nothing is known are dark. Scenes that
    have moved are at the given places, if any. Also returns the number of windows and, with labels, the IoU over all of
    them. Memory depends on a window. Raises SegError for a place that is not in the run, and for scenes or labels that
    can't be read.
    """
    plan, there = read_plan(run, given), find_parts(run)
    views, has_probability = choose_views(plan, places), plan.settings.keep_probability
    readers = _open_readers(labels, views) if labels else {}
    panels: list[Panel] = []
    total = Counts()
    for number, view in enumerate(views, 1):
        report(f"{number} of {len(views)} windows")
        parts = _parts_of(plan, view)
        picture, predicted = _read(plan, there, parts, view)
        if labels:
            truth, counts = _read_truth(readers[view.image.scene_id], view, predicted)
            panels += truth_panels(f"{view.title}: IoU {_iou_text(counts)}", picture, predicted, truth)
            total = total.plus(counts)
        else:
            panels += [Panel(view.title, picture), Panel("prediction", paint_state(picture, predicted))]
            panels += [_probability_panel(plan, there, parts, view.window)] if has_probability else []
    iou = {"iou": scores(total)["iou"]} if labels else {}
    return assemble_panels(panels, len(panels) // len(views)), {"windows": len(views), **iou}


def _open_readers(labels: Labels, views: Sequence[View]) -> Mapping[str, LabelReader | SceneLabelReader]:
    images = {view.image.scene_id: view.image for view in views}
    return open_readers(labels.source, list(images.values()), labels.classes)


def _read_truth(
    reader: LabelReader | SceneLabelReader, view: View, predicted: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], Counts]:
    """Return the label of a window like its mask, MISSING where it is not labelled, and the counts of both."""
    building, labelled = reader.read(view.window, predicted != MISSING)
    truth = np.where(labelled, building, np.uint8(MISSING)).astype(np.uint8)
    return truth, count((predicted == 1) & labelled, building & labelled, labelled)


def _parts_of(plan: Plan, view: View) -> list[Part]:
    """Return the parts that a window touches. Raises SegError if there is none, as between the scenes of a mosaic."""
    parts = [
        part
        for part in plan.parts()
        if part.scene.scene_id == view.image.scene_id and intersects(part.window, view.window)
    ]
    if not parts:
        raise SegError(f"{view.title}: no scene is there")
    return parts


def _read(plan: Plan, there: Locations, parts: Sequence[Part], view: View) -> tuple[Rgb, NDArray[np.uint8]]:
    """Return the picture of a window, and its mask as `join_tiles` has it."""
    order = {scene.scene_id: number for number, scene in enumerate(plan.scenes)}
    sources = {source.scene_id: source for part in parts for source in part.sources}
    pieces = [sources[scene_id] for scene_id in sorted(sources, key=order.__getitem__)]
    scale = plan.settings.scale
    pixels, _ = read_image(parts[0].scene, pieces, view.window, scale)
    return to_rgb(pixels), join_tiles(parts, there, scale, view.window)


def _probability_panel(plan: Plan, there: Locations, parts: Sequence[Part], window: Window) -> Panel:
    levels = join_levels(parts, there, plan.settings.scale, window)
    colours = (colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    picture = colours[levels.filled(0)]
    picture[np.ma.getmaskarray(levels)] = MISSING_GREY
    return Panel("probability: 0 is dark, 1 is bright", picture)


def _iou_text(counts: Counts) -> str:
    iou = scores(counts)["iou"]
    return "unknown" if iou is None else f"{iou:.3f}"
