"""Pixels and validity of chips, for every dtype and kind of nodata, beyond the edge, scaled and resampled."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import NORTH_UP, UTM, MakeScene
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.windows import Window as RasterioWindow
from rasters import write_raw

from seg_core.errors import ReadError
from seg_core.grid import Window, reflect
from seg_core.imagery.georef import Transform
from seg_core.imagery.geotiff import write_geotiff
from seg_core.imagery.headers import read_scene
from seg_core.imagery.raster import read_chip, read_whole
from seg_core.imagery.scene import Scene, resample_grid

DTYPES = ("uint8", "uint16", "float32")
OPAQUE = {"uint8": 255, "uint16": 65535, "float32": 1.0}
SCALE = (0.0, 255.0)  # grey levels stay what they are
Pixels = NDArray[Any]
Holes = NDArray[np.bool_]


def draw(dtype: str, bands: int = 3, height: int = 13, width: int = 17) -> tuple[Pixels, Holes]:
    """Random pixels between 10 and 200, and where they are to be valid: not in a block and some single pixels."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(10, 200, (bands, height, width)).astype(dtype)
    valid = rng.random((height, width)) > 0.1
    valid[:5, 8:] = False
    return pixels, valid


def chip_of(scene: Scene, window: Window | None = None) -> tuple[Pixels, Holes]:
    return read_chip(scene, window or scene.window, None if scene.dtype == "uint8" else SCALE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_any_nodata_all_pixels_are_valid(tmp_path: Path, dtype: str) -> None:
    pixels, _ = draw(dtype)
    pixels[:, 0, 0] = 0
    pixels[:, 0, 1] = 255
    found, valid = chip_of(write_raw(tmp_path / "a.tif", pixels))
    assert (found.dtype, valid.dtype) == (np.uint8, np.bool_)
    assert np.array_equal(found, pixels.astype(np.uint8))
    assert valid.all()


@pytest.mark.parametrize("nodata", [0.0, 7.0, 255.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_that_hold_the_nodata_value_in_all_bands_are_missing(tmp_path: Path, dtype: str, nodata: float) -> None:
    pixels, valid = draw(dtype)
    pixels[:, ~valid] = nodata
    found, found_valid = chip_of(write_raw(tmp_path / "a.tif", pixels, nodata=nodata))
    assert np.array_equal(found_valid, valid)
    assert np.array_equal(found[:, valid], pixels[:, valid].astype(np.uint8))


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint16", 65535.0), ("float32", -9999.0), ("float32", -3.4028234663852886e38)]
)
def test_nodata_values_far_from_the_imagery_are_recognised(tmp_path: Path, dtype: str, nodata: float) -> None:
    pixels, valid = draw(dtype)
    pixels[:, ~valid] = nodata
    _, found = chip_of(write_raw(tmp_path / "a.tif", pixels, nodata=nodata))
    assert np.array_equal(found, valid)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_band_that_equals_nodata_by_chance_is_valid(tmp_path: Path, dtype: str) -> None:
    pixels, _ = draw(dtype)
    for band in range(3):
        pixels[band, band, :] = 255
    pixels[:2, 4, :] = 255
    _, valid = chip_of(write_raw(tmp_path / "a.tif", pixels, nodata=255))
    assert valid.all()


@pytest.mark.parametrize("gsd_m", [None, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_black_water_with_infrared_is_valid_if_the_colours_alone_are_read(
    tmp_path: Path, dtype: str, gsd_m: float | None
) -> None:
    pixels = np.full((4, 16, 24), 90, dtype)
    pixels[:3, :, :16] = 0  # water
    pixels[:, :, :8] = 0  # no data
    scene = write_raw(tmp_path / "a.tif", pixels, nodata=0, photometric="minisblack")
    scene = replace(scene, bands=(1, 2, 3))
    _, valid = chip_of(scene if gsd_m is None else resample_grid(scene, gsd_m))
    assert not valid[:, : valid.shape[1] // 3].any()
    assert valid[:, -(-valid.shape[1] // 3) + 1 :].all()


def test_of_one_band_the_nodata_value_is_missing(tmp_path: Path) -> None:
    pixels, valid = draw("uint8", bands=1)
    pixels[:, ~valid] = 255
    _, found = chip_of(write_raw(tmp_path / "a.tif", pixels, nodata=255))
    assert np.array_equal(found, valid)


@pytest.mark.parametrize("nodata", [None, float("nan"), -9999.0])
def test_nan_is_missing_whatever_the_header_says(tmp_path: Path, nodata: float | None) -> None:
    pixels, valid = draw("float32")
    pixels[:, ~valid] = np.nan
    found, found_valid = chip_of(write_raw(tmp_path / "a.tif", pixels, nodata=nodata))
    assert np.array_equal(found_valid, valid)
    assert np.array_equal(found[:, valid], pixels[:, valid].astype(np.uint8))


def test_a_pixel_with_nan_or_infinity_in_one_band_is_missing(tmp_path: Path) -> None:
    pixels, _ = draw("float32")
    pixels[1, 2, 3], pixels[2, 4, 5], pixels[0, 6, 7] = np.nan, np.inf, -np.inf
    _, valid = chip_of(write_raw(tmp_path / "a.tif", pixels))
    assert sorted(map(tuple, np.argwhere(~valid).tolist())) == [(2, 3), (4, 5), (6, 7)]


@pytest.mark.parametrize("nodata", [None, 0.0])
@pytest.mark.parametrize("bands", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_says_what_is_valid_and_is_no_colour(
    tmp_path: Path, dtype: str, bands: int, nodata: float | None
) -> None:
    pixels, valid = draw(dtype, bands)
    scene = write_raw(tmp_path / "a.tif", pixels, alpha=valid * OPAQUE[dtype], nodata=nodata)
    found, found_valid = chip_of(scene)
    assert scene.bands == tuple(range(1, bands + 1))
    assert np.array_equal(found, pixels.astype(np.uint8))
    assert np.array_equal(found_valid, valid)


def test_a_pixel_that_is_nearly_transparent_is_valid(tmp_path: Path) -> None:
    pixels, _ = draw("uint16")
    alpha = np.arange(13 * 17).reshape(13, 17)
    _, valid = chip_of(write_raw(tmp_path / "a.tif", pixels, alpha=alpha))
    assert np.array_equal(valid, alpha > 0)


@pytest.mark.parametrize("nodata", [None, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_internal_mask_says_what_is_valid(tmp_path: Path, dtype: str, nodata: float | None) -> None:
    pixels, valid = draw(dtype)
    found, found_valid = chip_of(write_raw(tmp_path / "a.tif", pixels, mask=valid, nodata=nodata))
    assert np.array_equal(found_valid, valid)
    assert np.array_equal(found, pixels.astype(np.uint8))


@pytest.mark.parametrize("kind", ["nodata", "alpha", "mask", "nan"])
@pytest.mark.parametrize("window", [Window(-9, -7, 40, 31), Window(5, 9, 30, 11), Window(-40, -50, 100, 120)])
@pytest.mark.parametrize("shape", [(13, 17), (2, 3), (1, 6), (1, 1)])
def test_a_window_beyond_the_scene_is_its_reflection(
    tmp_path: Path, kind: str, window: Window, shape: tuple[int, int]
) -> None:
    pixels, valid = draw("float32" if kind == "nan" else "uint8", 3, *shape)
    valid.flat[0] = True
    if kind in {"nodata", "nan"}:
        pixels[:, ~valid] = 255 if kind == "nodata" else np.nan
    scene = write_raw(
        tmp_path / "a.tif",
        pixels,
        nodata=255 if kind == "nodata" else None,
        alpha=valid * 255 if kind == "alpha" else None,
        mask=valid if kind == "mask" else None,
    )
    whole, whole_valid = chip_of(scene)
    found, found_valid = chip_of(scene, window)
    around = 120
    inside = np.s_[
        around + window.row_off : around + window.row_off + window.height,
        around + window.col_off : around + window.col_off + window.width,
    ]
    assert np.array_equal(found_valid, np.pad(whole_valid, around, mode="reflect")[inside])
    for band in range(3):
        assert np.array_equal(found[band], np.pad(whole[band], around, mode="reflect")[inside])
    assert np.array_equal(whole_valid, valid)


@pytest.mark.parametrize(("dtype", "low", "high"), [("uint16", 1000.0, 3000.0), ("float32", -0.5, 0.75)])
def test_scale_takes_min_to_0_and_max_to_255_and_clips(tmp_path: Path, dtype: str, low: float, high: float) -> None:
    span = high - low
    values = [low, high, low + span / 255 * 100, low - span / 10, high + span / 10, low + span / 255 * 254]
    pixels = np.tile(np.array(values, dtype), (3, 1)).reshape(3, 2, 3)
    scene = write_raw(tmp_path / "a.tif", pixels)
    found, _ = read_chip(scene, scene.window, (low, high))
    expected = np.clip(np.rint((pixels.astype(np.float64) - low) / span * 255), 0, 255)
    assert np.abs(found - expected).max() == 0
    assert found[0].ravel().tolist() == [0, 255, 100, 0, 255, 254]


def test_scale_does_not_wrap_round_at_the_ends_of_uint16(tmp_path: Path) -> None:
    pixels = np.tile(np.array([0, 1, 9_999, 10_000, 65_535], np.uint16), (3, 1)).reshape(3, 1, 5)
    scene = write_raw(tmp_path / "a.tif", pixels)
    found, _ = read_chip(scene, scene.window, (10_000.0, 20_000.0))
    assert found[0, 0].tolist() == [0, 0, 0, 0, 255]


def test_scale_takes_the_least_float_as_nodata_in_its_stride(tmp_path: Path) -> None:
    least = float(np.finfo(np.float32).min)
    pixels = np.full((3, 2, 2), 0.5, np.float32)
    pixels[:, 0, 0] = least
    scene = write_raw(tmp_path / "a.tif", pixels, nodata=least)
    found, valid = read_chip(scene, scene.window, (0.0, 1.0))
    assert valid.tolist() == [[False, True], [True, True]]
    assert found[:, valid].tolist() == [[128, 128, 128]] * 3


def test_scale_does_not_change_what_is_valid(tmp_path: Path) -> None:
    pixels, valid = draw("uint16")
    pixels[:, ~valid] = 0
    scene = write_raw(tmp_path / "a.tif", pixels, nodata=0)
    _, found = read_chip(scene, scene.window, (100.0, 150.0))  # many pixels become 0, and none of them nodata
    assert np.array_equal(found, valid)


def test_bands_are_read_in_the_order_asked_for(make_scene: MakeScene) -> None:
    path = make_scene(bands=4)
    scene = read_scene(path, "a")
    whole = read_whole(path)
    chosen = Scene(**{**vars(scene), "bands": (4, 1, 1)})
    assert np.array_equal(read_chip(chosen, scene.window)[0], whole[[3, 0, 0]])


def overlaps(scene: Scene, num: int, side: int) -> None:
    """Assert that random windows, inside and over the edge, say the same as the whole scene's reflection."""
    rng = np.random.default_rng(11)
    whole, whole_valid = chip_of(scene)
    around = 16
    padded = np.pad(whole, ((0, 0), (around, around), (around, around)), mode="reflect")
    padded_valid = np.pad(whole_valid, around, mode="reflect")
    for _ in range(num):
        height, width = (int(rng.integers(1, min(side, n))) for n in (scene.height, scene.width))
        row = int(rng.integers(-around, scene.height + around - height))
        col = int(rng.integers(-around, scene.width + around - width))
        found, valid = chip_of(scene, Window(row, col, height, width))
        at = np.s_[row + around : row + around + height, col + around : col + around + width]
        assert np.array_equal(valid, padded_valid[at])
        assert np.array_equal(found, padded[:, *at])


@pytest.mark.parametrize("gsd_m", [0.37, 0.6, 1.3, 2.5, 4.0])
@pytest.mark.parametrize("kind", ["none", "nodata", "alpha", "mask", "float"])
def test_resampled_windows_agree_exactly_where_they_overlap(tmp_path: Path, kind: str, gsd_m: float) -> None:
    pixels, valid = draw("float32" if kind == "float" else "uint8", 3, 300, 320)
    valid[80:180, 60:240] = False
    if kind in {"nodata", "float"}:
        pixels[:, ~valid] = 255 if kind == "nodata" else np.nan
    scene = write_raw(
        tmp_path / "a.tif",
        pixels,
        nodata=255 if kind == "nodata" else None,
        alpha=valid * 255 if kind == "alpha" else None,
        mask=valid if kind == "mask" else None,
    )
    resampled = resample_grid(scene, gsd_m)
    assert resampled.is_resampled
    overlaps(resampled, 8, 200)


@pytest.mark.parametrize("gsd_m", [0.37, 0.6, 1.3, 4.0])
def test_a_resampled_grid_keeps_the_scenes_corners(make_scene: MakeScene, gsd_m: float) -> None:
    scene = read_scene(make_scene(transform=(0.9, 0.1, 400_000.0, 0.2, -1.1, 5_800_000.0)), "a")
    resampled = resample_grid(scene, gsd_m)
    for row, col in ((0, 0), (0, 1), (1, 0), (1, 1)):
        before = corner(scene.transform, row * scene.height, col * scene.width)
        after = corner(resampled.transform, row * resampled.height, col * resampled.width)
        assert after == pytest.approx(before, abs=1e-6)


def corner(transform: Transform, row: int, col: int) -> tuple[float, float]:
    a, b, c, d, e, f = transform
    return a * col + b * row + c, d * col + e * row + f


def test_a_resampled_ramp_is_where_it_was(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(40, 240, 2, dtype=np.uint8), (3, 100, 100)).copy()
    scene = write_raw(tmp_path / "a.tif", ramp)
    for gsd_m in (0.5, 2.0):
        resampled = resample_grid(scene, gsd_m)
        found, valid = chip_of(resampled)
        centres = (np.arange(resampled.width) + 0.5) * (100 / resampled.width) - 0.5
        expected = 40 + 2 * centres.clip(0, 99)
        assert found.shape == (3, resampled.height, resampled.width)
        assert valid.all()
        assert np.abs(found.astype(float) - expected)[:, 5:-5, 5:-5].max() <= 1


def test_resampling_neither_blends_missing_pixels_in_nor_moves_them(tmp_path: Path) -> None:
    pixels = np.full((3, 60, 60), 100, np.uint8)
    pixels[:, 20:40, 20:40] = 255
    scene = resample_grid(write_raw(tmp_path / "a.tif", pixels, nodata=255), 0.5)
    found, valid = chip_of(scene)
    expected = np.ones(valid.shape, np.bool_)
    step = scene.height / 60
    low, high = round(20 * step), round(40 * step)
    expected[low:high, low:high] = False
    assert (valid != expected).sum() <= 4 * (high - low)  # a pixel at the border may go either way
    assert (found[:, valid] == 100).all()


def test_a_resampled_pixel_with_one_band_at_nodata_is_valid(tmp_path: Path) -> None:
    pixels = np.full((3, 60, 60), 100, np.uint8)
    pixels[0] = 255
    scene = resample_grid(write_raw(tmp_path / "a.tif", pixels, nodata=255), 0.5)
    _, valid = chip_of(scene)
    assert valid.all()


def test_a_scene_of_one_pixel_is_read_and_resampled(tmp_path: Path) -> None:
    scene = write_raw(tmp_path / "a.tif", np.array([[[10]], [[20]], [[30]]], np.uint8))
    found, valid = chip_of(scene, Window(-8, -8, 20, 24))
    assert found.shape == (3, 20, 24)
    assert (found == np.array([10, 20, 30])[:, None, None]).all()
    assert valid.all()
    for gsd_m in (0.25, 4.0):
        resampled = resample_grid(scene, gsd_m)
        found, _ = chip_of(resampled)
        assert found.shape == (3, resampled.height, resampled.width)
        assert (found == np.array([10, 20, 30])[:, None, None]).all()


def with_overviews(path: Path, factors: list[int], beside: bool = False) -> None:
    """Add overviews, and then make the file itself another colour, so that it shows which of them is read."""
    with rasterio.Env(TIFF_USE_OVR=beside), rasterio.open(path, "r+") as dataset:
        dataset.build_overviews(factors, Resampling.average)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.write(np.full((dataset.count, *dataset.shape), 50, np.uint8))


@pytest.mark.parametrize(("gsd_m", "level"), [(0.5, 50), (1.9, 50), (2.0, 100), (3.9, 100), (4.0, 100), (7.0, 100)])
def test_the_overview_that_is_fine_enough_is_read(tmp_path: Path, gsd_m: float, level: int) -> None:
    write_raw(tmp_path / "a.tif", np.full((3, 300, 320), 100, np.uint8))
    with_overviews(tmp_path / "a.tif", [2, 4])
    scene = resample_grid(read_scene(str(tmp_path / "a.tif"), "a.tif"), gsd_m)
    found, valid = chip_of(scene)
    assert (found == level).all()
    assert valid.all()


def test_overviews_blend_as_the_file_itself_would(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 256, 256)).astype(np.uint8)
    pixels = np.repeat(np.repeat(pixels[:, ::8, ::8], 8, axis=1), 8, axis=2)  # blocks of 8 px, coarser than all grids
    scene = write_raw(tmp_path / "a.tif", pixels)
    plain = chip_of(resample_grid(scene, 4.0))[0]
    with rasterio.open(tmp_path / "a.tif", "r+") as dataset:
        dataset.build_overviews([2, 4], Resampling.average)
    found = chip_of(resample_grid(read_scene(str(tmp_path / "a.tif"), "a.tif"), 4.0))[0]
    assert np.abs(found.astype(int) - plain).mean() < 25  # of noise of 73


@pytest.mark.parametrize("kind", ["nodata", "alpha"])
def test_windows_read_from_an_overview_agree_exactly_where_they_overlap(tmp_path: Path, kind: str) -> None:
    pixels, valid = draw("uint8", 3, 700, 731)
    pixels[:, ~valid] = 255
    alpha = valid * 255 if kind == "alpha" else None
    write_raw(tmp_path / "a.tif", pixels, nodata=255 if kind == "nodata" else None, alpha=alpha)
    with rasterio.open(tmp_path / "a.tif", "r+") as dataset:
        dataset.build_overviews([2, 4], Resampling.average)
    overlaps(resample_grid(read_scene(str(tmp_path / "a.tif"), "a.tif"), 2.7), 15, 200)


@pytest.mark.parametrize("masked", [True, False])
def test_a_file_with_a_mask_is_read_itself(tmp_path: Path, masked: bool) -> None:
    pixels, valid = np.full((3, 300, 320), 100, np.uint8), np.ones((300, 320), np.bool_)
    valid[:150] = False
    expected = chip_of(resample_grid(write_raw(tmp_path / "b.tif", pixels, mask=valid), 4.0))[1]
    write_raw(tmp_path / "a.tif", pixels, mask=valid if masked else None)
    with_overviews(tmp_path / "a.tif", [2, 4])
    if not masked:  # it comes later, and GDAL gives it overviews that say all is valid
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(tmp_path / "a.tif", "r+") as dataset:
            dataset.write_mask(valid)
    scene = resample_grid(read_scene(str(tmp_path / "a.tif"), "a.tif"), 4.0)
    found, known = chip_of(scene)
    assert np.array_equal(known, expected)
    assert (found[:, known] == 50).all()


def test_overviews_that_are_older_than_the_nodata_value_are_not_read(tmp_path: Path) -> None:
    pixels = np.full((3, 300, 320), 100, np.uint8)
    pixels[:, 100:] = 255
    expected = chip_of(resample_grid(write_raw(tmp_path / "b.tif", pixels, nodata=255), 4.0))[1]
    write_raw(tmp_path / "a.tif", pixels)
    with rasterio.open(tmp_path / "a.tif", "r+") as dataset:
        dataset.build_overviews([2, 4], Resampling.average)
    with rasterio.open(tmp_path / "a.tif", "r+") as dataset:
        dataset.nodata = 255
    assert np.array_equal(chip_of(resample_grid(read_scene(str(tmp_path / "a.tif"), "a.tif"), 4.0))[1], expected)


def test_overviews_beside_the_file_are_not_read(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.tif", np.full((3, 300, 320), 100, np.uint8))
    with_overviews(tmp_path / "a.tif", [2, 4], beside=True)
    assert (tmp_path / "a.tif.ovr").exists()
    found, _ = chip_of(resample_grid(read_scene(str(tmp_path / "a.tif"), "a.tif"), 4.0))
    assert (found == 50).all()


def test_windows_of_a_real_scene_equal_its_whole(shared: Path) -> None:
    for path in sorted((shared / "joplin").glob("*.tif"))[:2]:
        overlaps(read_scene(str(path), path.name), 6, 300)


@pytest.mark.parametrize("gsd_m", [1.0, 2.0])
def test_resampled_windows_of_a_real_scene_agree_exactly(shared: Path, gsd_m: float) -> None:
    path = next(iter(sorted((shared / "joplin").glob("*.tif"))))
    resampled = resample_grid(read_scene(str(path), path.name), gsd_m)
    assert resampled.height == pytest.approx(1024 * 0.6 / gsd_m, rel=0.01)
    overlaps(resampled, 6, 200)


def test_the_real_masks_and_nodata_say_what_is_missing(shared: Path) -> None:
    masked = next(iter(sorted((shared / "massachusetts-buildings/val").glob("*.tiff"))))
    scene = read_scene(str(masked), masked.name)
    _, valid = chip_of(scene, Window(0, 0, 1500, 1500))
    with rasterio.open(masked) as dataset:
        assert np.array_equal(valid, dataset.read_masks(1) > 0)
    assert 0.1 < valid.mean() < 0.9
    region = read_scene(str(shared / "brookline/region.tif"), "region.tif")
    pixels, valid = chip_of(region)
    assert np.array_equal(~valid, (pixels == 255).all(axis=0))
    assert (~valid).mean() == pytest.approx(0.17, abs=0.01)


@pytest.mark.parametrize("name", ["a.vrt", "a.tif", "a.png"])
def test_a_vrt_is_refused_under_any_name(make_scene: MakeScene, tmp_path: Path, name: str) -> None:
    secret = make_scene("secret.tif")
    (tmp_path / name).write_text(
        '<VRTDataset rasterXSize="120" rasterYSize="100"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f'<SourceFilename relativeToVRT="0">{secret}</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with rasterio.open(tmp_path / name, driver="VRT") as dataset:
        assert dataset.read().any()  # it is a working one
    with pytest.raises(ReadError, match="not an image, or a damaged one"):
        read_scene(str(tmp_path / name), name)


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.95])
def test_a_truncated_tiff_is_a_read_error(make_scene: MakeScene, keep: float) -> None:
    path = Path(make_scene(height=600, width=600))
    scene = read_scene(str(path), path.name)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(ReadError, match=str(path)):
        read_chip(scene, scene.window)


def test_a_truncated_tiff_is_a_read_error_when_it_is_resampled(make_scene: MakeScene) -> None:
    path = Path(make_scene(height=600, width=600))
    scene = resample_grid(read_scene(str(path), path.name), 2.0)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 19 // 20])
    with pytest.raises(ReadError, match=str(path)):
        read_chip(scene, scene.window)


def test_a_file_that_is_gone_is_a_read_error(make_scene: MakeScene) -> None:
    path = Path(make_scene())
    scene = read_scene(str(path), path.name)
    path.unlink()
    with pytest.raises(ReadError, match=f"{path}: no such file"):
        read_chip(scene, scene.window)


@pytest.mark.parametrize("gsd_m", [1.0, 2.0])
def test_a_file_of_another_size_than_planned_is_a_read_error(make_scene: MakeScene, gsd_m: float) -> None:
    scene = read_scene(make_scene(), "a")
    planned = scene if gsd_m == 1.0 else resample_grid(scene, gsd_m)
    make_scene(height=90)
    with pytest.raises(ReadError, match="120 x 90 px"):
        read_chip(planned, Window(0, 0, 10, 10))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read_back(tmp_path: Path, dtype: str) -> None:
    pixels, _ = draw(dtype)
    path = str(tmp_path / "a.tif")
    write_geotiff(path, pixels, crs=UTM, transform=NORTH_UP, nodata=7)
    assert np.array_equal(read_whole(path), pixels)
    scene = read_scene(path, "a.tif")
    assert (scene.height, scene.width, scene.bands, scene.dtype) == (13, 17, (1, 2, 3), dtype)
    assert (scene.crs, scene.transform, scene.nodata) == (UTM, NORTH_UP, 7.0)


def test_a_file_without_georeference_is_written_and_read_back(tmp_path: Path) -> None:
    pixels, _ = draw("uint8")
    path = str(tmp_path / "a.tif")
    write_geotiff(path, pixels)
    scene = read_scene(path, "a.tif")
    assert (scene.crs, scene.gsd_m) == (None, None)
    assert np.array_equal(chip_of(scene)[0], pixels)


@pytest.mark.parametrize("masked", [True, False])
def test_a_mask_that_comes_or_goes_is_no_answer(make_scene: MakeScene, masked: bool) -> None:
    scene = read_scene(make_scene(bands=4 if masked else 3), "scene.tif")
    assert scene.masked is masked
    scene = replace(scene, masked=not masked)
    with pytest.raises(ReadError, match=f"its mask was {'not ' if masked else ''}there when it was planned"):
        read_chip(scene, scene.window)


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("nodata", [None, 0, 7])
def test_blocks_that_a_sparse_file_leaves_out_are_missing_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interleave: str, nodata: int | None
) -> None:
    path, options = tmp_path / "sparse.tif", {"tiled": True, "blockxsize": 64, "blockysize": 64, "SPARSE_OK": True}
    profile = {"driver": "GTiff", "height": 300, "width": 200, "count": 3, "dtype": "uint8", "nodata": nodata}
    with rasterio.open(path, "w", **profile, interleave=interleave, **options) as dataset:
        dataset.write(np.full((64, 64), 9, np.uint8), 3, window=RasterioWindow(64, 128, 64, 64))
    scene = read_scene(str(path), "sparse.tif")
    expected = np.zeros((300, 200), np.bool_)
    expected[128:192, 64:128] = True
    for window in (scene.window, Window(100, 60, 90, 80), Window(192, 128, 100, 70)):
        _, valid = read_chip(scene, window)
        assert (valid == expected[window.slices(scene.window)]).all()
    monkeypatch.setattr("seg_core.imagery.raster.read_masks", None)  # what reads pixels begins with it
    pixels, valid = read_chip(scene, Window(-40, 130, 160, 90))
    assert pixels.shape == (3, 160, 90)
    assert not valid.any()
    with pytest.raises(TypeError):
        read_chip(scene, Window(0, 0, 130, 66))


@pytest.mark.parametrize("options", [{"interleave": "pixel"}, {"interleave": "band"}])
@pytest.mark.parametrize("compress", ["none", "lzw", "deflate"])
def test_the_middle_of_a_large_strip_is_not_missing(tmp_path: Path, compress: str, options: dict[str, str]) -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 3000, 40)).astype(np.uint8)
    layout = {"tiled": False, "blockysize": 3000, "compress": compress, **options}
    scene = write_raw(tmp_path / "strip.tif", pixels, nodata=0, **layout)
    window = Window(1500, 4, 20, 30)
    found, valid = read_chip(scene, window)
    assert valid.all()
    assert np.array_equal(found, pixels[:, *window.slices(scene.window)])


@pytest.mark.parametrize(
    "window", [Window(0, 0, 13, 17), Window(2, 3, 8, 9), Window(-5, -4, 30, 25), Window(-40, 9, 70, 9)]
)
@pytest.mark.parametrize("kind", ["plain", "nodata", "alpha", "mask", "resampled", "uint16"])
def test_pixels_are_put_where_they_are_wanted(tmp_path: Path, window: Window, kind: str) -> None:
    pixels, valid = draw("uint16" if kind == "uint16" else "uint8")
    holes = {"nodata": {"nodata": 255}, "alpha": {"alpha": valid * 255}, "mask": {"mask": valid}}.get(kind, {})
    if kind == "nodata":
        pixels[:, ~valid] = 255
    scene = write_raw(tmp_path / "a.tif", pixels, **holes)
    if kind == "resampled":
        scene = resample_grid(scene, 0.7)
    made = []

    def new(shape: tuple[int, ...]) -> Pixels:
        made.append(np.full(shape, 77, np.uint8))
        return made[-1]

    scale = SCALE if kind == "uint16" else None
    found, holds = read_chip(scene, window, scale, new=new)
    (given,) = made
    assert found is given
    expected, expected_holds = read_chip(scene, Window(0, 0, scene.height, scene.width), scale)
    rows, cols = (
        reflect(window.row_off, window.bottom, scene.height),
        reflect(window.col_off, window.right, scene.width),
    )
    assert np.array_equal(holds, expected_holds[rows[:, None], cols])
    assert np.array_equal(found, expected[:, rows[:, None], cols])
