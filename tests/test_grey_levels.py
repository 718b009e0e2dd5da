"""Histograms of grey levels: what is counted, and how far two are apart."""

import numpy as np
import pytest

from seg_core.grey_levels import (
    NUM_BINS,
    Normalization,
    count_levels,
    distance,
    normal_shares,
    normalization_of,
    shares_of,
)


def draw(mean: float, std: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(mean, std, (3, 200, 210)).clip(0, 255).round().astype(np.uint8)


def test_pixels_that_are_not_valid_are_not_counted() -> None:
    pixels, valid = draw(100, 30), np.random.default_rng(1).random((200, 210)) < 0.3
    pixels[:, ~valid] = 255
    levels = count_levels(pixels, valid)
    assert levels.shape == (3, 256)
    assert levels.sum(axis=1).tolist() == [valid.sum()] * 3
    assert np.array_equal(levels[1], np.bincount(pixels[1][valid], minlength=256))
    assert levels[:, 255].max() < 5


def test_mean_and_deviation_are_those_of_the_pixels() -> None:
    pixels = draw(90, 25)
    found = normalization_of(count_levels(pixels, np.ones((200, 210), np.bool_)))
    assert found.mean == pytest.approx(pixels.mean(axis=(1, 2)), abs=1e-4)
    assert found.std == pytest.approx(pixels.std(axis=(1, 2)), abs=1e-4)


def test_a_constant_band_has_a_deviation_that_can_be_divided_by() -> None:
    pixels = np.full((1, 8, 8), 7, np.uint8)
    assert normalization_of(count_levels(pixels, np.ones((8, 8), np.bool_))) == ((7.0,), (1.0,))


def test_the_distance_is_the_wasserstein_distance_in_deviations_of_the_band_that_is_furthest() -> None:
    one, other, valid = draw(80, 30), draw(95, 30, 1), np.ones((200, 210), np.bool_)
    other[2] = draw(140, 20, 2)[2]
    levels, reference = count_levels(one, valid), count_levels(other, valid)
    std = normalization_of(reference).std
    expected = max(
        np.abs(np.sort(one[b].astype(float).ravel()) - np.sort(other[b].ravel())).mean() / std[b] for b in range(3)
    )
    assert distance(shares_of(levels), shares_of(reference), std) == pytest.approx(expected, abs=0.02)
    assert distance(shares_of(reference), shares_of(reference), std) == 0


def test_shares_of_a_normal_distribution_are_those_of_drawn_pixels() -> None:
    normalization = Normalization((100.0,) * 3, (30.0,) * 3)
    expected = shares_of(count_levels(draw(100, 30), np.ones((200, 210), np.bool_)))
    assert np.shape(normal_shares(normalization)) == (3, NUM_BINS)
    assert distance(normal_shares(normalization), expected, normalization.std) < 0.02
