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

LABEL_ADVICE = (
    "in a label of one band 1 is building, 0 is background, and 255 is missing. If its values mean something else, "
    "name the folder of its label_class_dict.csv with --data; if 255 is missing, mark it as nodata in the file "
    "(gdal_edit -a_nodata 255)"
)


class RunScore(NamedTuple):
    """The result of comparing a run's masks with labels."""

    counts: Counts  # pixels
    num_failed: int  # failed tiles, which are left out
    labels_off_px: dict[str, float]  # AlignedLabel.off_px by label file


def score_run(run: str, labels: str, classes: Classes | None) -> RunScore:
    """Count the pixels of a run's masks by prediction and truth.

    `labels` is one file for a run of one image, or a folder with one file per scene, named scene_id or scene_id with
    the suffix `.tif` or `.tiff`. With `classes` a label is decoded like those of a training dataset. Without them it
    has one band with 0 (background), 1 (building), and 255 or its nodata value (missing). A label on another grid than
    the segmented image is warped to it. Raises SegError if a label is missing or doesn't fit its scene, or if the run
    is not finished.
    """
    plan = read_plan(run)
    parts = list(plan.parts())
    if missing := num_missing(run, plan):
        raise SegError(f"{run}: {missing} of {len(parts)} parts are not done yet: finish the run (seg segment) first")
    total, failed = Counts(), 0
    label_readers = {
        image.scene_id: LabelReader(_find_label(labels, image, len(plan.images), classes), classes)
        for image in plan.images
    }
    for part in parts:
        reader = label_readers[part.scene.scene_id]
        for row in read_part(part_path(run, part.key), [*Window._fields, "status", "mask"]):
            if row["status"] == "done":
                total = total.plus(_score_tile(row, part, reader, plan.settings.scale))
            else:
                failed += 1
    values = set().union(*(reader.values for reader in label_readers.values()))
    if MISSING in values and 1 not in values:  # then 255 is most likely building
        raise SegError(f"{labels}: holds no 1, but {MISSING}: {LABEL_ADVICE}")
    for reader in label_readers.values():
        reader.label.check_labelled(reader.num_valid, reader.num_labelled)
    return RunScore(total, failed, {reader.label.file.uri: reader.label.off_px for reader in label_readers.values()})


def _score_tile(row: Row, part: Part, reader: "LabelReader", scale: tuple[float, float] | None) -> Counts:
    window = Window.from_row(row)
    _, valid = read_image(part.scene, part.sources, window, scale)
    building, labelled = reader.read(window, valid)
    return count(decode_mask(row["mask"], row["height"], row["width"]), building, labelled)


def _find_label(labels: str, scene: Scene, num_scenes: int, classes: Classes | None) -> AlignedLabel:
    if stat(labels) is None:
        stem = posixpath.splitext(scene.scene_id)[0]
        names = [scene.scene_id, f"{stem}.tif", f"{stem}.tiff"]
        path = next((p for p in (f"{labels}/{n}" for n in names) if stat(p) is not None), None)
        if path is None and not exists(labels):
            raise SegError(f"--labels {labels}: no such file or folder")
        if path is None:
            tried = ", ".join(dict.fromkeys(names))
            raise SegError(f"{labels}: no label for scene {scene.scene_id} in this folder (looked for {tried})")
    elif num_scenes == 1:
        path = labels
    else:
        raise SegError(f"--labels {labels}: one file for {num_scenes} scenes: name a folder with a label for each")
    label = open_label(path, scene, (0, 1) if classes is None else classes.greys)
    if classes is None and len(label.file.bands) > 1:
        raise SegError(f"{path}: a label in colours: name the folder of its label_class_dict.csv with --data")
    return label


@dataclass
class LabelReader:
    """Reads the label of a scene, and keeps track of what it holds."""

    label: AlignedLabel
    classes: Classes | None
    values: set[int] = field(default_factory=set)  # values that were read of a label without classes
    num_valid: int = 0  # valid pixels of the scene in the windows that were read
    num_labelled: int = 0  # valid pixels that are labelled

    def read(self, window: Window, valid: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Read a window of the scene whose valid pixels are `valid`, `bool (height, width)`.

        Returns which pixels are building, and which are valid and labelled, both `bool (height, width)`.
        """
        building, labelled = self._decode(window, valid)
        self.num_valid += int(valid.sum())
        self.num_labelled += int(labelled.sum())
        return building, labelled

    def _decode(self, window: Window, valid: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        if self.classes is not None:
            label = read_label(self.label, window, self.classes, valid)
            return label == self.classes.positive, label != MISSING
        (pixels,), labelled = self.label.read(window)
        self.values |= set(np.unique(pixels[labelled & valid]).tolist())
        if unexpected := self.values - {0, 1, MISSING}:
            raise SegError(f"{self.label.file.uri}: holds {min(unexpected)}: {LABEL_ADVICE}")
        return pixels == 1, labelled & valid & (pixels != MISSING)
