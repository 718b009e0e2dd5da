"""Scores of shapes: which buildings are found, and how well their outlines agree.

Buildings are scored as in the SpaceNet building challenges. The footprints of a mask are its components of pixels that
share a side, as `gdal_polygonize` finds them. Those of less than MIN_BUILDING_PX are left out, in prediction and truth.
A predicted footprint is right if its IoU with a footprint of the truth is MIN_IOU or more. Each has one match at most.
Source: A. Van Etten, D. Lindenbaum and T. M. Bacastow, *SpaceNet: A Remote Sensing Dataset and Challenge Series*, 2018
(https://arxiv.org/abs/1807.01232).

Boundary IoU is the IoU of the two masks' pixels near their contours: those from which a pixel outside the mask is at
most BOUNDARY_PX rows and columns away. Source: B. Cheng et al., *Boundary IoU: Improving Object-Centric Image
Segmentation Evaluation*, CVPR 2021 (https://arxiv.org/abs/2103.16562). There the distance is 2 % of the image's
diagonal. In an aerial image that is wider than a house, so here it is fixed.

Pixels without truth or imagery, and those beyond the edge of an image, are in neither mask. A building that reaches
there is scored by the rest of it, and ends there in both masks.
"""

from collections import Counter
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from seg_core.grid import Window
from seg_core.training.components import Components, Labels
from seg_core.training.metrics import Counts, ratio, scores

MIN_BUILDING_PX = 20
MIN_IOU = 0.5
BOUNDARY_PX = 3

Mask = NDArray[np.bool_]  # (height, width)


class ShapeCounts(NamedTuple):
    """Buildings by prediction and truth, and pixels near contours."""

    building_tp: int = 0
    building_fp: int = 0
    building_fn: int = 0
    boundary_intersection: int = 0  # px near the contours of both masks
    boundary_union: int = 0  # px near the contour of either mask

    def plus(self, other: "ShapeCounts") -> "ShapeCounts":
        """The sum, field by field."""
        return ShapeCounts(*(a + b for a, b in zip(self, other, strict=True)))


def shape_scores(counts: ShapeCounts) -> dict[str, float | None]:
    """Precision, recall and F1 of buildings, and boundary IoU, each between 0 and 1; None where it is 0 / 0."""
    tp, fp, fn, intersection, union = counts
    return {
        "building_precision": ratio(tp, tp + fp),
        "building_recall": ratio(tp, tp + fn),
        "building_f1": ratio(2 * tp, 2 * tp + fp + fn),
        "boundary_iou": ratio(intersection, union),
    }


def score_figures(counts: Counts, shapes: ShapeCounts) -> dict[str, float | int | None]:
    """All scores and counts by name, of pixels and of shapes."""
    return {**scores(counts), **counts._asdict(), **shape_scores(shapes), **shapes._asdict()}


def count_shapes(predicted: Mask, truth: Mask) -> ShapeCounts:
    """Count the buildings and boundary pixels of one image, whose masks are `bool (height, width)`."""
    whole = Window(0, 0, *truth.shape)
    counter = ShapeCounter(whole)
    counter.add(predicted, truth, whole, whole)
    return counter.finish()


class ShapeCounter:
    """Counts the buildings and boundary pixels of one image that comes in blocks, in any order.

    Memory does not grow with the area of the image: a building is counted as soon as it is complete.
    """

    def __init__(self, whole: Window) -> None:
        """Start without a block of the image, which is as large as the window `whole`."""
        self._predicted, self._truth = Components(whole), Components(whole)
        self._overlaps: Counter[tuple[int, int]] = Counter()  # px, by label of prediction and truth
        self._num_predicted, self._num_truth, self._num_matched = 0, 0, 0
        self._boundary = np.zeros(2, np.int64)  # intersection and union

    def add(self, predicted: Mask, truth: Mask, frame: Window, block: Window) -> None:
        """Count a block. The masks cover the frame: the block, and BOUNDARY_PX around it where the image has them."""
        inner = block.slices(frame)
        near = find_boundary(predicted, BOUNDARY_PX)[inner], find_boundary(truth, BOUNDARY_PX)[inner]
        self._boundary += (near[0] & near[1]).sum(), (near[0] | near[1]).sum()
        found, real = self._predicted.label(block, predicted[inner]), self._truth.label(block, truth[inner])
        self._overlaps.update(_count_overlaps(found, real))
        self._count_complete()

    def finish(self) -> ShapeCounts:
        """Return the counts of all blocks."""
        self._count_complete(last=True)
        false, missed = self._num_predicted - self._num_matched, self._num_truth - self._num_matched
        return ShapeCounts(self._num_matched, false, missed, *map(int, self._boundary))

    def _count_complete(self, last: bool = False) -> None:
        """Count the buildings that no further block can change, and forget them."""
        predicted, truth = self._predicted, self._truth
        overlaps: Counter[tuple[int, int]] = Counter()
        for (one, other), pixels in self._overlaps.items():
            overlaps[predicted.find(one), truth.find(other)] += pixels
        open_predicted, open_truth = (set(), set()) if last else (predicted.find_open(), truth.find_open())
        waiting = {pair for pair in overlaps if pair[0] in open_predicted or pair[1] in open_truth}
        # No footprint has two matches: each would be half of it, and as they fill it, they would touch and be one.
        self._num_matched += sum(self._is_match(*pair, overlaps[pair]) for pair in overlaps.keys() - waiting)
        self._num_predicted += _remove(predicted.sizes, open_predicted | {pair[0] for pair in waiting})
        self._num_truth += _remove(truth.sizes, open_truth | {pair[1] for pair in waiting})
        self._overlaps = Counter({pair: overlaps[pair] for pair in waiting})

    def _is_match(self, predicted: int, truth: int, intersection: int) -> bool:
        sizes = self._predicted.sizes[predicted], self._truth.sizes[truth]
        return min(sizes) >= MIN_BUILDING_PX and intersection >= MIN_IOU * (sum(sizes) - intersection)


def _count_overlaps(predicted: Labels, truth: Labels) -> dict[tuple[int, int], int]:
    """Count the pixels that have a label in both, by the pair of labels."""
    both = (predicted > 0) & (truth > 0)
    base = int(truth.max(initial=0)) + 1
    pairs, pixels = np.unique(predicted[both] * base + truth[both], return_counts=True)
    return {divmod(pair, base): number for pair, number in zip(pairs.tolist(), pixels.tolist(), strict=True)}


def _remove(sizes: dict[int, int], kept: set[int]) -> int:
    """Remove all components but those to keep, and return how many of them are large enough for a building."""
    return sum(sizes.pop(label) >= MIN_BUILDING_PX for label in sizes.keys() - kept)


def find_boundary(mask: Mask, distance: int) -> Mask:
    """Return the pixels of a mask from which a pixel outside is at most `distance` rows and columns away.

    Beyond the array there is nothing of the mask. Shapes are `(height, width)`.
    """
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    inside = cv2.erode(mask.astype(np.uint8), square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(mask & (inside == 0))
