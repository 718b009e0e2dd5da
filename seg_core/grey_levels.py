"""Histograms of grey levels: how imagery compares with what a model was trained on, and what brings it there.

The distance of two histograms is their Wasserstein distance (1-Wasserstein, or earth mover's distance) in units of the
training imagery's standard deviation. It is 0 for equal histograms. Imagery that is brighter by one deviation, and else
the same, has a distance of 1.
"""

from collections.abc import Sequence
from math import erf, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seg_core.chips import Pixels, Valid

NUM_LEVELS = 256  # of `uint8` pixels
NUM_BINS = 32  # of the histograms that a bundle holds
ROWS = 512  # of an image that are counted at once, for it takes eight bytes a pixel
LUMA = (0.299, 0.587, 0.114)  # how bright red, green and blue are (ITU-R BT.601)
MIN_STD = 1.0  # grey levels: a constant band is no reason to divide by zero

Levels = NDArray[np.int64]  # pixels by grey level, `(bands, NUM_LEVELS)`
Shares = tuple[tuple[float, ...], ...]  # share of the pixels by bin of grey levels, NUM_BINS values for each band


class Normalization(NamedTuple):
    """Mean and standard deviation of each band, in grey levels: they become 0 and 1 before the network."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def count_levels(pixels: Pixels, valid: Valid) -> Levels:
    """Count the valid pixels of `uint8 (bands, height, width)` by grey level. `valid` is `bool (height, width)`."""
    levels = np.zeros((len(pixels), NUM_LEVELS), np.int64)
    for top in range(0, len(valid), ROWS):
        rows = slice(top, top + ROWS)
        levels += [np.bincount(band[rows][valid[rows]], minlength=NUM_LEVELS) for band in pixels]
    return levels


def normalization_of(levels: Levels) -> Normalization:
    """Return mean and standard deviation of each band, rounded to 4 digits. There must be at least one pixel."""
    values, num_pixels = np.arange(NUM_LEVELS), levels.sum(axis=1)
    mean = levels @ values / num_pixels
    variance = levels @ values**2 / num_pixels - mean**2
    std = np.sqrt(np.maximum(variance, MIN_STD**2))
    return Normalization(tuple(mean.round(4).tolist()), tuple(std.round(4).tolist()))


def shares_of(levels: Levels) -> Shares:
    """Return the share of the pixels in each bin of grey levels, rounded to 5 digits. There must be a pixel."""
    binned = levels.reshape(len(levels), NUM_BINS, -1).sum(axis=2) / levels.sum(axis=1, keepdims=True)
    return tuple(tuple(band) for band in binned.round(5).tolist())


def normal_shares(normalization: Normalization) -> Shares:
    """Return the shares that pixels would have if each band were normally distributed."""
    edges = [NUM_LEVELS / NUM_BINS * i - 0.5 for i in range(1, NUM_BINS)]
    below = [
        [0.0, *((1 + erf((edge - mean) / (std * sqrt(2)))) / 2 for edge in edges), 1.0]
        for mean, std in zip(*normalization, strict=True)
    ]
    return tuple(tuple(np.diff(band).tolist()) for band in below)


def normalization_of_shares(shares: Shares) -> Normalization:
    """Return mean and standard deviation of each band, as near as the bins of a histogram tell."""
    width = NUM_LEVELS // NUM_BINS
    middles = np.arange(NUM_BINS) * width + (width - 1) / 2
    values = np.asarray(shares)
    mean = values @ middles
    variance = values @ middles**2 - mean**2 + (width**2 - 1) / 12  # the latter within a bin
    return Normalization(tuple(mean.tolist()), tuple(np.sqrt(np.maximum(variance, MIN_STD**2)).tolist()))


def distance(shares: Shares, reference: Shares, std: Sequence[float]) -> float:
    """Return the distance of two histograms in the band where it is largest.

    `std` is the standard deviation of each band of the reference, in grey levels.
    """
    apart = np.abs(np.cumsum(shares, axis=1) - np.cumsum(reference, axis=1)).sum(axis=1) * (NUM_LEVELS / NUM_BINS)
    return float((apart / np.asarray(std)).max())
