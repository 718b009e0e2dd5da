"""Crops are fair and repeatable, augmentation keeps labels on their pixels, windows score each pixel once."""

import hashlib
import itertools
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_sample
from numpy.typing import NDArray

import seg_core.training.crops
from seg_core.training.crops import MAX_TURN, SCALE, Crops, augmentation, choose_crop, iter_windows, pad, source_size
from seg_core.training.dataset import MISSING, UNLABELLED, Sample

SIDE = 40


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 130), (200, 64), (10, 10)])
def test_windows_score_each_pixel_once_and_show_what_is_around(height: int, width: int) -> None:
    sample = random_sample(0, height, width)
    seen = np.zeros((height, width), np.int64)
    for window in iter_windows(sample, 64, 16):
        rows, cols = window.label.shape
        assert max(rows, cols) <= 64 + 2 * 16
        views = np.lib.stride_tricks.sliding_window_view(sample.image, (rows, cols, 3))[:, :, 0]
        ((row, col),) = np.argwhere((views == window.image).all(axis=(2, 3, 4)))
        at, scored = np.s_[row : row + rows, col : col + cols], window.label < UNLABELLED
        seen[at] += scored
        assert np.array_equal(window.label[scored], sample.label[at][scored])
        assert np.array_equal(window.label == MISSING, sample.label[at] == MISSING)  # what is around is seen
    assert np.array_equal(seen, sample.label != MISSING)


@pytest.mark.parametrize(
    ("multiple", "least", "height", "width"),
    [(16, 0, 1504, 1504), (256, 0, 1536, 1536), (1, 0, 1500, 1499), (1, 2000, 2000, 2000), (16, 1501, 1504, 1504)],
)
def test_images_are_padded_at_the_bottom_and_right_with_missing_pixels(
    multiple: int, least: int, height: int, width: int
) -> None:
    sample = Sample(np.full((1500, 1499, 1), 7, np.uint8), np.ones((1500, 1499), np.uint8))
    padded = pad(sample, multiple, least)
    assert padded.image.shape == (height, width, 1)
    assert padded.label.shape == (height, width)
    assert (padded.image[:1500, :1499] == 7).all()
    assert (padded.label[:1500, :1499] == 1).all()
    assert np.count_nonzero(padded.label == MISSING) == height * width - 1500 * 1499


# Crops


def make_crops(samples: Sequence[Sample], **fields: Any) -> Crops:
    options = {"size": 16, "batch": 8, "min_valid": 0.5, "augment": "none", "seed": 3}
    return Crops(samples=samples, **{**options, **fields})


every_augmentation = pytest.mark.parametrize("augment", ["none", "exposure", "light", "colour", "strong"])


@every_augmentation
@pytest.mark.parametrize("workers", [2, 3, 5, 8])
def test_workers_together_draw_the_batch_that_one_would_draw(workers: int, augment: str) -> None:
    samples = [random_sample(seed) for seed in range(5)]
    alone = make_crops(samples, augment=augment)
    each = [make_crops(samples, augment=augment) for _ in range(workers)]
    for epoch, step in ((1, 0), (2, 3), (1, 7)):
        whole = alone(epoch, step, 0, 1)
        shares = [crops(epoch, step, rank, workers) for rank, crops in enumerate(each)]
        assert {len(share.image) for share in shares} <= {8 // workers, -(-8 // workers)}
        assert all(len(share.image) == len(share.label) for share in shares)
        assert np.array_equal(np.concatenate([share.label for share in shares]), whole.label)
        assert np.array_equal(np.concatenate([share.image for share in shares]), whole.image)


@every_augmentation
def test_batches_repeat_by_seed_epoch_and_step_alone(augment: str) -> None:
    samples = [random_sample(0)]
    crops = make_crops(samples, augment=augment)
    first = crops(1, 0, 0, 1)
    crops(5, 5, 0, 1)
    for again in (crops(1, 0, 0, 1), make_crops(samples, augment=augment)(1, 0, 0, 1)):
        assert np.array_equal(again.image, first.image)
        assert np.array_equal(again.label, first.label)
    for other in (crops(1, 1, 0, 1), crops(2, 0, 0, 1), replace(crops, seed=4)(1, 0, 0, 1)):
        assert other.image.shape == first.image.shape
        assert not np.array_equal(other.image, first.image)


def hash_batches() -> str:
    crops = make_crops([random_sample(seed) for seed in range(3)], augment="strong")
    batches = [crops(epoch, step, 0, 1) for epoch, step in ((1, 0), (3, 2))]
    return hashlib.sha256(b"".join(part.tobytes() for batch in batches for part in batch)).hexdigest()


def test_another_process_draws_the_same_crops() -> None:
    np.random.seed(5)  # noqa: NPY002 - what the rest of a program does with it must not matter
    random.seed(6)
    code = "import test_crops; print(test_crops.hash_batches())"
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == hash_batches()


@every_augmentation
def test_crops_leave_the_samples_as_they_are(augment: str) -> None:
    samples = [random_sample(0), random_sample(1, 10, 12)]
    for sample in samples:
        sample.image.setflags(write=False)  # as Ray hands them out
        sample.label.setflags(write=False)
    before = [(sample.image.copy(), sample.label.copy()) for sample in samples]
    batch = make_crops(samples, augment=augment)(1, 0, 0, 1)
    batch.image[:], batch.label[:] = 0, 0
    for sample, (image, label) in zip(samples, before, strict=True):
        assert np.array_equal(sample.image, image)
        assert np.array_equal(sample.label, label)


def test_every_image_has_its_turn_before_any_has_two() -> None:
    samples = [Sample(np.full((20, 20, 3), i, np.uint8), np.zeros((20, 20), np.uint8)) for i in range(6)]
    crops = make_crops(samples, batch=4)
    drawn = [int(crop[0, 0, 0]) for step in range(6) for crop in crops(1, step, 0, 1).image]
    turns = [drawn[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(turn) == list(range(6)) for turn in turns)
    assert len(set(map(tuple, turns))) > 1


def test_crops_are_cut_from_image_and_label_at_the_same_place() -> None:
    row, col = np.mgrid[:SIDE, :SIDE].astype(np.uint8)
    sample = Sample(np.stack([row, col, row], axis=-1), (row + 3 * col) % 7)
    batch = make_crops([sample], batch=32)(1, 0, 0, 1)
    assert np.array_equal((batch.image[..., 0] + 3 * batch.image[..., 1]) % 7, batch.label)
    corners = batch.image[:, 0, 0, :2]
    assert len(np.unique(corners, axis=0)) > 16
    assert (batch.image[..., :2] == corners[:, None, None] + np.mgrid[:16, :16].transpose(1, 2, 0)).all()


@pytest.mark.parametrize("augment", ["none", "exposure", "light"])
def test_images_smaller_than_a_crop_are_padded_with_missing_pixels(augment: str) -> None:
    small = random_sample(0, 10, 12, missing=0.0)
    batch = make_crops([small], min_valid=0.0, augment=augment)(1, 0, 0, 1)
    assert batch.image.shape == (8, 16, 16, 3)
    assert (np.count_nonzero(batch.label != MISSING, axis=(1, 2)) == 120).all()


def test_crops_reach_every_corner_and_no_further() -> None:
    label = np.zeros((18, 17), np.uint8)
    found = {choose_crop(np.random.default_rng(seed), label, 16, 0.0) for seed in range(200)}
    assert found == {(row, col) for row in range(3) for col in range(2)}


def test_crops_prefer_valid_area() -> None:
    label = np.zeros((64, 64), np.uint8)
    label[:, :48] = MISSING
    shares = []
    for seed in range(100):
        row, col = choose_crop(np.random.default_rng(seed), label, 16, 0.6)
        shares.append((label[row : row + 16, col : col + 16] != MISSING).mean())
    assert np.mean(np.array(shares) >= 0.6) > 0.9


def test_where_no_crop_is_valid_enough_the_best_of_the_tries_is_taken() -> None:
    label = np.full((64, 64), MISSING, np.uint8)
    label[28:36, 28:36] = 1
    found = [choose_crop(np.random.default_rng(seed), label, 16, 1.0) for seed in range(100)]
    shares = np.array([(label[row : row + 16, col : col + 16] != MISSING).mean() for row, col in found])
    assert np.mean(shares > 0) > 0.9
    assert np.mean(shares == 0.25) > 0.5


# Augmentation


@every_augmentation
@pytest.mark.parametrize("bands", [1, 2, 4, 7])
def test_crops_of_any_number_of_bands_are_augmented(augment: str, bands: int) -> None:
    sample = random_sample(0, bands=bands)
    batch = make_crops([sample], batch=40, augment=augment)(1, 0, 0, 1)
    assert batch.image.shape == (40, 16, 16, bands)
    assert (batch.image.dtype, batch.label.dtype) == (np.uint8, np.uint8)


def test_colour_augmentation_changes_each_of_four_bands_by_a_factor_of_its_own() -> None:
    image = np.full((SIDE, SIDE, 4), 128, np.uint8)
    white_balance = augmentation("colour", SIDE, 4).transforms[-3]
    white_balance.p = 1.0
    white_balance.set_random_seed(0)
    gains = np.array([white_balance(image=image)["image"][0, 0] for _ in range(200)]) / 128
    assert 0.79 < gains.min() < 0.84
    assert 1.21 < gains.max() < 1.26
    assert np.abs(np.corrcoef(gains.T) - np.eye(4)).max() < 0.3


def test_haze_makes_dark_pixels_brighter_and_takes_contrast_away() -> None:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[:, ::2] = 100
    haze = augmentation("colour", SIDE).transforms[-1]
    haze.p = 1.0
    haze.set_random_seed(0)
    dark, bright = np.array([haze(image=image)["image"][0, :2, 0].astype(int)[::-1] for _ in range(100)]).T
    assert (dark >= 0).all()
    assert 55 < dark.max() <= 64
    assert (bright - dark >= 69).all()
    assert (bright - dark <= 101).all()


def test_colour_augmentation_changes_grey_levels_by_their_order_and_no_label() -> None:
    image = np.repeat(np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)[..., None], 3, axis=-1)
    steps = augmentation("colour", SIDE).transforms[-3:]
    for seed in range(30):
        changed = image
        for step in steps:
            step.p = 1.0
            step.set_random_seed(seed)
            changed = step(image=changed)["image"]
        order = np.argsort(image[..., 0], axis=None)
        assert (np.diff(changed.reshape(-1, 3)[order].astype(int), axis=0) >= 0).all()


def test_hue_is_changed_where_there_are_three_bands_alone() -> None:
    names = {n: [type(t).__name__ for t in augmentation("strong", SIDE, n).transforms] for n in (1, 3, 4)}
    assert [name for name in names[3] if name not in names[4]] == ["HueSaturationValue"]
    assert names[1] == names[4]


def test_light_augmentation_moves_image_and_label_together() -> None:
    label = np.zeros((24, 24), np.uint8)
    label[2:9, 3:20] = 1  # like none of its reflections and turns
    label[20:, 21:] = MISSING
    image = np.choose(np.where(label == MISSING, 2, label), [40, 120, 200]).astype(np.uint8)
    augment = augmentation("light", 24)
    augment.set_random_seed(5)
    places = set()
    for _ in range(60):
        changed = augment(image=np.stack([image] * 3, axis=-1), mask=label)
        moved, values = changed["mask"], changed["image"].astype(int)
        assert values.shape == (24, 24, 3)
        assert [np.count_nonzero(moved == c) for c in (0, 1, MISSING)] == [576 - 119 - 12, 119, 12]
        by_class = [values[moved == c] for c in (0, 1, MISSING)]
        assert all(v.min() == v.max() for v in by_class)
        assert by_class[0][0, 0] < by_class[1][0, 0] < by_class[2][0, 0]
        places.add(moved.tobytes())
    assert len(places) == 8


def test_without_augmentation_nothing_changes() -> None:
    sample = random_sample(0)
    changed = augmentation("none", SIDE)(image=sample.image, mask=sample.label)
    assert np.array_equal(changed["image"], sample.image)
    assert np.array_equal(changed["mask"], sample.label)


def test_exposure_changes_brightness_and_moves_nothing() -> None:
    sample = random_sample(0)
    augment = augmentation("exposure", SIDE)
    augment.set_random_seed(1)
    changes = [augment(image=sample.image, mask=sample.label) for _ in range(20)]
    assert all(np.array_equal(changed["mask"], sample.label) for changed in changes)
    assert len({changed["image"].tobytes() for changed in changes}) > 5
    order = np.argsort(sample.image, axis=None)
    assert all((np.diff(changed["image"].reshape(-1)[order].astype(int)) >= 0).all() for changed in changes)


def test_augmented_crops_change_brightness_but_not_what_is_where() -> None:
    label = np.tile(np.array([0, 1], np.uint8), (20, 10))
    sample = Sample(np.stack([60 + 90 * label] * 3, axis=-1), label)
    batch = make_crops([sample], size=20, batch=32, augment="light")(1, 0, 0, 1)
    assert batch.image.dtype == batch.label.dtype == np.uint8
    bright = [int(image[mask == 1].min()) for image, mask in zip(batch.image, batch.label, strict=True)]
    dark = [int(image[mask == 0].max()) for image, mask in zip(batch.image, batch.label, strict=True)]
    assert all(b > d for b, d in zip(bright, dark, strict=True))
    assert len(set(bright)) > 5


def inside(label: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels whose eight neighbours have their label: along borders a warped image holds mixtures."""
    padded = np.pad(label, 1, constant_values=254)
    height, width = label.shape
    around = [padded[i : i + height, j : j + width] == label for i in range(3) for j in range(3)]
    return np.logical_and.reduce(around)


def test_strong_augmentation_keeps_each_label_on_its_pixels() -> None:
    rng = np.random.default_rng(0)
    label = np.kron(rng.integers(0, 2, (12, 12)), np.ones((10, 10))).astype(np.uint8)
    sample = Sample(np.stack([50 + 130 * label] * 3, axis=-1), label)
    batch = make_crops([sample], size=48, batch=64, augment="strong")(1, 0, 0, 1)
    for image, mask in zip(batch.image.mean(axis=-1), batch.label, strict=True):
        known = inside(mask) & (mask != MISSING)
        bright, dark = image[known & (mask == 1)], image[known & (mask == 0)]
        assert dark.max() < bright.min()
        assert np.ptp(bright) <= 3  # of one colour throughout, so no pixel of the other one is among them
        assert np.ptp(dark) <= 3


def warped(source: int, size: int, scale: tuple[float, float], angle: float) -> Sample:
    """A bright square of `source` px, turned and scaled as told, and cut to `size` px."""
    warp, cut = augmentation("strong", size).transforms[:2]
    warp.p, warp.rotate = 1.0, (angle, angle)
    warp.scale = {axis: (factor, factor) for axis, factor in zip("xy", scale, strict=True)}
    moved = warp(image=np.full((source, source, 3), 200, np.uint8), mask=np.ones((source, source), np.uint8))
    found = cut(**moved)
    return Sample(found["image"], found["mask"])


@pytest.mark.parametrize("size", [15, 16, 33, 64, 256])
def test_a_turned_and_shrunk_crop_is_still_filled(size: int) -> None:
    source = source_size("strong", size)
    factors = (1 / SCALE, 1.0, SCALE)
    for scale, angle in itertools.product(itertools.product(factors, factors), (-MAX_TURN, -11.0, 0.0, MAX_TURN)):
        found = warped(source, size, scale, angle)
        assert found.label.shape == (size, size)
        assert (found.label == 1).all()
        assert (found.image == 200).all()
    tight = warped(source - 6, size, (1 / SCALE, 1 / SCALE), MAX_TURN)
    assert (tight.label == MISSING).any()


@pytest.mark.parametrize("augment", ["none", "exposure", "light"])
def test_other_crops_are_made_from_their_own_pixels_alone(augment: str) -> None:
    assert source_size(augment, 48) == 48


def test_strong_crops_inside_an_image_hold_no_missing_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    side = source_size("strong", 32)
    full = Sample(np.full((side, side, 3), 128, np.uint8), np.ones((side, side), np.uint8))
    crops = make_crops([full], size=32, batch=150, augment="strong")
    assert (crops(1, 0, 0, 1).label == MISSING).any()
    monkeypatch.setattr(seg_core.training.crops, "choose_crop", lambda *_: ((side - 32) // 2,) * 2)
    assert (crops(1, 0, 0, 1).label == 1).all()


def test_strong_crops_are_missing_beyond_the_borders_of_an_image() -> None:
    full = Sample(np.full((32, 32, 3), 200, np.uint8), np.ones((32, 32), np.uint8))
    batch = make_crops([full], size=32, batch=100, augment="strong")(1, 0, 0, 1)
    assert set(np.unique(batch.label)) == {1, MISSING}
    shares = (batch.label == MISSING).mean(axis=(1, 2))
    assert 0.2 < np.mean(shares > 0) < 0.8
    assert shares.max() < 0.6
    for image, label in zip(batch.image.mean(axis=-1), batch.label, strict=True):
        known = inside(label)
        assert (image[known & (label == MISSING)] < 100).all()
        assert (image[known & (label == 1)] > 100).all()


def test_transforms_draw_independent_random_numbers() -> None:
    sample = random_sample(0, 64, 64, missing=0.0)
    crops = make_crops([sample], batch=1, augment="strong")
    warp, _, turn, bright, hue, balance, gamma, haze = crops._pipeline.transforms
    drawn: list[list[float]] = []
    for step in range(300):
        crops(1, step, 0, 1)
        at = [t.get_applied_params() for t in (warp, turn, bright, hue, balance, gamma, haze)]
        drawn.append([float(bool(params)) for params in at])
    together = np.corrcoef(np.array(drawn)[:, [0, 2, 3, 4, 5, 6]].T)
    assert np.abs(together - np.eye(6)).max() < 0.25
    assert (np.abs(np.array(drawn).mean(axis=0) - [0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.3]) < 0.12).all()
