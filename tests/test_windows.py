"""Windows of a part that are read at once: the chips are those of windows that are read alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import MakeBundle
from test_raster import write_raw

from jobs.windows import stage_windows
from seg_core.errors import ReadError
from seg_core.plan import Part, Settings, Square
from seg_core.scenes import Scene
from seg_core.segmenter import Segmenter
from seg_core.tiling import split
from seg_core.town import draw_town

SETTINGS = Settings(tile_size=64, part=256, halo=24, threshold=0.5)
SIDE = 1100


def square_of(scene: Scene) -> Square:
    """All of a scene, by four windows."""
    return [(Part("a", scene, scene.window), window) for window in split(scene.window, SIDE // 2)]


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
    square = square_of(write_town(tmp_path / "a.tif", mask=valid))
    for halo, holds in ((24, [True] * 4), (0, [True, False, True, False])):
        settings = replace(SETTINGS, halo=halo, decode=decode)
        together = stage_windows(square, settings, segmenter)
        assert len({chip.image.untyped_storage().data_ptr() for chip in together}) == 1
        assert [chip.holds for chip in together] == holds
        for job, chip in zip(square, together, strict=True):
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
    square, settings = square_of(scene), replace(SETTINGS, halo=0, decode="device")
    with pytest.raises(ReadError, match="a block can't be decoded"):
        stage_windows(square, settings, segmenter)
    assert all(stage_windows([job], settings, segmenter)[0].decoded for job in square[:3])
    with pytest.raises(ReadError, match=r"a\.tif"):  # GDAL's words for it
        stage_windows(square[3:], settings, segmenter)
