"""Scores of the positive class from pixel counts. Counts are summed over all images before anything is divided."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seg_core.training.calibration import fit_temperature, scale_histogram

STEPS = 256  # of probability: a power of two, so that a float32 falls exactly on its step


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
        "iou": ratio(tp, tp + fp + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
    }


def ratio(part: int, whole: int) -> float | None:
    """A share between 0 and 1; None where the whole is 0."""
    return part / whole if whole else None


@dataclass(frozen=True)
class Histogram:
    """Valid pixels by truth (row 0 background, 1 positive) and predicted probability: `int64 (2, STEPS)`.

    Scores at every threshold that is a multiple of 1 / STEPS follow from it exactly, and how far the probabilities
    can be believed.
    """

    pixels: NDArray[np.int64]
    logits: NDArray[np.int64] | None = None  # the same pixels by truth and logit: see seg_core.training.calibration

    @staticmethod
    def empty() -> "Histogram":
        """Of no pixel."""
        return Histogram(np.zeros((2, STEPS), np.int64))

    def counts(self, threshold: float) -> Counts:
        """Counts of the mask `probability >= threshold`, exact for multiples of 1 / STEPS."""
        first = round(threshold * STEPS)
        if 0 < threshold < 1:  # never all pixels or none
            first = min(max(first, 1), STEPS - 1)
        fp, tp = (int(n) for n in self.pixels[:, first:].sum(axis=1))
        tn, fn = (int(n) for n in self.pixels[:, :first].sum(axis=1))
        return Counts(tp, fp, fn, tn)

    def ious(self) -> NDArray[np.float64]:
        """IoU at the thresholds 0, 1 / STEPS, ... `(STEPS,)`; 0 where no pixel is positive by truth or prediction."""
        false_positives, hits = self.pixels[:, ::-1].cumsum(axis=1)[:, ::-1]
        return np.asarray(hits / np.maximum(self.pixels[1].sum() + false_positives, 1))

    def best_threshold(self) -> float:
        """The threshold between 0 and 1 whose IoU is highest: the middle one where several are; 0.5 where none is."""
        ious = self.ious()[1:]
        best = np.flatnonzero(ious == ious.max())
        return float(best[len(best) // 2] + 1) / STEPS if ious.max() > 0 else 0.5

    def reliability(self, bins: int = 16) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Mean probability, share of pixels that are positive, and number of pixels, for each bin that has any.

        The `bins` bins are equally wide.
        """
        grouped = self.pixels.reshape(2, bins, -1)
        per_bin = grouped.sum(axis=(0, 2))
        middles = ((np.arange(STEPS) + 0.5) / STEPS).reshape(bins, -1)
        some = per_bin > 0
        predicted = (grouped.sum(axis=0) * middles).sum(axis=1)[some] / per_bin[some]
        return predicted, grouped[1].sum(axis=1)[some] / per_bin[some], per_bin[some]

    def confidence(self, bins: int = 64) -> tuple[float, ...]:
        """Return the share of the pixels in each of `bins` equal bins of probability, to 5 digits; () without any."""
        per_bin = self.pixels.reshape(2, bins, -1).sum(axis=(0, 2))
        return tuple((per_bin / per_bin.sum()).round(5).tolist()) if per_bin.any() else ()

    def temperature(self) -> float:
        """Return the temperature that calibrates the probabilities; 1 if the logits are not known."""
        return 1.0 if self.logits is None else fit_temperature(self.logits)

    def calibrated(self, temperature: float) -> "Histogram":
        """Return the histogram of the probabilities after their logits are divided by a temperature."""
        if temperature == 1 or self.logits is None:
            return self
        return Histogram(scale_histogram(self.logits, temperature, STEPS))

    def calibration_error(self) -> float | None:
        """Expected calibration error over 16 bins (Naeini et al. 2015); None without a pixel."""
        predicted, observed, per_bin = self.reliability()
        return float((np.abs(predicted - observed) * per_bin).sum() / per_bin.sum()) if len(per_bin) else None


def histogram(probability: NDArray[np.floating], truth: NDArray[np.bool_], valid: NDArray[np.bool_]) -> Histogram:
    """Sort the valid pixels of arrays of the same shape."""
    level = (probability[valid] * STEPS).astype(np.int64).clip(max=STEPS - 1)
    return Histogram(np.bincount(level + STEPS * truth[valid], minlength=2 * STEPS).reshape(2, STEPS))
