"""Score the stored masks of a run against labels, over the pixels that are valid in both."""

import posixpath
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grid import Window
from seg_core.imagery.labels import AlignedLabel, open_label
from seg_core.imagery.mosaic import read_image
from seg_core.imagery.scene import Scene
from seg_core.run.plan import Part
from seg_core.run.rows import Row, decode_mask
from seg_core.run.stored_plan import num_missing, read_plan
from seg_core.run.tables import part_path, read_part
from seg_core.storage.files import exists, stat
from seg_core.training.dataset import Classes, read_label
from seg_core.training.metrics import Counts, count

LABEL_VALUES = (
    "in a label of one band 1 is building, 0 is not, and 255 is missing. Where they mean something else, name its "
    "label_class_dict.csv's folder with --data; where 255 is missing, say so in the file (gdal_edit -a_nodata 255)"
)


class RunScore(NamedTuple):
    """How a run's masks compare with their labels."""

    counts: Counts
    num_failed: int  # tiles, which are left out
    labels_off_px: dict[str, float]  # of each label file, as AlignedLabel has it


def score_run(run: str, labels: str, classes: Classes | None) -> RunScore:
    """Count the pixels of a run's masks by prediction and truth.

    `labels` is one file for a run of one image, or a folder that holds a file for each scene under its scene_id (or
    that with `.tif`). It is decoded through `classes`, as those that are trained on. Without them it is of one band,
    which holds 0 (background), 1 (building), and 255 or its nodata value (missing). Labels that lie on another grid
    than what was segmented are warped to it. Raises SegError where a label is absent, or no label of its scene, or the
    run not finished.
    """
    plan = read_plan(run)
    parts = list(plan.parts())
    if missing := num_missing(run, plan):
        raise SegError(f"{run}: {missing} of {len(parts)} parts are not done yet: finish the run (seg segment) first")
    total, failed = Counts(), 0
    truth_of = {
        image.scene_id: Truth(_find_label(labels, image, len(plan.images), classes), classes) for image in plan.images
    }
    for part in parts:
        truth = truth_of[part.scene.scene_id]
        for row in read_part(part_path(run, part.key), [*Window._fields, "status", "mask"]):
            if row["status"] == "done":
                total = total.plus(_score_tile(row, part, truth, plan.settings.scale))
            else:
                failed += 1
    seen = set().union(*(truth.seen for truth in truth_of.values()))
    if MISSING in seen and 1 not in seen:  # then 255 is building, most likely
        raise SegError(f"{labels}: holds no 1, but {MISSING}: {LABEL_VALUES}")
    for truth in truth_of.values():
        truth.label.check_use(truth.num_valid, truth.num_labelled)
    return RunScore(total, failed, {truth.label.file.uri: truth.label.off_px for truth in truth_of.values()})


def _score_tile(row: Row, part: Part, truth: "Truth", scale: tuple[float, float] | None) -> Counts:
    window = Window.from_row(row)
    _, valid = read_image(part.scene, part.sources, window, scale)
    building, labelled = truth.read(window, valid)
    return count(decode_mask(row["mask"], row["height"], row["width"]), building, labelled)


def _find_label(labels: str, scene: Scene, num_scenes: int, classes: Classes | None) -> AlignedLabel:
    if stat(labels) is None:
        stem = posixpath.splitext(scene.scene_id)[0]
        names = [scene.scene_id, f"{stem}.tif", f"{stem}.tiff"]
        path = next((p for p in (f"{labels}/{n}" for n in names) if stat(p) is not None), None)
        if path is None and not exists(labels):
            raise SegError(f"--labels {labels}: no such file or folder")
        if path is None:
            looked = ", ".join(dict.fromkeys(names))
            raise SegError(f"{labels}: no label for scene {scene.scene_id} in this folder (looked for {looked})")
    elif num_scenes == 1:
        path = labels
    else:
        raise SegError(f"--labels {labels}: one file for {num_scenes} scenes: name a folder with a label for each")
    label = open_label(path, scene, (0, 1) if classes is None else classes.greys)
    if classes is None and len(label.file.bands) > 1:
        raise SegError(f"{path}: a label in colours: name its label_class_dict.csv's folder with --data")
    return label


@dataclass
class Truth:
    """What a label says of the pixels of a scene."""

    label: AlignedLabel
    classes: Classes | None
    seen: set[int] = field(default_factory=set)  # values of a label without classes
    num_valid: int = 0  # pixels of what was read
    num_labelled: int = 0  # of those

    def read(self, window: Window, valid: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which pixels of a window are building, and which of the valid ones are labelled at all."""
        building, labelled = self._decode(window, valid)
        self.num_valid += int(valid.sum())
        self.num_labelled += int(labelled.sum())
        return building, labelled

    def _decode(self, window: Window, valid: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        if self.classes is not None:
            found = read_label(self.label, window, self.classes, valid)
            return found == self.classes.building, found != MISSING
        (values,), labelled = self.label.read(window)
        found, known = np.unique(values[labelled & valid]), {0, 1, MISSING}
        self.seen |= set(found.tolist())
        if odd := self.seen - known:
            raise SegError(f"{self.label.file.uri}: holds {min(odd)}: {LABEL_VALUES}")
        return values == 1, labelled & valid & (values != MISSING)
