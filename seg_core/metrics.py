"""Scores of the building class from pixel counts. Counts are summed over all images before anything is divided."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Counts(NamedTuple):
    """Valid pixels by prediction and truth."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0

    def plus(self, other: "Counts") -> "Counts":
        """The sum, field by field."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def count(predicted: NDArray[np.bool_], truth: NDArray[np.bool_], valid: NDArray[np.bool_]) -> Counts:
    """Count the valid pixels of masks of any, but the same, shape."""
    cells = np.bincount((2 * truth[valid] + predicted[valid]).astype(np.int64), minlength=4)
    tn, fp, fn, tp = map(int, cells)
    return Counts(tp, fp, fn, tn)


def scores(counts: Counts) -> dict[str, float | None]:
    """IoU, F1, precision, recall and pixel accuracy, each between 0 and 1; None where it is 0 / 0."""
    tp, fp, fn, tn = counts
    return {
        "iou": _ratio(tp, tp + fp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "accuracy": _ratio(tp + tn, tp + fp + fn + tn),
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
