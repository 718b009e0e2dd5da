"""Score the stored masks of a run against labels, over the pixels that are valid in both."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grid import Window, buffered, intersection, split
from seg_core.imagery.labels import AlignedLabel, find_label, open_label
from seg_core.imagery.scene import Scene
from seg_core.run.export_masks import join_tiles
from seg_core.run.part_reading import read_rows
from seg_core.run.parts import Locations, find_parts
from seg_core.run.plan import Part, Plan
from seg_core.run.stored_plan import read_plan
from seg_core.storage.files import exists, stat
from seg_core.training.dataset import Classes, read_label
from seg_core.training.metrics import Counts, count
from seg_core.training.shapes import BOUNDARY_PX, ShapeCounter, ShapeCounts, score_figures

BLOCK = 2048  # px: side of what is compared at once
LABEL_ADVICE = (
    "in a label of one band 1 is building, 0 is background, and 255 is missing. If its values mean something else, "
    "name the folder of its label_class_dict.csv with --data; if 255 is missing, mark it as nodata in the file "
    "(gdal_edit -a_nodata 255)"
)


class SceneLabels(Protocol):
    """Labels of all scenes of a run, such as polygons."""

    def read(self, scene: Scene, window: Window) -> NDArray[np.uint8]:
        """Return the label of a window of a scene, `uint8 (height, width)`: 1 is building, MISSING is not labelled."""


class RunScore(NamedTuple):
    """The result of comparing a run's masks with labels."""

    counts: Counts  # pixels
    num_failed: int  # failed tiles, which are left out
    labels_off_px: dict[str, float]  # AlignedLabel.off_px by label file
    shapes: ShapeCounts  # buildings and boundary pixels
    images: list[dict[str, Any]]  # the figures of each scene, or of the mosaic: image, valid_px, scores and counts


def score_run(
    run: str, labels: str | SceneLabels, classes: Classes | None, report: Callable[[str], None] = lambda _: None
) -> RunScore:
    """Count the pixels and the buildings of a run's masks by prediction and truth.

    `labels` is one file for a run of one image, or a folder with one file per scene, named scene_id or scene_id with
    the suffix `.tif` or `.tiff`. With `classes` a label is decoded like those of a training dataset. Without them it
    has one band with 0 (background), 1 (building), and 255 or its nodata value (missing). A label on another grid than
    the segmented image is warped to it. Labels that are no rasters are given as SceneLabels, and have no classes.

    `report` is called with a text for each part that is done. Memory goes by the size of a part. Raises SegError if a
    label is missing or doesn't fit its scene, or if the run is not finished.
    """
    plan = read_plan(run)
    parts = list(plan.parts())
    there = find_parts(run)
    if missing := sum(part.key not in there for part in parts):
        raise SegError(f"{run}: {missing} of {len(parts)} parts are not done yet: finish the run (seg segment) first")
    readers = open_readers(labels, plan.images, classes)
    scorers = {
        image.scene_id: ImageScorer(readers[image.scene_id], ShapeCounter(image.window)) for image in plan.images
    }
    for number, (part, frame, mask) in enumerate(_read_masks(there, plan, parts)):
        report(f"{number} of {len(parts)} parts done")
        scorers[part.scene.scene_id].add(mask, frame, part.window)
    rasters = [reader for reader in readers.values() if isinstance(reader, LabelReader)]
    _check_labels(labels, rasters)
    found = {scene_id: (scorer.counts, scorer.shapes.finish()) for scene_id, scorer in scorers.items()}
    return RunScore(
        reduce(Counts.plus, (counts for counts, _ in found.values()), Counts()),
        sum(row["status"] == "failed" for part in parts for row in read_rows(there[part.key], ["status"])),
        {reader.label.file.uri: reader.label.off_px for reader in rasters},
        reduce(ShapeCounts.plus, (shapes for _, shapes in found.values()), ShapeCounts()),
        [{"image": each, "valid_px": sum(both[0]), **score_figures(*both)} for each, both in found.items()],
    )


def open_readers(
    labels: str | SceneLabels, images: Sequence[Scene], classes: Classes | None
) -> "dict[str, LabelReader | SceneLabelReader]":
    """Open the label of each image, by scene_id. The arguments are as for `score_run`, and so are the errors."""
    if isinstance(labels, str):
        found = {image.scene_id: _find_label(labels, image, len(images), classes) for image in images}
        return {scene_id: LabelReader(label, classes) for scene_id, label in found.items()}
    return {image.scene_id: SceneLabelReader(labels, image) for image in images}


def _check_labels(labels: object, readers: "Sequence[LabelReader]") -> None:
    """Raise SegError if labels that have been read can't be meant as they were read, or hold no data."""
    values = set().union(*(reader.values for reader in readers))
    if MISSING in values and 1 not in values:  # then 255 is most likely building
        raise SegError(f"{labels}: holds no 1, but {MISSING}: {LABEL_ADVICE}")
    for reader in readers:
        reader.label.check_labelled(reader.num_valid, reader.num_labelled)


def _read_masks(
    there: Locations, plan: Plan, parts: Sequence[Part]
) -> Iterator[tuple[Part, Window, NDArray[np.uint8]]]:
    """Yield each part, a frame of BOUNDARY_PX around it within its image, and the mask of that frame."""
    size = plan.settings.part
    at = {(part.scene.scene_id, *part.window.origin): part for part in parts}
    for part in parts:
        image, (top, left) = part.scene, part.window.origin
        frame = intersection(buffered(part.window, BOUNDARY_PX), image.window)
        places = product([image.scene_id], (top - size, top, top + size), (left - size, left, left + size))
        near = [at[place] for place in places if place in at]
        yield part, frame, join_tiles(near, there, plan.settings.scale, frame)


def _find_label(labels: str, scene: Scene, num_scenes: int, classes: Classes | None) -> AlignedLabel:
    if stat(labels) is None:
        if not exists(labels):
            raise SegError(f"--labels {labels}: no such file or folder")
        path = find_label(labels, scene.scene_id)
    elif num_scenes == 1:
        path = labels
    else:
        raise SegError(f"--labels {labels}: one file for {num_scenes} scenes: name a folder with a label for each")
    label = open_label(path, scene, (0, 1) if classes is None else classes.greys)
    if classes is None and len(label.file.bands) > 1:
        raise SegError(f"{path}: a label in colours: name the folder of its label_class_dict.csv with --data")
    return label


@dataclass
class ImageScorer:
    """Compares the mask of an image with its label, part by part."""

    reader: "LabelReader | SceneLabelReader"
    shapes: ShapeCounter
    counts: Counts = field(default_factory=Counts)

    def add(self, mask: NDArray[np.uint8], frame: Window, part: Window) -> None:
        """Count a part. The mask covers the frame: the part, and BOUNDARY_PX around it where the image has them.

        The mask is `uint8 (height, width)`: 1 is building, 0 is not, and MISSING is not scored.
        """
        for block in split(part, BLOCK):
            around = intersection(buffered(block, BOUNDARY_PX), frame)
            pixels = mask[around.slices(frame)]
            building, labelled = self.reader.read(around, pixels != MISSING)
            predicted, truth, inner = (pixels == 1) & labelled, building & labelled, block.slices(around)
            self.counts = self.counts.plus(count(predicted[inner], truth[inner], labelled[inner]))
            self.shapes.add(predicted, truth, around, block)


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


@dataclass(frozen=True)
class SceneLabelReader:
    """Reads the label of one scene out of those of all."""

    labels: SceneLabels
    scene: Scene

    def read(self, window: Window, valid: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Read a window as LabelReader does."""
        found = self.labels.read(self.scene, window)
        return found == 1, valid & (found != MISSING)
