"""Windows of a part that are read at once: the chips are those of windows that are read alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import MakeBundle, MakeScene
from test_raster import write_raw

from jobs.windows import Job, squares, stage_windows
from seg_core.errors import ReadError
from seg_core.plan import Part, Settings
from seg_core.scenes import Scene, read_scene
from seg_core.segmenter import Segmenter
from seg_core.tiling import Window, split
from seg_core.town import draw_town

SETTINGS = Settings(tile_size=64, part=256, halo=24, threshold=0.5)
SIDE = 1100


def part_of(scene: Scene, window: Window | None = None, key: str = "a") -> Part:
    return Part(key, scene, window or scene.window)


def jobs_of(part: Part, size: int) -> list[Job]:
    return [(part, window) for window in split(part.window, size)]


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        (64, 256, [8, 2]),  # a part each
        (64, 128, [2, 2, 2, 2, 2]),  # row by row of windows: those that follow each other
        (64, 64, [1] * 10),
        (128, 256, [2, 1]),
        (256, 256, [1, 1]),
    ],
)
def test_windows_that_follow_each_other_in_a_square_are_read_at_once(
    make_scene: MakeScene, size: int, side: int, expected: list[int]
) -> None:
    scene = read_scene(make_scene(height=128, width=320), "a.tif")
    parts = [part_of(scene, window, str(window)) for window in split(scene.window, 256)]
    jobs = [job for part in parts for job in jobs_of(part, size)]
    found = squares(jobs, side)
    assert [job for square in found for job in square] == jobs
    assert [len(square) for square in found] == expected


@pytest.fixture
def segmenter(make_bundle: MakeBundle) -> Segmenter:
    return Segmenter(make_bundle(), "cpu")


def write_town(path: Path, **options: Any) -> Scene:
    """Write a town of 1,100 px a side as a GeoTIFF of JPEG blocks."""
    pixels = np.moveaxis(draw_town(SIDE, SIDE, seed=3)[0], -1, 0)
    blocks = {"tiled": True, "blockxsize": 128, "blockysize": 64, "interleave": "pixel"}
    return write_raw(path, pixels, compress="jpeg", photometric="ycbcr", **blocks, **options)


@pytest.mark.parametrize("decode", ["cpu", "device"])
def test_chips_that_are_read_at_once_are_those_read_alone(tmp_path: Path, segmenter: Segmenter, decode: str) -> None:
    valid = np.ones((SIDE, SIDE), np.bool_)
    valid[:, 535:] = False
    jobs = jobs_of(part_of(write_town(tmp_path / "a.tif", mask=valid)), 550)
    for halo, holds in ((24, [True] * 4), (0, [True, False, True, False])):
        settings = replace(SETTINGS, halo=halo, decode=decode)
        together = stage_windows(jobs, settings, segmenter)
        assert len({chip.image.untyped_storage().data_ptr() for chip in together}) == 1
        assert [chip.holds for chip in together] == holds
        for job, chip in zip(jobs, together, strict=True):
            (alone,) = stage_windows([job], settings, segmenter)
            assert np.array_equal(chip.valid, alone.valid)
            assert torch.equal(chip.mask, alone.mask)
            assert torch.equal(chip.image[:, chip.mask], alone.image[:, alone.mask])
            assert chip.decoded == (decode == "device")


def test_who_decodes_a_window_does_not_depend_on_a_damaged_one_beside_it(tmp_path: Path, segmenter: Segmenter) -> None:
    scene = write_town(tmp_path / "a.tif")
    content = bytearray(Path(scene.uri).read_bytes())
    with rasterio.open(scene.uri) as dataset:
        offset, size = (int(dataset.get_tag_item(f"BLOCK_{name}_8_16", "TIFF", bidx=1)) for name in ("OFFSET", "SIZE"))
    content[offset + 2 : offset + size] = bytes(size - 2)
    Path(scene.uri).write_bytes(content)
    jobs, settings = jobs_of(part_of(scene), 550), replace(SETTINGS, halo=0, decode="device")
    with pytest.raises(ReadError, match="a block can't be decoded"):
        stage_windows(jobs, settings, segmenter)
    assert all(stage_windows([job], settings, segmenter)[0].decoded for job in jobs[:3])
    with pytest.raises(ReadError, match=r"a\.tif"):  # GDAL's words for it
        stage_windows(jobs[3:], settings, segmenter)
