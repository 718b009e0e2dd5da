"""Temperature scaling, which makes probabilities true on validation (Guo et al. 2017, arXiv:1706.04599).

Logits are divided by one number, the temperature, which is chosen so that the labels are likeliest. A network that is
too sure of itself has one above 1. The mask of a threshold stays, for the threshold moves with the probabilities.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

MAX_LOGIT, BINS_PER_LOGIT = 32, 64
NUM_BINS = 2 * MAX_LOGIT * BINS_PER_LOGIT
RANGE = (0.25, 16.0)  # of temperatures
CENTRES = (np.arange(NUM_BINS) + 0.5) / BINS_PER_LOGIT - MAX_LOGIT


def fit_temperature(pixels: NDArray[np.int64]) -> float:
    """Find the temperature from the numbers of pixels by truth (row 0 background, 1 positive) and logit.

    `pixels` is `(2, NUM_BINS)`. The answer is 1 if all pixels are of one kind, which says nothing of how sure to be.
    """
    background, positive = pixels
    if not background.any() or not positive.any():
        return 1.0

    def loss(sharpness: float) -> float:
        logits = CENTRES * sharpness
        return float(background @ np.logaddexp(0, logits) + positive @ np.logaddexp(0, -logits)) / float(pixels.sum())

    found = minimize_scalar(loss, bounds=(1 / RANGE[1], 1 / RANGE[0]), method="bounded")  # convex in 1 / temperature
    return round(float(1 / found.x), 4)


def scale_probability(probability: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """Return what probabilities of a binary decision become if their logits are divided by a temperature."""
    return np.asarray(expit(logit(np.asarray(probability, np.float64)) / temperature))


def scale_histogram(pixels: NDArray[np.int64], temperature: float, steps: int) -> NDArray[np.int64]:
    """Count pixels by probability, `(2, steps)`, from those by logit, `(2, NUM_BINS)`, divided by a temperature."""
    step = np.minimum((expit(CENTRES / temperature) * steps).astype(np.intp), steps - 1)
    return np.stack([np.bincount(step, row, steps).astype(np.int64) for row in pixels])
