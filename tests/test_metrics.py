"""Scores are torchmetrics' ones, from counts summed over all images, over valid pixels alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_calibration_error,
    binary_f1_score,
    binary_jaccard_index,
    binary_precision,
    binary_recall,
)

from seg_core.training.metrics import STEPS, Counts, Histogram, count, histogram, scores

REFERENCES = {
    "iou": binary_jaccard_index,
    "f1": binary_f1_score,
    "precision": binary_precision,
    "recall": binary_recall,
    "accuracy": binary_accuracy,
}
Mask = NDArray[np.bool_]


def random_masks(seed: int, shape: tuple[int, ...]) -> tuple[Mask, Mask, Mask]:
    rng = np.random.default_rng(seed)
    truth = rng.random(shape) < rng.uniform(0.1, 0.6)
    predicted = truth ^ (rng.random(shape) < 0.2)
    return predicted, truth, rng.random(shape) < 0.7


def reference(name: str, predicted: Mask, truth: Mask, valid: Mask) -> float:
    target = torch.from_numpy(np.where(valid, truth, 255).astype(np.int64))
    return float(REFERENCES[name](torch.from_numpy(predicted.astype(np.int64)), target, ignore_index=255))


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_torchmetrics(name: str, seed: int) -> None:
    masks = random_masks(seed, (37, 53))
    assert scores(count(*masks))[name] == pytest.approx(reference(name, *masks), abs=1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_scores_over_images_come_from_summed_counts(name: str) -> None:
    images = [random_masks(seed, (20, 10 + 40 * seed)) for seed in range(3)]
    total = Counts()
    for masks in images:
        total = total.plus(count(*masks))
    predicted, truth, valid = (np.concatenate(kind, axis=1) for kind in zip(*images, strict=True))
    assert scores(total)[name] == pytest.approx(reference(name, predicted, truth, valid), abs=1e-6)


def test_the_iou_of_several_images_is_not_the_mean_of_theirs() -> None:
    small, large = Counts(tp=1, fp=0, fn=0, tn=99), Counts(tp=10, fp=40, fn=50, tn=0)
    assert scores(small)["iou"] == 1.0
    assert scores(large)["iou"] == 0.1
    assert scores(small.plus(large))["iou"] == pytest.approx(11 / 101)


def test_each_kind_of_pixel_has_its_own_count() -> None:
    truth = np.array([[1, 1, 1, 1, 0, 0, 0, 0, 0, 0]], np.bool_)
    predicted = np.array([[1, 0, 0, 0, 1, 1, 0, 0, 0, 0]], np.bool_)
    assert count(predicted, truth, np.ones_like(truth)) == Counts(tp=1, fp=2, fn=3, tn=4)


def test_pixels_that_are_not_valid_count_nowhere() -> None:
    predicted, truth, valid = random_masks(0, (30, 30))
    found = count(predicted, truth, valid)
    assert sum(found) == valid.sum()
    assert count(predicted ^ ~valid, truth, valid) == found
    assert count(predicted, truth ^ ~valid, valid) == found
    assert count(predicted, truth, np.zeros_like(valid)) == Counts()


def test_a_score_of_nothing_over_nothing_is_none() -> None:
    assert scores(Counts()) == dict.fromkeys(REFERENCES)
    assert scores(Counts(tn=5)) == {"iou": None, "f1": None, "precision": None, "recall": None, "accuracy": 1.0}
    assert scores(Counts(fn=5)) == {"iou": 0.0, "f1": 0.0, "precision": None, "recall": 0.0, "accuracy": 0.0}
    assert scores(Counts(fp=5)) == {"iou": 0.0, "f1": 0.0, "precision": 0.0, "recall": None, "accuracy": 0.0}


# Histograms


def random_probabilities(seed: int, size: int = 2000) -> tuple[NDArray[np.float32], Mask, Mask]:
    """Probabilities, many of them right on a step of the histogram, with truth that goes with them by and large."""
    rng = np.random.default_rng(seed)
    probability = rng.random(size).astype(np.float32)
    steps = rng.random(size) < 0.3
    probability[steps] = np.round(probability[steps] * STEPS) / STEPS
    probability[:2] = 0, 1
    return probability, rng.random(size) < 0.2 + 0.5 * probability, rng.random(size) < 0.7


@given(
    st.lists(
        st.tuples(st.floats(0, 1, width=32) | st.integers(0, 256).map(lambda k: k / 256), st.booleans(), st.booleans()),
        max_size=60,
    )
)
@settings(max_examples=60, deadline=None)
def test_counts_of_a_histogram_are_exact_at_each_of_its_thresholds(pixels: list[tuple[float, bool, bool]]) -> None:
    values, truth, valid = zip(*pixels, strict=True) if pixels else ((), (), ())
    probability, masks = np.array(values, np.float32), (np.array(truth, np.bool_), np.array(valid, np.bool_))
    found = histogram(probability, *masks)
    for k in range(STEPS):
        assert found.counts(k / STEPS) == count(probability >= k / STEPS, *masks)


def test_a_float_just_below_a_step_is_counted_below_it() -> None:
    probability = np.array([0.5, np.nextafter(np.float32(0.5), np.float32(0))], np.float32)
    found = histogram(probability, np.ones(2, np.bool_), np.ones(2, np.bool_))
    assert found.pixels[1, 127:129].tolist() == [1, 1]


def test_a_histogram_holds_truth_in_its_second_row_and_shapes_do_not_matter() -> None:
    probability, truth, valid = random_probabilities(0)
    found = histogram(probability, truth, valid)
    assert found.pixels.shape == (2, STEPS)
    assert found.pixels.dtype == np.int64
    assert found.pixels.sum(axis=1).tolist() == [(valid & ~truth).sum(), (valid & truth).sum()]
    shaped = histogram(*(values.reshape(40, 50) for values in (probability, truth, valid)))
    assert np.array_equal(shaped.pixels, found.pixels)


def test_histograms_of_parts_add_up() -> None:
    whole = random_probabilities(1)
    parts = [histogram(*(values[part] for values in whole)).pixels for part in (np.s_[:700], np.s_[700:])]
    assert np.array_equal(sum(parts), histogram(*whole).pixels)


@pytest.mark.parametrize("seed", range(3))
def test_ious_are_those_of_the_counts(seed: int) -> None:
    found = histogram(*random_probabilities(seed))
    expected = [scores(found.counts(k / STEPS))["iou"] for k in range(STEPS)]
    assert found.ious().tolist() == expected


def test_the_iou_of_a_histogram_without_buildings_is_zero() -> None:
    assert Histogram.empty().ious().tolist() == [0.0] * STEPS
    below = histogram(np.array([0.25], np.float32), np.array([False]), np.array([True]))
    assert below.ious().tolist() == [0.0] * STEPS


@pytest.mark.parametrize("seed", range(3))
def test_no_threshold_has_a_better_iou_than_the_best(seed: int) -> None:
    probability, truth, valid = random_probabilities(seed)
    best = histogram(probability, truth, valid).best_threshold()
    ious = {k / STEPS: scores(count(probability >= k / STEPS, truth, valid))["iou"] or 0.0 for k in range(1, STEPS)}
    assert ious[best] == max(ious.values())


@pytest.mark.parametrize(
    ("values", "truth", "expected"),
    [
        ([0.25, 0.75], [0, 1], (65 + 193) // 2 / 256),  # all of 65/256 to 192/256 are perfect
        ([1.0, 1.0], [1, 1], 128 / 256),
        ([0.0, 0.0], [1, 1], 0.5),  # none finds any
        ([0.3, 0.9], [0, 0], 0.5),
        ([0.999, 0.5], [1, 0], None),
    ],
)
def test_of_several_best_thresholds_the_middle_one_is_chosen(
    values: list[float], truth: list[int], expected: float | None
) -> None:
    probability = np.array(values, np.float32)
    found = histogram(probability, np.array(truth, np.bool_), np.ones(2, np.bool_)).best_threshold()
    assert 0 < found < 1
    if expected is None:
        assert probability[1] < found <= probability[0]
    else:
        assert found == pytest.approx(expected, abs=1 / STEPS)


def test_the_best_threshold_of_nothing_is_a_half() -> None:
    assert Histogram.empty().best_threshold() == 0.5


@pytest.mark.parametrize("seed", range(4))
def test_the_calibration_error_is_that_of_torchmetrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probability = rng.beta(0.5 + seed, 2.0, 3000).astype(np.float32)
    truth, valid = rng.random(3000) < probability ** (0.5 + seed), rng.random(3000) < 0.8
    target = torch.from_numpy(truth[valid].astype(np.int64))
    expected = binary_calibration_error(torch.from_numpy(probability[valid]), target, n_bins=16, norm="l1")
    found = histogram(probability, truth, valid).calibration_error()
    assert found == pytest.approx(float(expected), abs=0.5 / STEPS)
    assert found > 0.01


def test_the_calibration_error_of_nothing_is_none() -> None:
    assert Histogram.empty().calibration_error() is None
    predicted, observed, pixels = Histogram.empty().reliability()
    assert len(predicted) == len(observed) == len(pixels) == 0


@pytest.mark.parametrize("bins", [4, 16])
def test_reliability_is_of_the_pixels_of_each_bin_that_has_some(bins: int) -> None:
    probability, truth, valid = random_probabilities(2)
    valid &= (probability < 0.25) | (probability >= 0.5)
    predicted, observed, pixels = histogram(probability, truth, valid).reliability(bins)
    of_bin = [valid & (probability >= i / bins) & (probability < (i + 1) / bins + (i == bins - 1)) for i in range(bins)]
    of_bin = [cells for cells in of_bin if cells.any()]
    assert len(of_bin) == 3 * bins // 4
    assert pixels.tolist() == [cells.sum() for cells in of_bin]
    np.testing.assert_allclose(observed, [truth[cells].mean() for cells in of_bin])
    np.testing.assert_allclose(predicted, [probability[cells].mean() for cells in of_bin], atol=0.5 / STEPS)


def test_no_threshold_between_0_and_1_is_one_of_them() -> None:
    found = Histogram(np.ones((2, STEPS), np.int64))
    assert found.counts(0.999) == found.counts(1 - 1 / STEPS) != found.counts(1.0)
    assert found.counts(0.001) == found.counts(1 / STEPS) != found.counts(0.0)


def test_the_confidence_is_the_share_of_pixels_by_probability() -> None:
    probability = np.array([[0.0, 0.01, 0.5, 0.999]], np.float32)
    truth, valid = probability > 0.4, np.array([[True, True, True, True]])
    assert histogram(probability, truth, valid).confidence(4) == (0.5, 0.0, 0.25, 0.25)
    assert Histogram.empty().confidence() == ()
