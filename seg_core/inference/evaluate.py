"""Score a model on a labelled split: figures in total, by image, threshold and probability, and sample pictures."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grey_levels import NUM_LEVELS, Levels, Normalization, count_levels
from seg_core.imagery.scene import Scene, fit_to_model
from seg_core.inference.scenes import segment_scene
from seg_core.model.bundle import Bundle
from seg_core.model.segmenter import Segmenter
from seg_core.plots.figures import draw_calibration, draw_thresholds
from seg_core.plots.pictures import Panel, as_rgb, assemble_panels, truth_panels
from seg_core.run.imagery_fit import ImageryFit, compare, decide_mode
from seg_core.run.normalization import normalizations_of
from seg_core.storage.files import make_folder, publish
from seg_core.threads import prefetch
from seg_core.training.calibration import scale_probability
from seg_core.training.class_names import is_building
from seg_core.training.dataset import (
    Classes,
    Pair,
    Sample,
    find_pairs,
    is_labelled,
    read_classes,
    read_header,
    read_pair,
)
from seg_core.training.metrics import STEPS, Counts, Histogram, count, histogram, scores
from seg_core.training.shapes import ShapeCounts, count_shapes, score_figures


class LabelledImage(NamedTuple):
    """An image of a split, and how it is normalized."""

    pair: Pair
    scene: Scene
    normalization: Normalization | None  # None: the model's

    @property
    def name(self) -> str:
        """Name of its file."""
        return Path(self.pair.image).name


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of a model on the images of a split."""

    classes: Classes
    images: Sequence[LabelledImage]
    table: pd.DataFrame  # one row per image: image, valid_px, scores and counts at the threshold
    histogram: Histogram  # of the probabilities of all images
    uncalibrated: Histogram | None  # of what they would be without the bundle's temperature; None if it has none
    counts: Counts  # pixels of all images at the threshold
    shapes: ShapeCounts  # buildings and boundary pixels of all images at the threshold
    threshold: float
    normalize: str  # model, region or scene, as it was decided
    labels_off_px: dict[str, float]  # AlignedLabel.off_px by label file
    fit: ImageryFit  # how the images compare with those of the training

    def figures(self) -> dict[str, Any]:
        """Return the figures of all images together, by name."""
        best = self.histogram.best_threshold()
        return {
            "images": len(self.images),
            **score_figures(self.counts, self.shapes),
            "threshold": self.threshold,
            "best_threshold": best,
            "best_iou": scores(self.histogram.counts(best))["iou"],
            "calibration_error": self.histogram.calibration_error(),
            "uncalibrated_error": self.uncalibrated and self.uncalibrated.calibration_error(),
            "normalize": self.normalize,
            **self.fit.figures(),
        }


def evaluate(
    segmenter: Segmenter,
    data: str,
    split_name: str,
    report: Callable[[str], None] = lambda _: None,
    normalize: str = "model",
) -> Evaluation:
    """Segment all images of a split as in a run, and score the positive class over their valid pixels.

    `data` is the folder of the dataset. `report` is called with a text for each image that is done. `normalize` is
    `auto`, `scene`, `region` or `model`, as for a run over the images. Raises SegError if the dataset lacks the class
    that the model finds, or if images and labels can't be read.
    """
    classes, images = _open_split(segmenter.bundle, data, split_name, normalize)
    threshold, positive = segmenter.bundle.threshold, classes.positive
    rows: list[dict[str, Any]] = []
    levels: Levels = np.zeros((segmenter.bundle.bands, NUM_LEVELS), np.int64)
    pixels, uncalibrated = np.zeros((2, *Histogram.empty().pixels.shape), np.int64)
    total, total_shapes = Counts(), ShapeCounts()
    labels_off_px: dict[str, float] = {}
    for image, sample, off_px, probability in _segment(segmenter, classes, images):
        report(f"{len(rows)} done")
        labels_off_px[image.pair.label] = off_px
        valid, truth = is_labelled(sample.label), sample.label == positive
        predicted = probability >= threshold
        counts, shapes = count(predicted, truth, valid), count_shapes(predicted & valid, truth)
        levels += count_levels(np.moveaxis(sample.image, -1, 0), sample.label != MISSING)
        pixels += histogram(probability, truth, valid).pixels
        if segmenter.bundle.temperature != 1:
            before = scale_probability(probability, 1 / segmenter.bundle.temperature)
            uncalibrated += histogram(before, truth, valid).pixels
        total, total_shapes = total.plus(counts), total_shapes.plus(shapes)
        rows.append({"image": image.name, "valid_px": sum(counts), **score_figures(counts, shapes)})
    fit = compare(levels, segmenter.bundle)
    return Evaluation(
        classes=classes,
        images=images,
        table=pd.DataFrame(rows),
        histogram=Histogram(pixels),
        uncalibrated=None if segmenter.bundle.temperature == 1 else Histogram(uncalibrated),
        counts=total,
        shapes=total_shapes,
        threshold=threshold,
        normalize=decide_mode(normalize, images[0].normalization),
        labels_off_px=labels_off_px,
        fit=fit,
    )


def _match_classes(classes: Classes, name: str, data: str) -> Classes:
    """Return the classes of a dataset with the one positive that a model finds, or another name of buildings."""
    named = [each for each in classes.names if each == name or (is_building(each) and is_building(name))]
    chosen = name if name in named else named[0] if len(named) == 1 else None
    if chosen is None:
        listed = "; ".join(classes.names)
        raise SegError(f"{data}: the model finds {name}, of which its classes have {len(named)}: {listed}")
    return replace(classes, wanted=chosen)


def _open_split(bundle: Bundle, data: str, split_name: str, normalize: str) -> tuple[Classes, list[LabelledImage]]:
    classes = _match_classes(read_classes(data), bundle.class_name, data)
    pairs = find_pairs(data, split_name)
    scenes = [_fit_image(read_header(pair), bundle) for pair in pairs]
    return classes, list(map(LabelledImage, pairs, scenes, normalizations_of(scenes, bundle, normalize)))


def _fit_image(scene: Scene, bundle: Bundle) -> Scene:
    try:
        return fit_to_model(scene, num_bands=bundle.bands, dtype=bundle.dtype, gsd_m=bundle.gsd_m)
    except SegError as error:  # its way out are options of another command
        raise SegError(f"{error}; that is for seg segment, whose run is scored by seg evaluate RUN --labels") from None


def _segment(
    segmenter: Segmenter, classes: Classes, images: Sequence[LabelledImage]
) -> Iterator[tuple[LabelledImage, Sample, float, NDArray[np.float32]]]:
    """Yield each image, its sample, label offset in px, and probability `float32 (height, width)`."""
    with ThreadPoolExecutor(1) as pool:
        decoded = prefetch(pool, lambda image: read_pair(image.pair, classes), images, 2)
        for image, (sample, _, off_px) in zip(images, decoded, strict=True):
            found, _ = segment_scene(segmenter, image.scene, normalization=image.normalization)
            yield image, sample, off_px, found


def write_figures(evaluation: Evaluation, folder: str) -> None:
    """Publish `thresholds.png`, its figures as `thresholds.csv`, and `calibration.png` into a folder."""
    make_folder(folder)
    curve = [{"threshold": i / STEPS, **scores(evaluation.histogram.counts(i / STEPS))} for i in range(STEPS)]
    publish(f"{folder}/thresholds.csv", pd.DataFrame(curve).to_csv(index=False).encode())
    publish(f"{folder}/thresholds.png", draw_thresholds(evaluation.histogram, evaluation.threshold))
    publish(f"{folder}/calibration.png", draw_calibration(evaluation.histogram, evaluation.uncalibrated))


def write_samples(evaluation: Evaluation, segmenter: Segmenter, path: str) -> None:
    """Publish a PNG with image, truth, prediction and errors of the images with the best, median and worst IoU."""
    ranked = evaluation.table.dropna(subset="iou").sort_values("iou", ascending=False, kind="stable")
    chosen = ranked.iloc[sorted({0, len(ranked) // 2, len(ranked) - 1})] if len(ranked) else ranked
    panels: list[Panel] = []
    threshold = evaluation.threshold
    segmented = _segment(segmenter, evaluation.classes, [evaluation.images[i] for i in chosen.index])
    for iou, (image, sample, _, probability) in zip(chosen["iou"], segmented, strict=True):
        valid, truth = is_labelled(sample.label), sample.label == evaluation.classes.positive
        states = (np.where(valid, cells, MISSING).astype(np.uint8) for cells in (probability >= threshold, truth))
        panels += truth_panels(f"{image.name}: IoU {iou:.3f}", as_rgb(sample.image), *states)
    if panels:
        publish(path, assemble_panels(panels, 4))
