"""Whole scenes with fewer pixels, to look at."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import MakeScene
from numpy.typing import NDArray
from rasterio.enums import Resampling

from seg_core.errors import ReadError
from seg_core.grid import Window
from seg_core.imagery import decimated
from seg_core.imagery.decimated import read_decimated
from seg_core.imagery.headers import read_scene
from seg_core.imagery.scene import Scene, resample_grid


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    rows, cols = np.mgrid[0:height, 0:width]
    return np.stack([rows // 2, cols // 2, (rows + cols) // 4]).astype(np.uint8)


def scene_of(path: str) -> Scene:
    return read_scene(path, Path(path).name)


def blocks(pixels: NDArray[np.uint8], step: int) -> NDArray[np.float64]:
    bands, height, width = pixels.shape
    return np.asarray(pixels.reshape(bands, height // step, step, width // step, step).mean(axis=(2, 4)))


@pytest.mark.parametrize("block", [32, 2048])
def test_pixels_are_averaged_block_by_block(make_scene: MakeScene, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(decimated, "BLOCK", block)
    pixels = smooth(120, 80)
    found, valid = read_decimated(scene_of(make_scene(pixels=pixels)), 4)
    assert found.shape == (3, 30, 20)
    assert valid.all()
    np.testing.assert_allclose(found, blocks(pixels, 4), atol=0.51)


def test_no_more_than_a_block_is_read_at_once(make_scene: MakeScene, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Window] = []
    read = decimated.read_chip

    def watched(scene: Scene, window: Window, *rest: object) -> object:
        seen.append(window)
        return read(scene, window, *rest)

    monkeypatch.setattr(decimated, "read_chip", watched)
    monkeypatch.setattr(decimated, "BLOCK", 64)
    found, _ = read_decimated(scene_of(make_scene(height=1000, width=30)), 30)
    assert found.shape == (3, 34, 1)
    assert max(window.height for window in seen) <= 64
    assert sum(window.num_pixels for window in seen) == 1000 * 30


def test_pixels_without_data_count_neither_as_valid_nor_in_averages(make_scene: MakeScene) -> None:
    pixels = np.full((3, 40, 40), 100, np.uint8)
    pixels[:, :21] = 255  # of the third row of blocks, a tenth too
    found, valid = read_decimated(scene_of(make_scene(pixels=pixels, nodata=255)), 10)
    np.testing.assert_array_equal(valid, np.repeat([[False], [False], [True], [True]], 4, axis=1))
    assert (found[:, 2:] == 100).all()


def test_overviews_are_read_where_there_are_any(make_scene: MakeScene) -> None:
    path = make_scene(height=256, width=256, nodata=255)  # noise, of which an average is another one
    with rasterio.open(path, "r+") as file:
        file.build_overviews([4], Resampling.nearest)
    found, valid = read_decimated(scene_of(path), 4)
    with rasterio.open(path, OVERVIEW_LEVEL=0) as overview:
        np.testing.assert_array_equal(found, overview.read())
    assert valid.all()


def test_black_water_in_an_overview_is_valid_if_infrared_shows_it(make_scene: MakeScene) -> None:
    pixels = np.full((4, 256, 256), 90, np.uint8)
    pixels[:3, :, :128] = 0  # water
    pixels[:, :, :64] = 0  # no data
    path = make_scene(pixels=pixels, nodata=0)
    with rasterio.open(path, "r+") as file:
        file.build_overviews([4], Resampling.nearest)
    scene = read_scene(path, "a.tif", alpha=0)
    _, valid = read_decimated(replace(scene, bands=(1, 2, 3)), 4)
    assert (valid == (np.arange(64) >= 16)).all()


def test_a_scene_that_is_resampled_is_read_from_its_own_pixels(make_scene: MakeScene) -> None:
    pixels = smooth(120, 80)
    scene = resample_grid(scene_of(make_scene(pixels=pixels)), 2.0)
    assert scene.is_resampled
    found, _ = read_decimated(scene, 2)
    np.testing.assert_allclose(found, blocks(pixels, 4), atol=0.51)


def test_values_are_scaled_as_the_run_scales_them(make_scene: MakeScene) -> None:
    scene = scene_of(make_scene(pixels=np.full((3, 40, 40), 3000, np.uint16), dtype="uint16"))
    found, _ = read_decimated(scene, 4, (1000, 5000))
    assert (found == 128).all()


def test_a_scene_that_has_changed_is_an_error(make_scene: MakeScene) -> None:
    scene = scene_of(make_scene())
    with pytest.raises(ReadError, match="different when it was planned"):
        read_decimated(replace(scene, height=99), 4)
