"""Score a model on a labelled split: figures in total, by image, threshold and probability, and sample pictures."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from seg_core.chips import MISSING
from seg_core.errors import SegError
from seg_core.grey_levels import NUM_LEVELS, Levels, count_levels
from seg_core.imagery.scene import fit_to_model
from seg_core.inference.scenes import segment_scene
from seg_core.model.segmenter import Segmenter
from seg_core.plots.figures import draw_calibration, draw_thresholds
from seg_core.plots.pictures import Panel, as_rgb, assemble_panels, paint_errors, paint_mask
from seg_core.run.imagery_fit import ImageryFit, compare
from seg_core.storage.files import make_folder, publish
from seg_core.threads import prefetch
from seg_core.training.dataset import Pair, Sample, find_pairs, read_classes, read_pair
from seg_core.training.metrics import STEPS, Counts, Histogram, count, histogram, scores
from seg_core.training.shapes import ShapeCounts, count_shapes, score_figures


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on the images of a split."""

    images: pd.DataFrame  # one row per image: image, valid_px, scores and counts at the threshold
    histogram: Histogram  # of the probabilities of all images
    counts: Counts  # pixels of all images at the threshold
    shapes: ShapeCounts  # buildings and boundary pixels of all images at the threshold
    threshold: float
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
            **self.fit.figures(),
        }


def evaluate(
    segmenter: Segmenter, data: str, split_name: str, report: Callable[[str], None] = lambda _: None
) -> Evaluation:
    """Segment all images of a split as in a run, and score the positive class over their valid pixels.

    `data` is the folder of the dataset. `report` is called with a text for each image that is done. Raises SegError if
    the classes of the dataset are not those of the model, or if images and labels can't be read.
    """
    threshold, positive = segmenter.bundle.threshold, segmenter.bundle.building
    rows: list[dict[str, Any]] = []
    levels: Levels = np.zeros((segmenter.bundle.bands, NUM_LEVELS), np.int64)
    pixels, total, total_shapes = np.zeros_like(Histogram.empty().pixels), Counts(), ShapeCounts()
    labels_off_px: dict[str, float] = {}
    for pair, sample, off_px, probability in _segment(segmenter, data, split_name):
        report(f"{len(rows)} done")
        labels_off_px[pair.label] = off_px
        valid, truth = sample.label != MISSING, sample.label == positive
        predicted = probability >= threshold
        counts, shapes = count(predicted, truth, valid), count_shapes(predicted & valid, truth)
        levels += count_levels(np.moveaxis(sample.image, -1, 0), valid)
        pixels += histogram(probability, truth, valid).pixels
        total, total_shapes = total.plus(counts), total_shapes.plus(shapes)
        rows.append({"image": Path(pair.image).name, "valid_px": sum(counts), **score_figures(counts, shapes)})
    fit = compare(levels, segmenter.bundle)
    return Evaluation(pd.DataFrame(rows), Histogram(pixels), total, total_shapes, threshold, labels_off_px, fit)


def _segment(
    segmenter: Segmenter, data: str, split_name: str, only: Sequence[str] | None = None
) -> Iterator[tuple[Pair, Sample, float, NDArray[np.float32]]]:
    """Yield each pair of a split, its sample, label offset in px, and probability `float32 (height, width)`.

    `only` gives the names of the images to segment instead of all.
    """
    bundle, classes = segmenter.bundle, read_classes(data)
    if classes.names != bundle.classes:
        raise SegError(f"{data}: its classes are {', '.join(classes.names)}, the model's {', '.join(bundle.classes)}")
    pairs = find_pairs(data, split_name)
    if only is not None:
        by_name = {Path(pair.image).name: pair for pair in pairs}
        pairs = [by_name[name] for name in only]
    with ThreadPoolExecutor(1) as pool:
        decoded = prefetch(pool, lambda pair: read_pair(pair, classes), pairs, 2)
        for pair, (sample, header, off_px) in zip(pairs, decoded, strict=True):
            scene = fit_to_model(
                header,
                num_bands=bundle.bands,
                dtype=bundle.dtype,
                gsd_m=bundle.gsd_m,
                bands=None,
                scale=None,
                resample=False,
            )
            yield pair, sample, off_px, segment_scene(segmenter, scene)[0]


def write_figures(evaluation: Evaluation, folder: str) -> None:
    """Publish `thresholds.png`, its figures as `thresholds.csv`, and `calibration.png` into a folder."""
    make_folder(folder)
    curve = [{"threshold": i / STEPS, **scores(evaluation.histogram.counts(i / STEPS))} for i in range(STEPS)]
    publish(f"{folder}/thresholds.csv", pd.DataFrame(curve).to_csv(index=False).encode())
    publish(f"{folder}/thresholds.png", draw_thresholds(evaluation.histogram, evaluation.threshold))
    publish(f"{folder}/calibration.png", draw_calibration(evaluation.histogram))


def write_samples(evaluation: Evaluation, segmenter: Segmenter, data: str, split_name: str, path: str) -> None:
    """Publish a PNG with image, truth, prediction and errors of the images with the best, median and worst IoU."""
    ranked = evaluation.images.dropna(subset="iou").sort_values("iou", ascending=False, kind="stable")
    chosen = [ranked.iloc[i] for i in sorted({0, len(ranked) // 2, len(ranked) - 1})] if len(ranked) else []
    panels = []
    segmented = _segment(segmenter, data, split_name, [row["image"] for row in chosen])
    for row, (_, sample, _, probability) in zip(chosen, segmented, strict=True):
        valid, truth = sample.label != MISSING, sample.label == segmenter.bundle.building
        predicted, picture = (probability >= evaluation.threshold) & valid, as_rgb(sample.image)
        panels += [
            Panel(f"{row['image']}: IoU {row['iou']:.3f}", picture),
            Panel("truth", paint_mask(picture, truth)),
            Panel("prediction", paint_mask(picture, predicted)),
            Panel("errors: false green, missed red", paint_errors(picture, predicted, truth)),
        ]
    if panels:
        publish(path, assemble_panels(panels, 4))
