"""Pairs are decoded as the labels' colours and the images' missing pixels say; crops are fair and repeatable."""

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
import rasterio
from conftest import MakeScene
from numpy.typing import NDArray
from rasterio.enums import ColorInterp

import seg_core.training.dataset
from seg_core.errors import SegError
from seg_core.training.dataset import (
    MAX_TURN,
    MISSING,
    ROWS,
    SCALE,
    Classes,
    Crops,
    Pair,
    Sample,
    augmentation,
    choose_crop,
    cut,
    digest,
    find_pairs,
    fingerprint,
    normalisation,
    pad,
    read_classes,
    read_pair,
    source_size,
)

TWO = Classes(("background", "building"), ((0, 0, 0), (255, 255, 255)))
FOUR = Classes(("road", "background", "building", "water"), ((128, 64, 128), (0, 0, 0), (255, 0, 1), (255, 0, 0)))
SIDE = 40

Indices = NDArray[np.uint8]


def colours(indices: Indices, classes: Classes) -> NDArray[np.uint8]:
    """The label `(3, height, width)` that stands for class indices."""
    return np.array(classes.colours, np.uint8)[indices].transpose(2, 0, 1)


def random_indices(classes: Classes, seed: int = 0, height: int = 20, width: int = 30) -> Indices:
    return np.random.default_rng(seed).integers(0, len(classes.names), (height, width), dtype=np.uint8)


def random_sample(seed: int, height: int = SIDE, width: int = SIDE, missing: float = 0.2) -> Sample:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, (height, width), dtype=np.uint8)
    label[rng.random((height, width)) < missing] = MISSING
    return Sample(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), label)


def write_pair(make_scene: MakeScene, label: NDArray[np.uint8], **image: Any) -> Pair:
    """Write an image and its label `(bands, height, width)`."""
    size = {"height": label.shape[1], "width": label.shape[2]}
    return Pair(make_scene("train/a.tiff", **{**size, **image}), make_scene("train_labels/a.tif", pixels=label))


def write_classes(folder: Path, text: str) -> str:
    (folder / "label_class_dict.csv").write_text(text)
    return str(folder)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 130), (200, 64), (10, 10)])
def test_windows_score_each_pixel_once_and_show_what_is_around(height: int, width: int) -> None:
    sample = random_sample(0, height, width)
    seen = np.zeros((height, width), np.int64)
    for window in cut(sample, 64, 16):
        rows, cols = window.label.shape
        assert max(rows, cols) <= 64 + 2 * 16
        views = np.lib.stride_tricks.sliding_window_view(sample.image, (rows, cols, 3))[:, :, 0]
        ((row, col),) = np.argwhere((views == window.image).all(axis=(2, 3, 4)))
        at, scored = np.s_[row : row + rows, col : col + cols], window.label != MISSING
        seen[at] += scored
        assert np.array_equal(window.label[scored], sample.label[at][scored])
    assert np.array_equal(seen, sample.label != MISSING)


# Classes


def test_classes_are_read_in_the_order_of_their_lines(tmp_path: Path) -> None:
    text = "name,r,g,b\nroad,128,64,128\nbackground,0,0,0\nbuilding,255,0,1\nwater,255,0,0\n"
    classes = read_classes(write_classes(tmp_path, text))
    assert classes == FOUR
    assert classes.building == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class,r,g,b\nbackground,0,0,0\nbuilding,1,1,1\n", "name,r,g,b"),
        ("name,r,g,b\nbuilding,1,1,1\n", "2 to 254 classes"),
        ("name,r,g,b\nbackground,7,7,7\nbuilding,7,7,7\n", r"same colour, \(7, 7, 7\)"),
        ("name,r,g,b\nbuilding,7,7,7\nbuilding,8,8,8\n", "same name, building"),
        ("name,r,g,b\nbackground,0,0,0\nbuilding,256,0,0\n", "from 0 to 255"),
    ],
)
def test_a_class_file_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SegError, match=rf"label_class_dict\.csv: .*{message}"):
        read_classes(write_classes(tmp_path, text))


def test_a_missing_class_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SegError, match=rf"{tmp_path}/label_class_dict\.csv: no such file"):
        read_classes(str(tmp_path))


@pytest.mark.parametrize("names", [("background", "house"), ("building", "Buildings")])
def test_the_building_class_must_be_told_by_its_name(names: tuple[str, str]) -> None:
    with pytest.raises(SegError, match=", ".join(names)):
        _ = Classes(names, TWO.colours).building


# Pairs


@pytest.mark.parametrize("suffix", [".tif", ".tiff"])
def test_pairs_are_found_by_name(make_scene: MakeScene, tmp_path: Path, suffix: str) -> None:
    for name in ("b", "a"):
        make_scene(f"val/{name}.tiff")
        make_scene(f"val_labels/{name}{suffix}")
    (tmp_path / "val" / "notes.txt").write_text("no image")
    pairs = find_pairs(str(tmp_path), "val")
    assert pairs == [Pair(f"{tmp_path}/val/{n}.tiff", f"{tmp_path}/val_labels/{n}{suffix}") for n in ("a", "b")]


def test_an_image_without_a_label_is_named(make_scene: MakeScene, tmp_path: Path) -> None:
    make_scene("train/a.tiff")
    make_scene("train/b.tiff")
    make_scene("train_labels/a.tif")
    with pytest.raises(SegError, match=r"/train_labels: lacks the labels of 1 of 2 images: b\.tiff "):
        find_pairs(str(tmp_path), "train")


def test_of_many_images_without_labels_ten_are_named(tmp_path: Path) -> None:
    for folder in ("train", "train_labels"):
        (tmp_path / folder).mkdir()
    for number in range(13):
        (tmp_path / "train" / f"{number:02}.tif").touch()
    (tmp_path / "train_labels" / "12.tif").touch()
    with pytest.raises(SegError, match=r"12 of 13 images: 00\.tif, .*, 09\.tif and 2 more \(") as caught:
        find_pairs(str(tmp_path), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("there", "absent"), [("train", "train_labels"), ("train_labels", "train")])
def test_a_missing_folder_is_named(tmp_path: Path, there: str, absent: str) -> None:
    (tmp_path / there).mkdir()
    with pytest.raises(SegError, match=rf"/{absent}: no such folder"):
        find_pairs(str(tmp_path), "train")


def test_a_split_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train_labels").mkdir()
    with pytest.raises(SegError, match="no images"):
        find_pairs(str(tmp_path), "train")


@pytest.mark.parametrize("classes", [TWO, FOUR], ids=["two classes", "four classes"])
def test_labels_are_decoded_by_their_colours(make_scene: MakeScene, classes: Classes) -> None:
    indices = random_indices(classes)
    pixels = np.random.default_rng(1).integers(0, 256, (3, *indices.shape), dtype=np.uint8)
    sample, scene, _ = read_pair(write_pair(make_scene, colours(indices, classes), pixels=pixels), classes)
    assert np.array_equal(sample.label, indices)
    assert np.array_equal(sample.image, pixels.transpose(1, 2, 0))
    assert (sample.label.dtype, sample.image.dtype) == (np.uint8, np.uint8)
    assert (scene.height, scene.width) == indices.shape


def test_a_grey_label_is_decoded_like_a_coloured_one(make_scene: MakeScene) -> None:
    indices = random_indices(TWO)
    sample, *_ = read_pair(write_pair(make_scene, colours(indices, TWO)[:1]), TWO)
    assert np.array_equal(sample.label, indices)


@pytest.mark.parametrize("place", [(0, 0), (7, 19), (19, 29)])
def test_an_unknown_colour_is_named_with_its_place(make_scene: MakeScene, place: tuple[int, int]) -> None:
    label = colours(random_indices(FOUR), FOUR)
    label[:, place[0], place[1]] = 255, 0, 2  # between the colours of two classes
    where = rf"train_labels/a\.tif: colour \(255, 0, 2\) at row {place[0]}, column {place[1]} "
    with pytest.raises(SegError, match=where):
        read_pair(write_pair(make_scene, label), FOUR)


@pytest.mark.parametrize("colour", [(0, 0, 1), (255, 255, 254), (128, 128, 128)])
def test_a_colour_below_between_or_beyond_the_known_ones_is_refused(
    make_scene: MakeScene, colour: tuple[int, int, int]
) -> None:
    label = colours(random_indices(TWO), Classes(TWO.names, ((0, 0, 2), (255, 255, 253))))
    label[:, 3, 4] = colour
    with pytest.raises(SegError, match=rf"\({', '.join(map(str, colour))}\) at row 3, column 4"):
        read_pair(write_pair(make_scene, label), Classes(TWO.names, ((0, 0, 2), (255, 255, 253))))


def test_a_label_of_another_size_without_georeference_is_refused_with_both_sizes(make_scene: MakeScene) -> None:
    pair = write_pair(make_scene, colours(random_indices(TWO), TWO), height=20, width=31, crs=None)
    with pytest.raises(SegError, match=r"train_labels/a\.tif: .*30 x 20 px.*31 x 20"):
        read_pair(pair, TWO)


@pytest.mark.parametrize("rows_off", [-7, 7])
def test_a_label_in_another_frame_teaches_the_same(make_scene: MakeScene, rows_off: int) -> None:
    indices = random_indices(TWO, height=40)
    image = np.random.default_rng(2).integers(0, 255, (3, 20, 30), dtype=np.uint8)
    pair = write_pair(make_scene, colours(indices[10:30], TWO), pixels=image)
    plain, scene, off = read_pair(pair, TWO)
    assert off == 0
    transform = (1.0, 0.0, 400_000.0, 0.0, -1.0, 5_800_000.0 - rows_off)
    make_scene("train_labels/a.tif", pixels=colours(indices[10 + rows_off :][:20], TWO), transform=transform)
    moved, _, off = read_pair(pair, TWO)
    assert off == 7
    covered = np.s_[7:] if rows_off > 0 else np.s_[:-7]
    expected = np.full_like(plain.label, MISSING)
    expected[covered] = plain.label[covered]
    assert np.array_equal(moved.label, expected)
    make_scene("train_labels/a.tif", pixels=colours(indices, TWO), transform=(*transform[:5], 5_800_010.0))
    larger, _, off = read_pair(pair, TWO)
    assert off == 10
    assert digest(larger, scene, 1) == digest(plain, scene, 1)  # and so the fingerprint is the same
    assert digest(moved, scene, 1).content != digest(plain, scene, 1).content


def test_a_label_beside_the_valid_pixels_of_its_image_is_refused(make_scene: MakeScene) -> None:
    pixels = np.full((3, 20, 30), 255, np.uint8)
    pixels[:, 10:] = 7
    pair = write_pair(make_scene, colours(random_indices(TWO), TWO), pixels=pixels, nodata=255)
    transform = (1.0, 0.0, 400_000.0, 0.0, -1.0, 5_800_010.0)
    make_scene("train_labels/a.tif", pixels=colours(random_indices(TWO), TWO), transform=transform)
    with pytest.raises(SegError, match=r"train_labels/a\.tif: this label holds no data where .*a\.tiff, does"):
        read_pair(pair, TWO)


def test_an_unknown_colour_of_a_warped_label_is_named_by_its_place_on_the_image(make_scene: MakeScene) -> None:
    label = colours(random_indices(TWO), TWO)
    label[:, 3, 4] = 7
    pair = write_pair(make_scene, label)
    make_scene("train_labels/a.tif", pixels=label, transform=(1.0, 0.0, 400_002.0, 0.0, -1.0, 5_799_999.0))
    with pytest.raises(SegError, match=r"colour \(7, 7, 7\) at row 4, column 6 of its image is not in"):
        read_pair(pair, TWO)


def test_an_image_that_is_not_uint8_is_refused(make_scene: MakeScene) -> None:
    pair = write_pair(make_scene, colours(random_indices(TWO), TWO), dtype="uint16")
    with pytest.raises(SegError, match=r"train/a\.tiff: .*uint16"):
        read_pair(pair, TWO)


# Missing pixels


def test_pixels_of_nodata_in_all_bands_are_missing(make_scene: MakeScene) -> None:
    indices = random_indices(TWO)
    pixels = np.random.default_rng(2).integers(0, 255, (3, *indices.shape), dtype=np.uint8)
    pixels[:, 5:9, 10:25] = 255
    pixels[0, 0, :] = 255  # one band alone is data
    sample, *_ = read_pair(write_pair(make_scene, colours(indices, TWO), pixels=pixels, nodata=255), TWO)
    missing = np.zeros(indices.shape, np.bool_)
    missing[5:9, 10:25] = True
    assert np.array_equal(sample.label, np.where(missing, MISSING, indices))


@pytest.mark.parametrize("kind", ["alpha", "mask"])
def test_pixels_behind_alpha_or_mask_are_missing(make_scene: MakeScene, kind: str) -> None:
    indices = random_indices(TWO)
    pair = write_pair(make_scene, colours(indices, TWO))
    rng = np.random.default_rng(3)
    pixels, valid = rng.integers(0, 256, (3, *indices.shape), dtype=np.uint8), rng.random(indices.shape) < 0.5
    opacity = valid.astype(np.uint8) * 255
    bands = np.concatenate([pixels, opacity[None]]) if kind == "alpha" else pixels
    height, width = indices.shape
    profile = {"driver": "GTiff", "dtype": "uint8", "count": len(bands), "height": height, "width": width}
    georeference = {"crs": "EPSG:32633", "transform": rasterio.Affine(1, 0, 400_000, 0, -1, 5_800_000)}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(pair.image, "w", **profile, **georeference) as dataset,
    ):
        rgb = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
        dataset.colorinterp = (*rgb, ColorInterp.alpha) if kind == "alpha" else rgb
        dataset.write(bands)
        if kind == "mask":
            dataset.write_mask(opacity)
    sample, *_ = read_pair(pair, TWO)
    assert np.array_equal(sample.label, np.where(valid, indices, MISSING))
    assert np.array_equal(sample.image, pixels.transpose(1, 2, 0))


def test_the_label_of_a_missing_pixel_may_have_any_colour(make_scene: MakeScene) -> None:
    label = colours(random_indices(TWO), TWO)
    label[:, :5] = 77
    pixels = np.full((3, 20, 30), 100, np.uint8)
    pixels[:, :5] = 255
    sample, *_ = read_pair(write_pair(make_scene, label, pixels=pixels, nodata=255), TWO)
    assert (sample.label[:5] == MISSING).all()
    assert (sample.label[5:] != MISSING).all()


@pytest.mark.parametrize("kind", ["alpha", "mask", "nodata"])
def test_pixels_that_a_label_leaves_out_are_missing(make_scene: MakeScene, kind: str) -> None:
    indices = random_indices(TWO)
    labelled = np.random.default_rng(3).random(indices.shape) < 0.5
    label = colours(indices, TWO)
    opacity = labelled.astype(np.uint8) * 255
    pair = write_pair(make_scene, label)
    if kind == "nodata":
        make_scene("train_labels/a.tif", pixels=np.where(labelled, label[:1], 7).astype(np.uint8), nodata=7)
    elif kind == "alpha":
        make_scene("train_labels/a.tif", pixels=np.concatenate([label, opacity[None]]))
        with rasterio.open(pair.label, "r+") as dataset:
            dataset.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
    else:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(pair.label, "r+") as dataset:
            dataset.write_mask(opacity)
    sample, *_ = read_pair(pair, TWO)
    assert np.array_equal(sample.label, np.where(labelled, indices, MISSING))


@pytest.mark.parametrize("nodata", [0, 255])
def test_a_label_whose_nodata_value_is_a_class_is_refused(make_scene: MakeScene, nodata: int) -> None:
    pair = write_pair(make_scene, colours(random_indices(TWO), TWO))
    make_scene("train_labels/a.tif", pixels=colours(random_indices(TWO), TWO)[:1], nodata=nodata)
    with pytest.raises(SegError, match=rf"train_labels/a\.tif: its nodata value {nodata} is also a class"):
        read_pair(pair, TWO)


def test_oblong_pixels_are_refused(make_scene: MakeScene) -> None:
    at = {"crs": "EPSG:4326", "transform": (1e-5, 0.0, 8.0, 0.0, -1e-5, 52.0)}
    pair = write_pair(make_scene, colours(random_indices(TWO), TWO), **at)
    with pytest.raises(SegError, match=r"train/a\.tiff: 0\.687 x 1\.11 m a pixel: a dataset's are square"):
        read_pair(pair, TWO)


def test_a_large_label_is_decoded_like_a_small_one(make_scene: MakeScene) -> None:
    indices = np.random.default_rng(5).integers(0, 2, (ROWS + 3, 7), dtype=np.uint8)
    label = colours(indices, TWO)
    assert np.array_equal(read_pair(write_pair(make_scene, label), TWO)[0].label, indices)
    label[:, ROWS + 2, 6] = 9
    with pytest.raises(SegError, match=rf"at row {ROWS + 2}, column 6 "):
        read_pair(write_pair(make_scene, label), TWO)


# Figures


def digests(samples: Sequence[Sample], make_scene: MakeScene) -> list[Any]:
    _, scene, _ = read_pair(write_pair(make_scene, colours(random_indices(TWO), TWO)), TWO)
    return [digest(sample, scene, TWO.building) for sample in samples]


def test_normalisation_is_that_of_all_valid_pixels(make_scene: MakeScene) -> None:
    samples = [random_sample(0, 10, 20), random_sample(1, 50, 30, missing=0.9), random_sample(2, 5, 5, missing=1.0)]
    for sample in samples:
        sample.image[sample.label == MISSING] = 255
        sample.image[..., 1] //= 3
    pixels = np.concatenate([sample.image[sample.label != MISSING] for sample in samples]).astype(np.float64)
    mean, std = normalisation(digests(samples, make_scene))
    assert mean == pytest.approx(pixels.mean(axis=0), abs=1e-3)
    assert std == pytest.approx(pixels.std(axis=0), abs=1e-3)


def test_normalisation_of_a_constant_band_divides_by_one(make_scene: MakeScene) -> None:
    sample = random_sample(0)
    sample.image[..., 2] = 9
    mean, std = normalisation(digests([sample], make_scene))
    assert (mean[2], std[2]) == (9, 1)


def test_the_fingerprint_is_of_the_content_whatever_its_order(make_scene: MakeScene) -> None:
    one, two, three = digests([random_sample(0), random_sample(1), random_sample(2)], make_scene)
    whole = fingerprint(TWO, {"train": [one, two], "val": [three]})
    assert whole == fingerprint(TWO, {"val": [three], "train": [two, one]})
    changed, relabelled = random_sample(0), random_sample(0)
    changed.image[3, 4, 1] ^= 1
    relabelled.label[3, 4] ^= 1
    for other in digests([changed, relabelled], make_scene):
        assert fingerprint(TWO, {"train": [other, two], "val": [three]}) != whole
    assert fingerprint(TWO, {"train": [one], "val": [two, three]}) != whole
    assert fingerprint(replace(TWO, names=("background", "buildings")), {"train": [one, two], "val": [three]}) != whole


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


every_augmentation = pytest.mark.parametrize("augment", ["none", "exposure", "light", "strong"])


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
    code = "import test_dataset; print(test_dataset.hash_batches())"
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
    monkeypatch.setattr(seg_core.training.dataset, "choose_crop", lambda *_: ((side - 32) // 2,) * 2)
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
    warp, _, turn, bright, gamma, hue, shift = crops._pipeline.transforms
    drawn: list[list[float]] = []
    for step in range(300):
        crops(1, step, 0, 1)
        at = [t.get_applied_params() for t in (warp, turn, bright, gamma, hue, shift)]
        drawn.append([float(bool(params)) for params in at])
    together = np.corrcoef(np.array(drawn)[:, [0, 2, 3, 4, 5]].T)
    assert np.abs(together - np.eye(5)).max() < 0.25
    assert (np.abs(np.array(drawn).mean(axis=0) - [0.5, 1.0, 0.5, 0.5, 0.5, 0.5]) < 0.12).all()


# Real data


def test_the_real_validation_images_decode(shared: Path) -> None:
    data = str(shared / "massachusetts-buildings")
    classes = read_classes(data)
    assert classes == TWO
    pairs = find_pairs(data, "val")
    assert len(pairs) == 9
    valid = building = 0
    for pair in pairs:
        sample, scene, off = read_pair(pair, classes)
        assert off == 0
        assert sample.image.shape == (1500, 1500, 3)
        assert scene.gsd_m == pytest.approx(1, abs=0.01)
        with rasterio.open(pair.image) as dataset:
            masked = dataset.dataset_mask() == 0
        assert np.array_equal(sample.label == MISSING, masked)
        assert set(np.unique(sample.label)) == {0, 1, MISSING}
        valid += int((~masked).sum())
        building += int((sample.label == 1).sum())
    assert 0.5 < valid / (9 * 1500**2) < 0.8
    assert 0.08 < building / valid < 0.2
