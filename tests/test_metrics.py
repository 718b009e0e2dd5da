"""Scores are torchmetrics' ones, from counts summed over all images, over valid pixels alone."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_f1_score,
    binary_jaccard_index,
    binary_precision,
    binary_recall,
)

from seg_core.metrics import Counts, count, scores

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
