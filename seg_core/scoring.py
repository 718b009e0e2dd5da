"""Score the stored masks of a run against labels, over the pixels that are valid in both."""

import posixpath

import numpy as np
from numpy.typing import NDArray

from seg_core.coverage import Row, decode_mask
from seg_core.dataset import MISSING, Classes, decode_colours
from seg_core.errors import SegError
from seg_core.metrics import Counts, count
from seg_core.mosaic import read_image
from seg_core.plan import Part
from seg_core.raster import read_chip
from seg_core.results import part_path, read_part
from seg_core.run import read_plan
from seg_core.scenes import Scene, read_scene
from seg_core.storage import stat
from seg_core.tiling import Window


def score_run(run: str, labels: str, classes: Classes | None) -> Counts:
    """Count the pixels of a run's masks by prediction and truth.

    `labels` is one file for a run of one image, or a folder that holds a file for each scene under its scene_id (or
    that with `.tif`). A label of one band holds 0 (background), 1 (building), and 255 or its nodata value (missing);
    one of three is decoded through `classes`. Raises SegError where a label is absent, or no label of its scene.
    """
    plan = read_plan(run)
    total = Counts()
    label_of = {image.scene_id: _find_label(labels, image, len(plan.images)) for image in plan.images}
    for part in plan.parts():
        for row in read_part(part_path(run, part.key), [*Window._fields, "status", "mask"]):
            if row["status"] == "done":
                total = total.plus(_score_tile(row, part, label_of[part.scene.scene_id], classes, plan.settings.scale))
    return total


def _score_tile(
    row: Row, part: Part, label: Scene, classes: Classes | None, scale: tuple[float, float] | None
) -> Counts:
    window = Window.from_row(row)
    _, valid = read_image(part.scene, part.sources, window, scale)
    building, labelled = _read_truth(label, window, classes)
    return count(decode_mask(row["mask"], row["height"], row["width"]), building, valid & labelled)


def _find_label(labels: str, scene: Scene, num_scenes: int) -> Scene:
    if stat(labels) is None:
        stem = posixpath.splitext(scene.scene_id)[0]
        names = [scene.scene_id, f"{stem}.tif", f"{stem}.tiff"]
        path = next((p for p in (f"{labels}/{n}" for n in names) if stat(p) is not None), None)
        if path is None:
            raise SegError(f"{labels}: no label for scene {scene.scene_id} in this folder")
    elif num_scenes == 1:
        path = labels
    else:
        raise SegError(f"--labels {labels}: one file for {num_scenes} scenes: name a folder with a label for each")
    label = read_scene(path, scene.scene_id)
    if (label.height, label.width) != (scene.height, scene.width):
        raise SegError(
            f"{path}: this label measures {label.width} x {label.height} px, its scene {scene.width} x {scene.height}"
        )
    return label


def _read_truth(label: Scene, window: Window, classes: Classes | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pixels are building, and which are labelled at all."""
    pixels, valid = read_chip(label, window)
    if len(pixels) == 1:
        return pixels[0] == 1, valid & (pixels[0] != MISSING)
    if classes is None:
        raise SegError(f"{label.uri}: a label in colours: name its label_class_dict.csv's folder with --data")
    return decode_colours(
        pixels, classes, valid, label.uri, (window.row_off, window.col_off)
    ) == classes.building, valid
