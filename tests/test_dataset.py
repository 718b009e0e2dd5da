"""Pairs are decoded as the labels' colours and the images' missing pixels say."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import MakeScene, random_sample
from numpy.typing import NDArray
from rasterio.enums import ColorInterp

from seg_core.errors import SegError
from seg_core.training.class_names import describe_class
from seg_core.training.dataset import (
    MISSING,
    ROWS,
    UNLABELLED,
    Classes,
    Pair,
    Sample,
    find_pairs,
    read_classes,
    read_header,
    read_pair,
)
from seg_core.training.statistics import Digest, check_bands, describe_imagery, digest, fingerprint, normalisation

TWO = Classes(("background", "building"), ((0, 0, 0), (255, 255, 255)))
FOUR = Classes(("road", "background", "building", "water"), ((128, 64, 128), (0, 0, 0), (255, 0, 1), (255, 0, 0)))

Indices = NDArray[np.uint8]


def colours(indices: Indices, classes: Classes) -> NDArray[np.uint8]:
    """The label `(3, height, width)` that stands for class indices."""
    return np.array(classes.colours, np.uint8)[indices].transpose(2, 0, 1)


def random_indices(classes: Classes, seed: int = 0, height: int = 20, width: int = 30) -> Indices:
    return np.random.default_rng(seed).integers(0, len(classes.names), (height, width), dtype=np.uint8)


def write_pair(make_scene: MakeScene, label: NDArray[np.uint8], **image: Any) -> Pair:
    """Write an image and its label `(bands, height, width)`."""
    size = {"height": label.shape[1], "width": label.shape[2]}
    return Pair(make_scene("train/a.tiff", **{**size, **image}), make_scene("train_labels/a.tif", pixels=label))


def write_classes(folder: Path, text: str) -> str:
    (folder / "label_class_dict.csv").write_text(text)
    return str(folder)


# Classes


def test_classes_are_read_in_the_order_of_their_lines(tmp_path: Path) -> None:
    text = "name,r,g,b\nroad,128,64,128\nbackground,0,0,0\nbuilding,255,0,1\nwater,255,0,0\n"
    classes = read_classes(write_classes(tmp_path, text))
    assert classes == FOUR
    assert classes.positive == 2


def test_spaces_around_names_and_colours_are_none_of_theirs(tmp_path: Path) -> None:
    classes = read_classes(write_classes(tmp_path, "name, r, g, b \nbackground ,0,0,0\n building , 255,255.0 ,255 \n"))
    assert (classes.names, classes.colours) == (TWO.names, TWO.colours)


MEANT = ": building_px, building_m2, coverage and masks are of road"


@pytest.mark.parametrize(
    ("names", "positive", "text"),
    [
        (("background", "building"), 1, None),
        (("Buildings", "land"), 0, None),
        (("background", "road"), 1, f"finds the class road alone{MEANT}"),
        (("land", "road"), 1, f"finds the class road alone, and land counts as background{MEANT}"),
        (
            ("background", "building", "road"),
            1,
            "finds the class building alone, and road counts as background",
        ),
        (
            ("background", "building", "road", "water"),
            2,
            f"finds the class road alone, and building, water count as background{MEANT}",
        ),
    ],
)
def test_it_is_said_what_a_model_finds_unless_that_is_buildings_and_nothing_else(
    names: tuple[str, ...], positive: int, text: str | None
) -> None:
    assert describe_class(names, positive) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class,r,g,b\nbackground,0,0,0\nbuilding,1,1,1\n", "name,r,g,b"),
        ("name,r,g,b\nbuilding,1,1,1\n", "2 to 254 classes"),
        ("name,r,g,b\nbackground,7,7,7\nbuilding,7,7,7\n", r"same colour, \(7, 7, 7\)"),
        ("name,r,g,b\nbuilding,7,7,7\nbuilding,8,8,8\n", "same name, building"),
        ("name,r,g,b\nbackground,0,0,0\nbuilding,256,0,0\n", "from 0 to 255"),
        ("name,r,g,b\nbackground,0,0,0\nbuilding,254.9,0,0\n", r"254\.9 is not a whole number"),
        ("name,r,g,b\nbackground,0,0,0\nbuilding,inf,0,0\n", "inf is not a whole number"),
        ("name,r,g,b\nbackground,0,0,0\nbuilding,0,0\n", "name,r,g,b: "),
        ("name,r,g,b\nbuilding,0,0,0\nbuilding ,1,1,1\n", "same name, building"),
    ],
)
def test_a_class_file_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SegError, match=rf"label_class_dict\.csv: .*{message}"):
        read_classes(write_classes(tmp_path, text))


def test_a_missing_class_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SegError, match=rf"{tmp_path}/label_class_dict\.csv: no such file"):
        read_classes(str(tmp_path))


@pytest.mark.parametrize(("wanted", "index"), [("", 2), ("building", 2), ("water", 3), ("background", 1)])
def test_the_positive_class_is_the_one_wanted_or_that_of_buildings(tmp_path: Path, wanted: str, index: int) -> None:
    text = "name,r,g,b\nroad,128,64,128\nbackground,0,0,0\nbuilding,255,0,1\nwater,255,0,0\n"
    assert read_classes(write_classes(tmp_path, text), wanted).positive == index


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("background", "house"), "no name begins with building: choose one with --class, such as --class house$"),
        (("building", "Buildings"), "several names begin with building: choose one with --class, such as --class b"),
    ],
)
def test_where_names_do_not_tell_the_class_they_and_the_option_are_named(names: tuple[str, str], reason: str) -> None:
    with pytest.raises(SegError, match=rf"^classes {', '.join(names)}: {reason}"):
        _ = Classes(names, TWO.colours).positive
    assert Classes(names, TWO.colours, names[1]).positive == 1


@pytest.mark.parametrize("wanted", ["rood", "Road", "building"])
def test_a_class_that_the_dataset_lacks_is_refused_with_those_it_has(wanted: str) -> None:
    classes = Classes(("background", "road"), TWO.colours, wanted)
    with pytest.raises(SegError, match=rf"^--class {wanted}: .* its classes are background, road$"):
        _ = classes.positive


# Pairs


@pytest.mark.parametrize("suffix", [".tif", ".tiff"])
def test_pairs_are_found_by_name(make_scene: MakeScene, tmp_path: Path, suffix: str) -> None:
    for name in ("b", "a"):
        make_scene(f"val/{name}.tiff")
        make_scene(f"val_labels/{name}{suffix}")
    (tmp_path / "val" / "notes.txt").write_text("no image")
    pairs = find_pairs(str(tmp_path), "val")
    assert pairs == [Pair(f"{tmp_path}/val/{n}.tiff", f"{tmp_path}/val_labels/{n}{suffix}") for n in ("a", "b")]


def test_a_picture_beside_an_image_is_no_image_more(make_scene: MakeScene, tmp_path: Path) -> None:
    for name in ("train/a.tif", "train/b.tif", "train_labels/a.tif", "train_labels/b.tif"):
        make_scene(name)
    for folder in ("train", "train_labels"):
        (tmp_path / folder / "._a.tif").touch()  # as macOS writes it
    assert [Path(pair.image).name for pair in find_pairs(str(tmp_path), "train")] == ["a.tif", "b.tif"]
    (tmp_path / "train" / "b.jpg").touch()
    with pytest.raises(SegError, match=r"/train/b\.jpg: b\.tif beside it has the same label: leave one"):
        find_pairs(str(tmp_path), "train")


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
    expected = np.full_like(plain.label, UNLABELLED)
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


def test_an_image_of_fewer_bits_is_refused_with_the_way_out(tmp_path: Path) -> None:
    shape = {"count": 3, "height": 20, "width": 30, "dtype": "uint8"}
    with rasterio.open(tmp_path / "a.tif", "w", **shape, nbits=4) as dataset:
        dataset.write(noise(3) // 16)
    with pytest.raises(
        SegError, match=r"/a\.tif: its pixels have 4 bits: .*gdal_translate -ot Byte -scale 0 15 0 255\)$"
    ):
        read_header(Pair(str(tmp_path / "a.tif"), ""))


# Bands


def write_image(path: Path, pixels: NDArray[np.uint8], photometric: str = "minisblack") -> str:
    """Write an image of which no band is labelled alpha."""
    count, height, width = pixels.shape
    shape = {"count": count, "height": height, "width": width, "dtype": "uint8"}
    with rasterio.open(path, "w", **shape, photometric=photometric, alpha="unspecified") as dataset:
        dataset.write(pixels)
    return str(path)


def noise(bands: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (bands, 20, 30), dtype=np.uint8)


def digests_of(make_scene: MakeScene, *images: NDArray[np.uint8]) -> list[Digest]:
    """Digests of images that are written as `0.tiff`, `1.tiff`, ..."""
    label, found = make_scene("label.tif", pixels=colours(random_indices(TWO), TWO)), []
    for number, pixels in enumerate(images):
        photometric = "rgb" if len(pixels) in {3, 4} else "minisblack"
        image = write_image(Path(label).with_name(f"{number}.tiff"), pixels, photometric)
        sample, scene, _ = read_pair(Pair(image, label), TWO)
        found.append(digest(sample, scene, TWO.positive))
    return found


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 6])
def test_images_of_any_number_of_bands_are_read(make_scene: MakeScene, bands: int) -> None:
    (found,) = digests_of(make_scene, noise(bands))
    check_bands([found])
    assert [len(values) for values in normalisation([found])] == [bands, bands]
    assert len(read_header(Pair(found.uri, "")).bands) == bands


def test_images_of_different_numbers_of_bands_are_refused_with_both_files(make_scene: MakeScene) -> None:
    found = digests_of(make_scene, *map(noise, (3, 4, 3)))
    with pytest.raises(SegError, match=r"/1\.tiff: 4 bands besides alpha, where .*/0\.tiff has 3: ") as refused:
        check_bands(found)
    assert "\n" not in str(refused.value)


def test_an_alpha_band_without_its_label_is_refused_unless_an_image_shows_that_it_is_data(
    make_scene: MakeScene,
) -> None:
    pixels = noise(4)
    alpha = np.concatenate([pixels[:3], 255 * (pixels[3:] > 99).astype(np.uint8)])
    found = digests_of(make_scene, alpha, pixels)
    check_bands(found)
    with pytest.raises(SegError, match=r"band 4 may be alpha.*-colorinterp_4 alpha.*gdal_translate -b 1 -b 2 -b 3\)$"):
        check_bands(found[:1])


def test_an_image_of_alpha_alone_is_refused(make_scene: MakeScene) -> None:
    path = make_scene("train/a.tiff", bands=1)
    with rasterio.open(path, "r+") as dataset:
        dataset.colorinterp = (ColorInterp.alpha,)
    with pytest.raises(SegError, match=r"train/a\.tiff: it has no band besides alpha"):
        read_header(Pair(path, ""))


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
def test_pixels_that_a_label_leaves_out_are_not_labelled(make_scene: MakeScene, kind: str) -> None:
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
    assert np.array_equal(sample.label, np.where(labelled, indices, UNLABELLED))


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
    return [digest(sample, scene, TWO.positive) for sample in samples]


def test_normalisation_is_that_of_all_valid_pixels(make_scene: MakeScene) -> None:
    samples = [random_sample(0, 10, 20), random_sample(1, 50, 30, missing=0.9), random_sample(2, 5, 5, missing=1.0)]
    for sample in samples:
        sample.image[sample.label == MISSING] = 255
        sample.image[..., 1] //= 3
    pixels = np.concatenate([sample.image[sample.label != MISSING] for sample in samples]).astype(np.float64)
    mean, std = normalisation(digests(samples, make_scene))
    assert mean == pytest.approx(pixels.mean(axis=0), abs=1e-3)
    assert std == pytest.approx(pixels.std(axis=0), abs=1e-3)


def test_imagery_is_described_by_its_histogram_and_by_how_far_its_images_lie_from_that(make_scene: MakeScene) -> None:
    samples = [random_sample(seed, 10, 20, missing=0.5) for seed in range(3)]
    alike = describe_imagery(digests(samples, make_scene))
    assert np.shape(alike["levels"]) == (3, 32)
    assert np.sum(alike["levels"], axis=1) == pytest.approx(np.ones(3), abs=1e-3)
    samples[2].image[...] = samples[2].image // 2
    assert describe_imagery(digests(samples, make_scene))["spread"] > 2 * alike["spread"] > 0


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
